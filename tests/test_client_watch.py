"""`ichat-lifecycle watch` on a real control plane: live, through losses, to the worker's end."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from client_worker import LiveWorker, http_answer, lived, nobody, something_else
from on_loop import eventually
from rich.console import Console

from ichat_lifecycle.client import watch as client_watch
from ichat_lifecycle.client.documents import Entry, Gap, Status
from ichat_lifecycle.client.errors import ForeignError, GoneError
from ichat_lifecycle.client.follow import Lost, follow
from ichat_lifecycle.client.look import console_for
from ichat_lifecycle.client.transport import ControlClient, Opened
from ichat_lifecycle.client.watch import watch_command
from ichat_lifecycle.journal import Reason
from ichat_lifecycle.ports import VerdictKind
from ichat_lifecycle.states import Trigger

ALTERNATE, NORMAL, HOME = "\x1b[?1049h", "\x1b[?1049l", "\x1b[H"
LONG_S = 50.0
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Watcher:
    """A watch that is under way, and what it has written so far."""

    def __init__(self, worker_url: str, *, terminal: bool) -> None:
        self.stream = io.StringIO()
        console = console_for(self.stream)
        if terminal:
            console = Console(file=self.stream, force_terminal=True, width=80, height=24)
        work = watch_command(worker_url, console, whole_screen=terminal)
        self.task = asyncio.ensure_future(work)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def screen(self) -> str:
        """The newest frame without its colours."""
        return re.sub(r"\x1b\[[\d;?]*\w", "", self.text.rpartition(HOME)[2])

    async def sees(self, text: str) -> None:
        def seen() -> bool:
            return text in (self.screen if HOME in self.text else self.text)

        await eventually(lambda: seen() or self.task.done())
        assert seen(), self.task.exception()


@contextlib.asynccontextmanager
async def watching(worker_url: str, *, terminal: bool) -> AsyncIterator[Watcher]:
    watcher = Watcher(worker_url, terminal=terminal)
    try:
        yield watcher
    finally:
        watcher.task.cancel()
        await asyncio.gather(watcher.task, return_exceptions=True)


# --- the events, for as long as one likes


def test_a_lost_stream_goes_on_where_it_was() -> None:
    async def scenario() -> None:
        async with (
            LiveWorker() as worker,
            ControlClient(worker.url) as client,
            contextlib.aclosing(follow(client)) as events,
        ):
            worker.story.fire(Trigger.BIND)
            heard = [await anext(events) for _ in range(3)]
            assert heard[0] == Opened()
            worker.hang_up()
            assert isinstance(await anext(events), Lost)
            worker.story.phase("loading_weights")
            assert await anext(events) == Opened()
            again = await anext(events)
            assert isinstance(again, Entry)
            assert again.text("phase") == "loading_weights", "the rest was heard already"

    lived(scenario)


def test_the_pauses_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def no_sleep(seconds: float) -> None:
        slept.append(seconds)

    async def scenario() -> None:
        with nobody() as url:
            async with ControlClient(url) as client, contextlib.aclosing(follow(client)) as events:
                losses = [await anext(events) for _ in range(6)]
        assert [lost.retry_s for lost in losses if isinstance(lost, Lost)] == [1, 2, 4, 8, 10, 10]
        assert slept == [1, 2, 4, 8, 10]

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "sleep", no_sleep)
        lived(scenario)


# --- the whole screen


def test_the_screen_follows_the_worker() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker, watching(worker.url, terminal=True) as watcher:
            await watcher.sees("[PARSED]")
            worker.story.fire(Trigger.BIND).phase("loading_weights")
            await watcher.sees("[BOUND]")
            await watcher.sees("▸ loading weights")  # from a document, not from an event
            for trigger in (Trigger.START_ENGINE, Trigger.SERVE, Trigger.BECOME_READY):
                worker.story.fire(trigger)
            await watcher.sees("SERVING → READY by become_ready")
            worker.story.verdict(VerdictKind.IDLE, 0.0123)
            await watcher.sees("12 ms; median 12 ms")
            worker.story.identity.in_flight = 7  # no event tells that
            await watcher.sees("7 in flight")
            worker.story.fire(Trigger.DEGRADE, Reason("asleep", "it sleeps", hint="wake it"))
            await watcher.sees("Hint     wake it")

    lived(scenario)


def test_the_terminal_is_taken_and_given_back() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker, watching(worker.url, terminal=True) as watcher:
            await watcher.sees("[PARSED]")
            assert watcher.text.index(ALTERNATE) < watcher.text.index("demo")
            assert HIDE in watcher.text
            watcher.task.cancel()
            await asyncio.gather(watcher.task, return_exceptions=True)
            assert watcher.text.rindex(NORMAL) > watcher.text.rindex("demo")
            assert watcher.text.rindex(SHOW) > watcher.text.rindex(HIDE)

    lived(scenario)


def test_an_end_that_comes_together_with_news_is_not_lost() -> None:
    """Ctrl-C cancels, and news wakes, in the same step of the loop."""

    async def scenario() -> None:
        news = asyncio.Event()
        waiting = asyncio.ensure_future(client_watch._at_most(LONG_S, news))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        news.set()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    lived(scenario)


def test_nothing_is_wiped_between_two_frames() -> None:
    """That is what flickers: each frame is written over the one before."""

    async def scenario() -> None:
        async with LiveWorker() as worker, watching(worker.url, terminal=True) as watcher:
            await watcher.sees("[PARSED]")
            begin = len(watcher.text)
            worker.story.fire(Trigger.BIND)
            await watcher.sees("[BOUND]")
            for code in ("\x1b[2J", "\x1b[J", "\x1b[K", "\x1b[2K"):
                assert code not in watcher.text[begin:]
            frame = watcher.text[begin:].split(HOME)[-1]
            assert frame.count("\n") == 23

    lived(scenario)


def test_lost_contact_is_told_and_found_again() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.serving()
            async with watching(worker.url, terminal=True) as watcher:
                await watcher.sees("[READY]")
                await worker.stop()
                await watcher.sees("no contact for")
                await watcher.sees("(stale)")
                await watcher.sees("connection refused")
                async with LiveWorker(port=worker.port, start_id="second", model="again"):
                    await watcher.sees("again")
                    await watcher.sees("[PARSED]")
                    await eventually(lambda: "no contact" not in watcher.screen)
                    assert "become_ready" not in watcher.screen, "that was another life"

    lived(scenario)


def test_a_worker_that_has_stopped_ends_the_watch() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.serving()
            async with watching(worker.url, terminal=True) as watcher:
                await watcher.sees("[READY]")
                reason = Reason("engine_died", "it died", "SIGSEGV", "look at dmesg")
                worker.story.recorder.publish(evidence="/var/evidence")
                worker.story.fire(Trigger.STOP, reason, "it died")
                await watcher.sees("Reason   engine_died")
                await worker.stop()
                assert await watcher.task == 0
                assert (
                    watcher.text.rpartition(NORMAL)[2]
                    .strip()
                    .endswith(
                        f"demo has stopped: {worker.url} is gone; engine_died: it died; "
                        "cause: SIGSEGV; hint: look at dmesg; evidence: /var/evidence"
                    )
                )

    lived(scenario)


def test_the_reason_of_a_change_is_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No event has it, and the next regular question may be far."""
    monkeypatch.setattr(client_watch, "POLL_S", 3600.0)

    async def scenario() -> None:
        async with LiveWorker() as worker, watching(worker.url, terminal=True) as watcher:
            await eventually(lambda: worker.readers > 0)
            await watcher.sees("[PARSED]")
            worker.story.serving()
            await watcher.sees("[READY]")
            worker.story.fire(Trigger.DEGRADE, Reason("asleep", "it sleeps", hint="wake it"))
            await watcher.sees("Hint     wake it")

    lived(scenario)


