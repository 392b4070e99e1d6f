"""Which of the engine's processes printed a line, and the newest lines of each.

vLLM begins each line of its log with the process's name, as in "(EngineCore pid=123) INFO ...".
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

LINES_KEPT = 500  # of each child
CHILDREN_KEPT = 64  # what comes from more of them counts as "engine"
NOBODY = "engine"  # what C libraries and uncaught errors print carries no name

# After what VLLM_LOGGING_PREFIX may have put before it. A file's name is made of the name.
_CHILD = re.compile(r"^[^()]{0,40}\((?P<name>[A-Za-z][\w.-]{0,63}) pid=\d+\)")


def child_of(line: str) -> str:
    """The name of the process that printed a line, such as "Worker_TP0"; or "engine"."""
    match = _CHILD.match(line)
    return match["name"] if match else NOBODY


def sort_by_child(lines: Iterable[str], kept: int = LINES_KEPT) -> dict[str, tuple[str, ...]]:
    """The newest `kept` lines of each child by its name, oldest first; at most CHILDREN_KEPT."""
    sorter = EngineLines(kept)
    for line in lines:
        sorter.append(line)
    return sorter.by_child


class EngineLines:
    """The newest lines of each child: a chatty worker does not push out the others' lines.

    One thread appends; any may read.

    Args:
        kept: lines per child.
    """

    def __init__(self, kept: int = LINES_KEPT) -> None:
        self._kept = kept
        self._count = 0
        self._children: dict[str, deque[tuple[int, str]]] = {}

    def append(self, line: str) -> None:
        name = child_of(line)
        if name not in self._children and len(self._children) >= CHILDREN_KEPT - 1:
            name = NOBODY
        self._count += 1
        self._children.setdefault(name, deque(maxlen=self._kept)).append((self._count, line))

    @property
    def all(self) -> tuple[str, ...]:
        """The kept lines of all children, oldest first."""
        numbered = [pair for lines in self._copies().values() for pair in lines]
        return tuple(line for _, line in sorted(numbered))

    @property
    def by_child(self) -> dict[str, tuple[str, ...]]:
        """The kept lines of each child by its name, oldest first."""
        return {name: tuple(line for _, line in kept) for name, kept in self._copies().items()}

    def _copies(self) -> dict[str, list[tuple[int, str]]]:
        # Copied at one go (in C, with the interpreter's lock): a line may come at any time.
        return {name: list(kept) for name, kept in list(self._children.items())}
