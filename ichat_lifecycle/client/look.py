"""Colours of states, and a console that can say what it has to wherever it is."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from ichat_lifecycle.states import State

STATE_STYLE = {
    State.PARSED: "cyan",
    State.BOUND: "cyan",
    State.ENGINE_UP: "cyan",
    State.SERVING: "cyan",
    State.READY: "green",
    State.DEGRADED: "yellow",
    State.STOPPING: "magenta",
    State.STOPPED: "magenta",
}
BAD = "bold red"
FAINT = "dim"

# Wide enough for anything: what is read by programs is neither wrapped nor cut.
UNLIMITED = 100_000

# For terminals that cannot show more than ASCII; one for one, so that columns stay columns.
_ASCII = str.maketrans("→⇄·…▸━─█▓▒░▞▁▂▃▄▅▆▇", ">~-.>=-#%:.!_.,-=+*")


class PlainStream:
    """A text stream that replaces what its encoding does not have instead of failing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding
        plain = text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
        return self._stream.write(plain)


def console_for(stream: TextIO) -> Console:
    """A console that writes to `stream`: as wide as the terminal, unlimited where it is none."""
    unicode = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    file: Any = stream if unicode else PlainStream(stream)
    width = None if stream.isatty() else UNLIMITED
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def state_text(state: State, *, ready: bool) -> Text:
    """A state in its colour; a READY worker that is not ready is in nobody's."""
    wrong = state is State.READY and not ready
    return Text(state.value, BAD if wrong else f"bold {STATE_STYLE[state]}")
