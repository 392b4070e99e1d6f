"""Numbers and states as characters, each chart in exactly the width that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ichat_lifecycle.states import State

BARS = " ▁▂▃▄▅▆▇█"
MISSED = "x"
LEVELS = len(BARS) - 1

# Told apart without colour, too. What matters more is seen where two share a cell.
CELLS = {
    State.STOPPED: " ",
    State.READY: "█",
    State.PARSED: "·",
    State.SERVING: "▓",
    State.ENGINE_UP: "▒",
    State.BOUND: "░",
    State.STOPPING: "▁",
    State.DEGRADED: "▞",
}
_WEIGHT = {state: weight for weight, state in enumerate(CELLS)}


@dataclass(frozen=True, slots=True)
class Stay:
    """A state from `begin_s` to `end_s`, in seconds since the beginning of the life."""

    state: State
    begin_s: float
    end_s: float


def sparkline(values: Sequence[float | None], width: int, rows: int = 1) -> list[str]:
    """The newest values as bars from zero, the newest at the right end; top row first.

    None is drawn as MISSED. The highest bar is the greatest value that is shown.
    """
    shown = list(values[-width:]) if width > 0 else []
    top = max((value for value in shown if value is not None), default=0.0)
    heights = [_height(value, top, rows) for value in shown]
    return [
        "".join(
            (MISSED if row == 0 else " ")
            if height is None
            else BARS[min(LEVELS, max(0, height - row * LEVELS))]
            for height in heights
        ).rjust(width)
        for row in reversed(range(rows))
    ]


def _height(value: float | None, top: float, rows: int) -> int | None:
    if value is None:
        return None
    # At least one: an answer is there, however quick it was.
    return max(1, math.ceil(value / top * LEVELS * rows)) if top > 0 else 1


def strip(stays: Sequence[Stay], width: int) -> list[State]:
    """One state for each cell: of those it covers, the one that matters most."""
    if not stays or width <= 0:
        return []
    begin_s, length_s = stays[0].begin_s, max(stays[-1].end_s - stays[0].begin_s, 1e-9)
    cells: list[State | None] = [None] * width
    for stay in stays:
        first = min(max(0, int((stay.begin_s - begin_s) / length_s * width)), width - 1)
        last = math.ceil((stay.end_s - begin_s) / length_s * width)
        for cell in range(first, min(max(last, first + 1), width)):
            cells[cell] = _worse(cells[cell], stay.state)
    return [cell or stays[-1].state for cell in cells]


def _worse(one: State | None, other: State) -> State:
    return other if one is None else max(one, other, key=_WEIGHT.__getitem__)


def waterfall(begin_s: float, end_s: float, total_s: float, width: int) -> str:
    """A bar from `begin_s` to `end_s` on a line of `total_s` seconds; one cell at least."""
    per_s = width / max(total_s, 1e-9)
    first = min(max(0, int(begin_s * per_s)), max(0, width - 1))
    cells = min(width, max(1, round(end_s * per_s) - first))
    return (" " * first + "━" * cells)[:width].ljust(width)


def meter(fraction: float, width: int) -> str:
    """A line of which `fraction` (0 to 1) is full."""
    full = int(min(1.0, max(0.0, fraction)) * width)
    return "━" * full + "─" * (width - full)
