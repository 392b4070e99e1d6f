"""Live views, for people who start a worker or a fleet in a terminal."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from ichat_lifecycle.adapters.console_lines import CODES
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.printable import one_line, plain

REFRESH_PER_S = 8
_COLORS = re.compile(f"({'|'.join(map(re.escape, CODES))})")


class LiveStream:
    """Something that moves at the bottom of a terminal; log lines scroll above it.

    It is also the stream that log lines are written to, and a context manager: its end leaves
    nothing of it on the screen.

    Args:
        render: what is shown now.
    """

    def __init__(
        self,
        stream: TextIO,
        render: Callable[[], RenderableType],
        refresh_per_s: float = REFRESH_PER_S,
    ) -> None:
        self._console = Console(file=stream, soft_wrap=True)
        self._live = Live(
            get_renderable=render,
            console=self._console,
            refresh_per_second=refresh_per_s,
            transient=True,
            # Theirs go through the log's writer (see printed), which does not wait for a terminal.
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def write(self, text: str) -> int:
        """Lines of the log. Of terminal sequences only the log's own colors are obeyed."""
        for line in text.rstrip("\n").split("\n"):
            self._console.print(_colored(line))
        return len(text)

    def flush(self) -> None:
        self._console.file.flush()

    def isatty(self) -> bool:
        return True


class LiveView(LiveStream):
    """A line that moves while a worker is not READY."""

    def __init__(
        self, stream: TextIO, snapshot: Callable[[], Snapshot], clock: Callable[[], float]
    ) -> None:
        self._snapshot = snapshot
        self._clock = clock
        self._spinner = Spinner("dots")
        self._ended = False
        super().__init__(stream, self._line)

    def changed(self, snapshot: Snapshot) -> None:
        """A listener: the view ends with the load."""
        if snapshot.ever_ready and not self._ended:
            self._ended = True
            # Not on the loop: it writes, and a terminal can be stopped with Ctrl-S.
            threading.Thread(target=self._live.stop, name="live view", daemon=True).start()

    def _line(self) -> Spinner:
        self._spinner.update(text=Text(describe(self._snapshot(), self._clock())))
        return self._spinner


def _colored(line: str) -> Text:
    """What stands between our own color codes is text, whatever it holds."""
    parts = (part if at % 2 else plain(part) for at, part in enumerate(_COLORS.split(line)))
    return Text.from_ansi("".join(parts))


def describe(snapshot: Snapshot, mono_s: float) -> str:
    """One line: state, phase, elapsed and expected time."""
    progress = snapshot.progress
    end = progress.ended_mono_s if progress.ended_mono_s is not None else mono_s
    elapsed = max(0.0, end - progress.began_mono_s)
    phase = one_line(progress.phase).replace("_", " ")
    fraction = f" {progress.fraction:.0%}" if progress.fraction is not None else ""
    expected = progress.expected_s
    of = f" of about {expected:.0f} s" if expected else " s"
    return f"{snapshot.state.value}: {phase}{fraction}, {elapsed:.0f}{of}"
