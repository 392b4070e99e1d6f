"""How deep a value of lists and dicts is. Without recursion: a stranger's value exhausts that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def is_flat(value: Any, depth: int) -> bool:
    """Whether no more than `depth` containers stand within each other."""
    level = list(_containers([value]))
    for _ in range(depth):
        level = [inner for one in level for inner in _containers(_inside(one))]
        if not level:
            return True
    return not level


def _inside(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _containers(values: Any) -> Iterator[Any]:
    return (value for value in values if isinstance(value, dict | list))
