"""A program: the two ports of a worker without an engine, under a limit on open files.

    python limited_worker.py OPEN_FILES

It prints both ports as JSON. Each line on stdin is a command: `exhaust` opens files until there are
no more, `release` closes them; each is answered by a line. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
from datetime import UTC, datetime
from typing import Any

import structlog
from stand_ins import FakeIdentity, FakeLife

from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.refusal import App
from ichat_lifecycle.adapters.uvicorn_server import UvicornServer
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.states import State


class NoApp:
    async def build(self) -> App:
        raise AssertionError("there is no engine")


def make_app() -> Any:
    return build_control_app(FakeLife(), FakeIdentity())


async def main(open_files: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    control = ControlPlane(make_app, "127.0.0.1", 0, None, lambda url: None)
    snapshot = Snapshot(State.BOUND, datetime.now(UTC), 0.0)
    gate = Gate(lambda: snapshot, make_app(), lambda: 1)
    server = UvicornServer(gate, lambda: {"log_config": None}, NoApp())
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    await control.start()
    await server.open(sock, lambda fault: sys.exit(f"fault: {fault}"))
    say({"main": sock.getsockname()[1], "control": control.address[1]})
    held: list[int] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() == "exhaust":
            exhaust(held)
        else:
            while held:
                os.close(held.pop())
        say({})
    await server.close()
    await control.stop()


def exhaust(held: list[int]) -> None:
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return


def say(document: Any) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )  # not among answers
    asyncio.run(main(int(sys.argv[1])))
