"""`ichat-lifecycle watch`: a worker's life as it goes on, on the whole screen or line by line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ichat_lifecycle.client.choose import choose_url
from ichat_lifecycle.client.documents import Entry, Gap, Status
from ichat_lifecycle.client.errors import GoneError, UnreachableError
from ichat_lifecycle.client.follow import Happening, Lost, follow
from ichat_lifecycle.client.logbook import DOCUMENTS, EVENTS, Logbook
from ichat_lifecycle.client.screen import Screen
from ichat_lifecycle.client.transport import ControlClient, Opened
from ichat_lifecycle.client.words import counted, day_and_clock, reason_in_short, told

POLL_S = 1.0
FRAME_S = 0.1  # between two frames at least: a replay of thousands of events is one frame
LAST_EVENTS_S = 2.0  # for what a worker that has gone has still said


async def watch_command(url: str | None, console: Console, *, whole_screen: bool) -> int:
    """Shows the worker at `url`, or the only one of this machine, until it has stopped; returns 0.

    Args:
        whole_screen: takes the terminal; else each event is a line.

    Raises:
        ArgumentsError: `url` is none, or there are several workers.
        UnreachableError, ForeignError: there is no worker at first.
    """
    async with ControlClient(await choose_url(url)) as client:
        status = await client.status()
        watching = _Watching(client, Logbook(client.url, status, time.monotonic))
        shown = _Picture(console, watching.book) if whole_screen else _Lines(console)
        await watching.run(shown)
    print_line(console, last_words(watching.book.status, client.url))
    return 0


def last_words(status: Status, url: str) -> str:
    """What is left to say of a worker that has stopped, the reason in full."""
    parts = [f"{status.model or 'the worker'} has stopped: {url} is gone"]
    if status.reason:
        parts += [reason_in_short(status.reason)]
        parts += [f"cause: {status.reason.root_cause}"] if status.reason.root_cause else []
        parts += [f"hint: {status.reason.hint}"] if status.reason.hint else []
    parts += [f"evidence: {status.evidence}"] if status.evidence else []
    return "; ".join(parts)


def print_line(console: Console, line: str) -> None:
    """As long as it is."""
    console.print(Text(line), soft_wrap=True)
    console.file.flush()


class _Lines:
    """Where there is no terminal: one line for each event."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def run(self) -> None:
        await asyncio.Event().wait()  # all is said as it happens

    def take(self, item: Happening) -> None:
        match item:
            case Entry():
                moment = day_and_clock(item.until)
                print_line(self._console, f"{moment}  {item.kind:<10}  {told(item).line}")
            case Gap():
                missing = counted(item.missing, "event")
                print_line(self._console, f"{missing} or fewer were dropped meanwhile")
            case Lost():
                print_line(self._console, f"no contact: {item.error.message}; trying again")
            case Opened():
                pass

    def refresh(self) -> None:
        """Lines stay as they are."""


class _Picture:
    """The whole screen, drawn anew when something has happened, and about once a second."""

    def __init__(self, console: Console, book: Logbook) -> None:
        self._console = console
        self._book = book
        self._news = asyncio.Event()

    async def run(self) -> None:
        live = Live(console=self._console, screen=True, auto_refresh=False)
        with live, self._hearing_the_terminal(live):
            while True:
                self._news.clear()
                live.update(Screen(self._book.scene()), refresh=True)
                await asyncio.sleep(FRAME_S)
                await _at_most(POLL_S - FRAME_S, self._news)

    def take(self, item: Happening) -> None:
        self.refresh()

    def refresh(self) -> None:
        self._news.set()

    @contextlib.contextmanager
    def _hearing_the_terminal(self, live: Live) -> Iterator[None]:
        """A new size is used at once, and Ctrl-Z leaves the shell a clean screen."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, self.refresh)
        loop.add_signal_handler(signal.SIGTSTP, self._pause, live)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            loop.remove_signal_handler(signal.SIGTSTP)

    def _pause(self, live: Live) -> None:
        live.stop()
        os.kill(os.getpid(), signal.SIGSTOP)  # until `fg`
        live.start()
        self.refresh()


async def _at_most(seconds: float, event: asyncio.Event) -> None:
    # Not wait_for(): before Python 3.12 a cancellation that comes with the event is lost in it.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class _Watching:
    """Asks and listens, and writes down what it hears."""

    def __init__(self, client: ControlClient, book: Logbook) -> None:
        self._client = client
        self.book = book
        self._ask_now = asyncio.Event()
        self._stream_lost = asyncio.Event()

    async def run(self, shown: _Lines | _Picture) -> None:
        """Until the worker has stopped."""
        works = (shown.run(), self._listen(shown), self._ask(shown))
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _listen(self, shown: _Lines | _Picture) -> None:
        async with contextlib.aclosing(follow(self._client)) as happenings:
            async for item in happenings:
                self._note(item)
                shown.take(item)

    def _note(self, item: Happening) -> None:
        match item:
            case Entry():
                self.book.take(item)
                if item.dest is not None:
                    self._ask_now.set()  # reason and progress are only in the document
            case Opened():
                self._stream_lost.clear()
                self.book.regain(EVENTS)
            case Lost():
                self._stream_lost.set()
                self._ask_now.set()
                self.book.lose(EVENTS, item.error)

    async def _ask(self, shown: _Lines | _Picture) -> None:
        """About once a second; returns when the worker has stopped and its port is gone."""
        while True:
            self._ask_now.clear()
            try:
                self.book.take_status(await self._client.status())
                self.book.regain(DOCUMENTS)
            except UnreachableError as error:
                if isinstance(error, GoneError) and self.book.ending:
                    await _at_most(LAST_EVENTS_S, self._stream_lost)
                    return
                self.book.lose(DOCUMENTS, error)
            shown.refresh()
            await asyncio.sleep(FRAME_S)
            await _at_most(POLL_S - FRAME_S, self._ask_now)