# --- where there is no terminal


def test_without_a_terminal_each_event_is_a_line() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.fire(Trigger.BIND)
            async with watching(worker.url, terminal=False) as watcher:
                await watcher.sees("PARSED → BOUND by bind")
                worker.story.verdict(VerdictKind.IDLE, 0.002)
                worker.story.fire(Trigger.STOP, cause="SIGTERM " + "x" * 300)
                await watcher.sees("→ STOPPING")
                await worker.stop()
                assert await watcher.task == 0
        lines = watcher.text.splitlines()
        shown = [
            line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  ", line)
        ]
        assert [line.split()[2] for line in shown] == [
            "phase",
            "transition",
            "verdict",
            "transition",
        ]
        assert shown[-1].endswith("x" * 300), "neither cut nor folded"
        assert lines[-1].startswith("demo has stopped")
        assert "\x1b" not in watcher.text

    lived(scenario)


class Slow(ControlClient):
    """A client whose stream is behind: the last event comes once the port is known to be gone."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gone = asyncio.Event()

    async def status(self) -> Status:
        try:
            return await super().status()
        except GoneError:
            self.gone.set()
            raise

    async def events(
        self, last_id: str | None = None
    ) -> AsyncGenerator[Opened | Entry | Gap, None]:
        async for item in super().events(last_id):
            if isinstance(item, Entry) and item.kind == "stage":
                await self.gone.wait()
                for _ in range(100):
                    await asyncio.sleep(0)  # everybody else first
            yield item


def test_what_comes_after_the_port_is_gone_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_watch, "ControlClient", Slow)
    test_what_a_worker_says_last_is_not_lost()


def test_what_a_worker_says_last_is_not_lost() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.serving().fire(Trigger.STOP)
            async with watching(worker.url, terminal=False) as watcher:
                await watcher.sees("STOPPING")
                worker.story.stage("release control plane", 0.2)
                await worker.stop()
                assert await watcher.task == 0
                assert "release control plane done in 200 ms" in watcher.text

    lived(scenario)


# --- and where there is no worker


def test_nobody_or_something_else_is_told_at_once() -> None:
    async def scenario() -> None:
        console = console_for(io.StringIO())
        with nobody() as url, pytest.raises(GoneError):
            await watch_command(url, console, whole_screen=True)
        other = http_answer("200 OK", "application/json", b"{}")
        async with something_else(other) as url:
            with pytest.raises(ForeignError, match="no state"):
                await watch_command(url, console, whole_screen=True)

    lived(scenario)


def test_something_else_in_the_workers_place_ends_the_watch() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker, watching(worker.url, terminal=True) as watcher:
            await watcher.sees("[PARSED]")
            await worker.stop()
            port = worker.port
            foreign = http_answer("404 Not Found", "text/html", b"")
            async with something_else(foreign, port):
                with pytest.raises(ForeignError, match="answers 404"):
                    await watcher.task
            assert watcher.text.rindex(NORMAL) > watcher.text.rindex(ALTERNATE)

    lived(scenario)
