"""Which of the engine's processes printed a line, and the newest lines of each.

vLLM begins each line of its log with the process's name, as in "(EngineCore pid=123) INFO ...".
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable

from ichat_lifecycle.log_line import parse

LINES_KEPT = 500  # of each child
CHILDREN_KEPT = 64  # what comes from more of them counts as "engine"
# Of all children together: a line may have 16 KiB, and a client may have any name printed.
BYTES_KEPT = 8 * 2**20
NOBODY = "engine"  # what C libraries and uncaught errors print carries no name

_SAFE = re.compile(r"[A-Za-z][\w.-]{0,63}")  # a file's name is made of the name


def child_of(line: str) -> str:
    """The name of the process that printed a line, such as "Worker_TP0"; or "engine"."""
    name = parse(line).process
    return name if _SAFE.fullmatch(name) else NOBODY


def sort_by_child(lines: Iterable[str], kept: int = LINES_KEPT) -> dict[str, tuple[str, ...]]:
    """The newest `kept` lines of each child by its name, oldest first; at most CHILDREN_KEPT."""
    sorter = EngineLines(kept)
    for line in lines:
        sorter.append(line)
    return sorter.by_child


_Kept = tuple[int, float, str]  # a number that orders, when it arrived, the line


class _Child:
    """The newest lines of one child, and what they take in memory."""

    def __init__(self, kept: int) -> None:
        self.lines: deque[_Kept] = deque()
        self.bytes = 0
        self._kept = kept

    def append(self, kept: _Kept) -> None:
        self.lines.append(kept)
        self.bytes += sys.getsizeof(kept[-1])
        if len(self.lines) > self._kept:
            self.drop()

    def drop(self) -> None:
        """The oldest."""
        self.bytes -= sys.getsizeof(self.lines.popleft()[-1])


class EngineLines:
    """The newest lines of each child: a chatty worker does not push out the others' lines.

    One thread appends; any may read.

    Args:
        kept: lines per child; all together take at most BYTES_KEPT.
    """

    def __init__(self, kept: int = LINES_KEPT) -> None:
        self._kept = kept
        self._count = 0
        self._children: dict[str, _Child] = {}

    def append(self, line: str, at_s: float = 0.0) -> None:
        """Keep a line that arrived at this time, in seconds of any one clock."""
        name = child_of(line)
        if name not in self._children and len(self._children) >= CHILDREN_KEPT - 1:
            name = NOBODY
        self._count += 1
        if name not in self._children:
            self._children[name] = _Child(self._kept)
        self._children[name].append((self._count, at_s, line))
        # The one with the most loses: others' few lines are worth more.
        while sum(child.bytes for child in self._children.values()) > BYTES_KEPT:
            max(self._children.values(), key=lambda child: child.bytes).drop()

    @property
    def all(self) -> tuple[str, ...]:
        """The kept lines of all children, oldest first."""
        return self.since(float("-inf"))

    def since(self, at_s: float) -> tuple[str, ...]:
        """The kept lines of all children that arrived at this time or later, oldest first."""
        numbered = [kept for lines in self._copies().values() for kept in lines]
        return tuple(line for _, arrived_s, line in sorted(numbered) if arrived_s >= at_s)

    @property
    def by_child(self) -> dict[str, tuple[str, ...]]:
        """The kept lines of each child by its name, oldest first."""
        return {name: tuple(line for _, _, line in kept) for name, kept in self._copies().items()}

    def _copies(self) -> dict[str, list[_Kept]]:
        # Copied at one go (in C, with the interpreter's lock): a line may come at any time.
        return {name: list(child.lines) for name, child in list(self._children.items())}
