"""The commands to a fleet that runs: what each does with its arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.client.commands import in_order
from ichat_lifecycle.client.fleets import Supervisor, find_fleet
from ichat_lifecycle.credentials import header_value
from ichat_lifecycle.errors import ArgumentsError

TIMEOUT_S = 200.0  # a reload asks vLLM's parser


class RefusedError(ArgumentsError):
    """The supervisor has said no (exit 2)."""


Command = Callable[[argparse.Namespace], int]


def _in_order(command: Command) -> Command:
    return lambda args: in_order(lambda: command(args))


@_in_order
def reload(args: argparse.Namespace) -> int:
    done = _post(args, "/fleet/reload")
    said = {what: ", ".join(done[what]) for what in ("started", "replaced", "removed", "renewed")}
    told = "; ".join(f"{what} {names}" for what, names in said.items() if names)
    print(told or "nothing has changed")
    return 0


@_in_order
def stop(args: argparse.Namespace) -> int:
    if bool(args.name) == args.all:
        raise ArgumentsError("stop: give a NAME, or --all")
    path = "/fleet/stop" if args.all else _path(args.name, "stop")
    _post(args, path, {"now": True} if args.now else None)
    return 0


@_in_order
def restart(args: argparse.Namespace) -> int:
    _post(args, _path(args.name, "restart"))
    return 0


@_in_order
def logs(args: argparse.Namespace) -> int:
    fleet = find_fleet(args.fleet)
    try:
        path, query = _path(args.name, "logs"), {"lines": args.lines, "follow": args.follow}
        _print_lines(fleet, path, query)
    except httpx.HTTPError as error:
        raise fleet.unreachable(error) from error
    return 0


def _path(name: str, what: str) -> str:
    """A name is one part of it, whatever it is made of."""
    return f"/fleet/{quote(name, safe='', errors='replace')}/{what}"


def _print_lines(fleet: Supervisor, path: str, query: Mapping[str, Any]) -> None:
    """Raises RefusedError, httpx.HTTPError."""
    timeout = httpx.Timeout(TIMEOUT_S, read=None)
    with (
        fleet.client(TIMEOUT_S) as client,
        client.stream("GET", path, params=query, timeout=timeout) as answer,
    ):
        if answer.is_error:
            answer.read()
            raise _refused(answer)
        for line in answer.iter_lines():
            print(line, flush=True)


def _post(args: argparse.Namespace, path: str, body: Any = None) -> Mapping[str, Any]:
    fleet = find_fleet(args.fleet)
    given = args.token or os.environ.get(FLEET_TOKEN_VARIABLE) or fleet.token
    # One that cannot be sent would stand in the error of whoever tries.
    token = header_value("the fleet's token", given or "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with fleet.client(TIMEOUT_S) as client:
            answer = client.post(path, json=body, headers=headers)
    except httpx.HTTPError as error:
        raise fleet.unreachable(error) from error
    if answer.is_error:
        raise _refused(answer)
    document: Mapping[str, Any] = answer.json()
    return document


def _refused(answer: httpx.Response) -> RefusedError:
    try:
        document = answer.json()
        error = document["error"]
    except (ValueError, KeyError, TypeError):
        return RefusedError(f"the supervisor answers {answer.status_code}")
    refused = RefusedError(error["message"], code=error["code"], hint=error.get("hint"))
    refused.told = document.get("problems", ())
    return refused
