"""`GET /lifecycle/events` on a real socket: every entry, in order, and nobody is held up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from stand_ins import FakeIdentity, FakeLife

from ichat_lifecycle.control import events as control_events
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.journal import LIMITS, Kind, PhaseRecord, Snapshot
from ichat_lifecycle.states import State

AT = datetime(2026, 1, 2, tzinfo=UTC)
START = "5eed"
DEADLINE_S = 60.0


class Worker:
    """A journal with a control plane; writes from the test's own thread, as the writer does."""

    def __init__(self) -> None:
        self.life = FakeLife(Snapshot(State.BOUND, AT, 0.0))
        self.bell = Bell()
        self.plane = ControlPlane(
            self._app, "127.0.0.1", 0, None, lambda url: None, self.bell.close
        )

    def _app(self) -> Any:
        events = Events(self.life.journal, START, self.bell)
        return build_control_app(self.life, FakeIdentity(), events=events)

    def note(self, phase: str, kind: Kind = Kind.PHASE) -> None:
        self.life.journal.add(kind, PhaseRecord(AT, phase, None, 0.0))
        self.bell.ring()


def with_worker(scenario: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        worker = Worker()
        await worker.plane.start()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(worker)
        finally:
            await worker.plane.stop()

    asyncio.run(main())


@dataclass
class Event:
    id: str = ""
    event: str = ""
    data: str = ""
    comment: str = ""

    @property
    def phase(self) -> str:
        return str(json.loads(self.data)["phase"])


class Reader:
    """A client of the stream, an event at a time."""

    def __init__(
        self, worker: Worker, last_event_id: str | None = None, after: str | None = None
    ) -> None:
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._client = httpx.AsyncClient(base_url=worker.plane.url, timeout=DEADLINE_S)
        self._request = self._client.build_request(
            "GET", "/lifecycle/events", headers=headers, params={"after": after} if after else {}
        )

    async def __aenter__(self) -> Reader:
        self.response = await self._client.send(self._request, stream=True)
        self._lines = self.response.aiter_lines()
        assert (await self.next()) == Event()  # `retry:`, which says nothing to us
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.response.aclose()
        await self._client.aclose()

    async def next(self) -> Event | None:
        """The next event, or None at the end."""
        event = Event()
        async for line in self._lines:
            if not line:
                return event
            name, _, value = line.partition(": ")
            setattr(event, name or "comment", value)
        return None

    async def phases(self, count: int) -> list[str]:
        return [event.phase for _ in range(count) if (event := await self.next()) is not None]


def test_what_has_happened_comes_first_and_then_what_happens() -> None:
    async def scenario(worker: Worker) -> None:
        worker.note("importing")
        async with Reader(worker) as reader:
            assert reader.response.headers["content-type"].startswith("text/event-stream")
            first = await reader.next()
            assert first is not None
            assert (first.id, first.event) == (f"{START}-1", "phase")
            assert json.loads(first.data) == worker.life.journal.since(0)[0].as_dict()
            for phase in ("loading_weights", "warm_up"):
                worker.note(phase)
                assert await reader.phases(1) == [phase]

    with_worker(scenario)


@pytest.mark.parametrize(
    ("last_event_id", "phases"),
    [
        (f"{START}-2", ["c"]),
        (f"{START}-0", ["a", "b", "c"]),
        ("another-2", ["a", "b", "c"]),  # of the worker's life before this one
        ("2", ["a", "b", "c"]),
        (f"{START}-x", ["a", "b", "c"]),
        (f"{START}-999", []),
        ("-", ["a", "b", "c"]),
    ],
)
def test_a_reader_that_comes_again_gets_what_it_has_not_had(
    last_event_id: str, phases: list[str]
) -> None:
    async def scenario(worker: Worker) -> None:
        for phase in ("a", "b", "c"):
            worker.note(phase)
        async with Reader(worker, last_event_id) as reader:
            worker.note("d")
            assert await reader.phases(len(phases) + 1) == [*phases, "d"]

    with_worker(scenario)


def test_who_cannot_send_a_header_says_it_in_the_address() -> None:
    async def scenario(worker: Worker) -> None:
        for phase in ("a", "b", "c"):
            worker.note(phase)
        async with Reader(worker, after=f"{START}-2") as reader:
            assert await reader.phases(1) == ["c"]
        # A browser comes again with the header, to the same address.
        async with Reader(worker, f"{START}-1", after=f"{START}-2") as reader:
            assert await reader.phases(2) == ["b", "c"]

    with_worker(scenario)


def test_the_newest_id_is_where_a_reader_goes_on() -> None:
    async def scenario(worker: Worker) -> None:
        events = Events(worker.life.journal, START, worker.bell)
        async with Reader(worker, after=events.last_id()) as reader:
            worker.note("a")
            assert await reader.phases(1) == ["a"]
        async with Reader(worker, after=events.last_id()) as reader:
            worker.note("b")
            assert await reader.phases(1) == ["b"]

    with_worker(scenario)


def test_a_long_story_comes_in_few_writes_and_is_written_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred readers that come at once get all that has happened: each write counts."""
    worker, written = Worker(), 0

    def count(self: PhaseRecord) -> dict[str, Any]:
        nonlocal written
        written += 1
        return {"phase": self.phase}

    monkeypatch.setattr(PhaseRecord, "as_dict", count)
    events = Events(worker.life.journal, START, worker.bell)
    at_once = control_events.AT_ONCE
    for number in range(2 * at_once + 1):
        worker.note(str(number))
    worker.bell.close()

    async def read() -> list[str]:
        return [str(chunk) async for chunk in events.response(None).body_iterator]

    for _ in range(3):
        _, *chunks = asyncio.run(read())
        assert [chunk.count("event: ") for chunk in chunks] == [at_once, at_once, 1]
        ids = [line for line in "".join(chunks).splitlines() if line.startswith("id: ")]
        assert ids == [f"id: {START}-{n + 1}" for n in range(written)]
    assert written == len(ids)


def test_one_that_was_away_for_too_long_is_told_that_something_is_missing() -> None:
    async def scenario(worker: Worker) -> None:
        for number in range(LIMITS[Kind.VERDICT] + 3):
            worker.note(str(number), Kind.VERDICT)
        async with Reader(worker, f"{START}-1") as reader:
            gap, first = await reader.next(), await reader.next()
        assert gap is not None and first is not None
        assert (gap.event, json.loads(gap.data)) == ("gap", {"after": 1, "to": 3})
        assert first.id == f"{START}-4"
        async with Reader(worker) as reader:
            newcomer = await reader.next()
            assert newcomer is not None
            assert newcomer.event == "verdict"  # it has missed nothing

    with_worker(scenario)


def test_a_quiet_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_events, "KEEP_ALIVE_S", 0.05)

    async def scenario(worker: Worker) -> None:
        async with Reader(worker) as reader:
            for _ in range(3):
                assert await reader.next() == Event(comment="keep-alive")
            worker.note("a")
            event = await reader.next()
            while event == Event(comment="keep-alive"):
                event = await reader.next()
            assert event is not None
            assert event.phase == "a"

    with_worker(scenario)


def test_the_end_of_the_control_plane_ends_the_streams_after_all_that_has_happened() -> None:
    async def scenario(worker: Worker) -> None:
        async with Reader(worker) as reader:
            worker.note("a")
            assert await reader.phases(1) == ["a"]
            worker.life.journal.add(Kind.PHASE, PhaseRecord(AT, "last", None, 0.0))  # no ring
            await worker.plane.stop()
            assert await reader.phases(1) == ["last"]
            assert await reader.next() is None

    with_worker(scenario)


def test_readers_that_do_not_read_hold_nobody_up() -> None:
    async def scenario(worker: Worker) -> None:
        address = worker.plane.address
        stalled = [socket.create_connection(address) for _ in range(50)]
        for sock in stalled:
            sock.sendall(b"GET /lifecycle/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with Reader(worker) as reader:
            for number in range(2000):
                worker.note(f"{number:>1000}")
            # Beyond what the journal keeps of this kind, the newest count.
            last = None
            while last is None or last.phase.strip() != "1999":
                last = await reader.next()
                assert last is not None
        async with httpx.AsyncClient(base_url=worker.plane.url, timeout=DEADLINE_S) as client:
            assert (await client.get("/livez")).status_code == 200
        for sock in stalled:
            sock.close()

    with_worker(scenario)


def test_many_writes_before_anybody_looks_wake_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pace of the writer, the readers' loop gets one callback at a time."""

    async def main() -> None:
        bell = Bell()
        bell.ring()  # nobody listens yet
        bell.listen()
        loop = asyncio.get_running_loop()
        calls = 0
        original = loop.call_soon_threadsafe

        def count(*args: Any, **more: Any) -> asyncio.Handle:
            nonlocal calls
            calls += 1
            return original(*args, **more)

        def ring() -> None:
            for _ in range(1000):
                bell.ring()

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        waiting = asyncio.ensure_future(bell.wait(DEADLINE_S))
        await asyncio.sleep(0)
        thread = threading.Thread(target=ring)
        thread.start()
        thread.join()
        assert calls == 1
        assert await waiting
        bell.ring()
        assert calls == 2

    asyncio.run(main())


def test_a_bell_whose_loop_has_closed_is_silent() -> None:
    bell = Bell()

    async def main() -> None:
        bell.listen()

    asyncio.run(main())
    bell.ring()
