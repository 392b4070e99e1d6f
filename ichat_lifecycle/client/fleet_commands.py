"""The commands to a fleet that runs: what each does with its arguments."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import quote

from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.client.documents import as_list, as_text
from ichat_lifecycle.client.errors import ForeignError
from ichat_lifecycle.client.fleet_client import RefusedError
from ichat_lifecycle.client.fleets import find_fleet
from ichat_lifecycle.client.run import interruptible, run_command
from ichat_lifecycle.credentials import header_value
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.printable import plain

COMMAND_TIMEOUT_S = 200.0  # a reload asks vLLM's parser
LOGS_TIMEOUT_S = 30.0
NO_TOKEN = (
    f"give --token or {FLEET_TOKEN_VARIABLE}; a token that a fleet keeps is sent to none but this "
    "user's own"
)
CHANGES = ("started", "replaced", "removed", "renewed")

Command = Callable[[argparse.Namespace], Coroutine[Any, Any, int]]


def _run(command: Command) -> Callable[[argparse.Namespace], int]:
    return lambda args: run_command(command(args))


@_run
async def reload(args: argparse.Namespace) -> int:
    done = await _post(args, "/fleet/reload")
    if not isinstance(done.get("started"), list):
        raise ForeignError("the answer to a reload is not understood: it does not say what started")
    said = {what: ", ".join(map(as_text, as_list(done.get(what)))) for what in CHANGES}
    told = "; ".join(f"{what} {names}" for what, names in said.items() if names)
    print(told or "nothing has changed")
    return 0


@_run
async def stop(args: argparse.Namespace) -> int:
    if bool(args.name) == args.all:
        raise ArgumentsError("stop: give a NAME, or --all")
    path = "/fleet/stop" if args.all else _path(args.name, "stop")
    await _post(args, path, {"now": True} if args.now else None)
    return 0


@_run
async def restart(args: argparse.Namespace) -> int:
    await _post(args, _path(args.name, "restart"))
    return 0


@_run
async def logs(args: argparse.Namespace) -> int:
    fleet = await find_fleet(args.fleet)
    path, query = _path(args.name, "logs"), {"lines": args.lines, "follow": args.follow}
    async with fleet.client(LOGS_TIMEOUT_S) as client:
        if not args.follow:
            _print(*await client.lines(path, query))
            return 0
        async with contextlib.aclosing(client.follow(path, query)) as lines:
            async for line in lines:
                _print(line)
    return 0


def _print(*lines: str) -> None:
    """Also into a file or a pipe without what a terminal obeys: somebody will look at that, too."""
    with interruptible():
        for line in lines:
            print(plain(line.rstrip("\r")), flush=True)


def _path(name: str, what: str) -> str:
    """A name is one part of it, whatever it is made of."""
    return f"/fleet/{quote(name, safe='', errors='replace')}/{what}"


async def _post(args: argparse.Namespace, path: str, body: Any = None) -> Mapping[str, Any]:
    """What is given goes where it is said to go; what is kept, to this user's own fleet alone.

    Without a token only somebody else would do what is asked for, or would say so.
    """
    fleet = await find_fleet(args.fleet)
    given = args.token or os.environ.get(FLEET_TOKEN_VARIABLE)
    token = header_value("the fleet's token", given) if given else fleet.token
    async with fleet.client(COMMAND_TIMEOUT_S) as client:
        if not token:
            await client.get("/livez")
            raise RefusedError(f"there is no token for {fleet.url}", code="no_token", hint=NO_TOKEN)
        return await client.post(path, body, token)
