"""A socket that outlives the worker: who answers on it, and when. Real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from on_loop import open_files
from stand_ins import NOON

from ichat_lifecycle.adapters import handed_socket
from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.handed_socket import HandedBinder, Handover, check_handed
from ichat_lifecycle.adapters.uvicorn_server import UvicornServer
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.ports import Address
from ichat_lifecycle.states import State

DEADLINE_S = 30
LIMITS = {"h11_max_incomplete_event_size": 1 << 20, "h11_max_header_count": 64}


class Worker:
    """The part of a worker that has to do with its socket; `name` is what it answers."""

    def __init__(self, fd: int, name: str, *, when_ready: bool = False) -> None:
        self.name = name
        self.state = State.PARSED
        self.release = asyncio.Event()
        self.release.set()
        self.gate = Gate(self._snapshot, self._app, lambda: 1)
        options = {"log_config": None, "timeout_graceful_shutdown": 1, **LIMITS}
        self.server = UvicornServer(self.gate, lambda: options, self)
        self.binder = HandedBinder(os.dup(fd), lambda: False)
        self.stop_hooks: list[Callable[[], None]] = [lambda: self.asked.append("hook")]
        self.asked: list[str] = []
        self.handover = Handover(self.binder, self.server, self, when_ready=when_ready)

    def ask_to_stop(self, cause: str, *, now: bool = False) -> None:
        """As a lifecycle's."""
        self.asked.append(f"{cause}, now" if now else cause)
        self.enter(State.STOPPING)

    async def build(self) -> Any:
        return self._app

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.name.encode()})

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.state, NOON, 0.0)

    def enter(self, state: State) -> None:
        self.state = state
        self.handover.changed(self._snapshot())

    async def up_to_bound(self) -> None:
        await self.server.open(await self.binder.bind(), lambda fault: None)
        self.enter(State.BOUND)

    async def up(self) -> None:
        await self.up_to_bound()
        self.gate.app = self._app
        self.enter(State.READY)

    async def down(self) -> None:
        if self.state is not State.STOPPING:
            self.enter(State.STOPPING)
        await self.server.drained()
        await self.server.close()
        await self.binder.release()


@contextlib.asynccontextmanager
async def handed() -> AsyncIterator[socket.socket]:
    """A listening socket that stays here, whoever it is handed to."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        async with asyncio.timeout(DEADLINE_S):
            yield sock


def url(sock: socket.socket) -> str:
    return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def ask(base: str) -> str:
    """The body of a 200, else the status; on a connection of its own."""
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        answer = await client.post(base, content=b"x")
    return answer.text if answer.status_code == 200 else str(answer.status_code)


def test_a_worker_answers_on_the_socket_from_bound_on() -> None:
    async def main() -> None:
        async with handed() as sock:
            worker = Worker(sock.fileno(), "only")
            assert worker.binder.bound is None
            await worker.up_to_bound()
            assert worker.binder.bound == Address("127.0.0.1", sock.getsockname()[1])
            assert await ask(url(sock)) == "503"
            worker.gate.app = worker._app
            worker.enter(State.READY)
            assert await ask(url(sock)) == "only"
            await worker.down()

    asyncio.run(main())


def test_it_reaches_itself_on_a_socket_of_its_own() -> None:
    """On the handed one another worker might answer its questions."""

    async def main() -> None:
        async with handed() as sock:
            old, new = Worker(sock.fileno(), "old"), Worker(sock.fileno(), "new", when_ready=True)
            await old.up()
            await new.up()
            inside = [worker.binder.inside for worker in (old, new)]
            for _ in range(5):
                assert [await ask(at.url) for at in inside if at] == ["old", "new"]
            await old.down()
            await new.down()

    asyncio.run(main())


def test_one_that_waits_until_it_is_ready_leaves_all_connections_to_the_other() -> None:
    async def main() -> None:
        async with handed() as sock:
            old, new = Worker(sock.fileno(), "old"), Worker(sock.fileno(), "new", when_ready=True)
            await old.up()
            await new.up_to_bound()
            assert {await ask(url(sock)) for _ in range(20)} == {"old"}
            new.gate.app = new._app
            new.enter(State.READY)
            old.enter(State.STOPPING)
            assert {await ask(url(sock)) for _ in range(20)} == {"new"}
            await old.down()
            assert await ask(url(sock)) == "new"
            await new.down()

    asyncio.run(main())


def test_the_socket_outlives_the_worker_and_keeps_who_waits() -> None:
    async def main() -> None:
        async with handed() as sock:
            first = Worker(sock.fileno(), "first")
            await first.up()
            await first.down()
            waiting = asyncio.create_task(ask(url(sock)))
            second = Worker(sock.fileno(), "second")
            await second.up()
            assert await waiting in ("second", "503")  # in BOUND, or in READY
            assert await ask(url(sock)) == "second"
            await second.down()

    asyncio.run(main())


def test_a_stop_lets_go_of_idle_connections_and_finishes_the_others() -> None:
    async def main() -> None:
        async with handed() as sock:
            old = Worker(sock.fileno(), "old")
            await old.up()
            async with httpx.AsyncClient(base_url=url(sock), timeout=DEADLINE_S) as idle:
                assert (await idle.post("/")).text == "old"
                old.release.clear()
                running = asyncio.create_task(ask(url(sock)))
                while not old.gate.in_flight:
                    await asyncio.sleep(0)
                old.enter(State.STOPPING)
                new = Worker(sock.fileno(), "new")
                await new.up()
                assert (await idle.post("/")).text == "new"
            old.release.set()
            assert await running == "old"
            await old.down()
            await new.down()

    asyncio.run(main())


def test_a_graceful_stop_serves_whoever_has_connected_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handed_socket, "LET_GO_S", 3600)

    async def main() -> None:
        async with handed() as sock:
            old = Worker(sock.fileno(), "old")
            await old.up()
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            while not old.server._server.server_state.connections:  # type: ignore[union-attr]
                await asyncio.sleep(0)
            old.handover.ask_to_stop("SIGTERM")
            assert old.asked == ["hook"], "the last resort counts from the signal on"
            new = Worker(sock.fileno(), "new")
            await new.up()
            await asyncio.sleep(0)
            assert await ask(url(sock)) == "new"
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"\r\nold\r\n" in await reader.read()  # chunked
            writer.close()
            await writer.wait_closed()
            await old.down()
            await new.down()

    asyncio.run(main())


def test_a_moment_after_the_socket_was_let_go_of_the_stop_begins() -> None:
    async def main() -> None:
        async with handed() as sock:
            worker = Worker(sock.fileno(), "only")
            await worker.up()
            worker.handover.ask_to_stop("SIGTERM")
            while worker.state is not State.STOPPING:
                await asyncio.sleep(0.01)
            assert worker.asked == ["hook", "SIGTERM"]
            await worker.down()

    asyncio.run(main())


@pytest.mark.parametrize(("state", "now"), [(State.BOUND, False), (State.READY, True)])
def test_a_stop_that_has_nobody_to_serve_begins_at_once(state: State, now: bool) -> None:
    async def main() -> None:
        async with handed() as sock:
            worker = Worker(sock.fileno(), "only")
            worker.handover.ask_to_stop("too early")
            worker.asked.clear()
            await worker.up_to_bound()
            worker.enter(state)
            worker.handover.ask_to_stop("SIGINT", now=now)
            assert worker.asked == ["SIGINT, now" if now else "SIGINT"]
            await worker.down()

    asyncio.run(main())


def test_nothing_stays_open_but_what_was_handed() -> None:
    async def main() -> None:
        async with handed() as sock:
            before = open_files()
            for when_ready in (False, True):
                worker = Worker(sock.fileno(), "only", when_ready=when_ready)
                await worker.up()
                await worker.down()
                await worker.binder.release()  # again
            assert open_files() == before

    asyncio.run(main())


def test_a_stop_right_after_the_beginning_leaves_nothing_accepting() -> None:
    async def main() -> None:
        async with handed() as sock:
            before = open_files()
            worker = Worker(sock.fileno(), "short")
            await worker.up_to_bound()
            await worker.down()
            assert open_files() == before

    asyncio.run(main())


def test_what_is_handed_is_told_by_its_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert check_handed(sock.fileno()) == Address("127.0.0.1", sock.getsockname()[1])
        assert sock.fileno() > 0  # still open
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        assert check_handed(unix.fileno()) == Address(uds=str(tmp_path / "s"))


def test_what_is_no_listening_socket_is_refused() -> None:
    with pytest.raises(ArgumentsError, match=r"--fd 4711: not an open socket \(Bad file desc"):
        check_handed(4711)
    with Path(os.devnull).open() as file, pytest.raises(ArgumentsError, match="not an open socket"):
        check_handed(file.fileno())
    with socket.socket() as deaf, pytest.raises(ArgumentsError, match="not a listening socket"):
        check_handed(deaf.fileno())
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(ArgumentsError, match="not a listening socket"),
    ):
        check_handed(datagrams.fileno())
