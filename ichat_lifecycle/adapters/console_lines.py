"""Log lines for people: when, how bad, who, what; no wider than WIDTH where words allow it."""

from __future__ import annotations

import textwrap
from collections.abc import MutableMapping
from typing import Any

from ichat_lifecycle.printable import one_line, plain

WIDTH = 130  # columns
_INDENT = " " * 4  # of what follows the first line, also of a text that brings lines of its own
_LEVEL_WIDTH, _SOURCE_WIDTH = 8, 11
_SOURCE_LIMIT = 64  # characters; an engine's line names its process itself
_OURS = "lifecycle"
_RESET, _FAINT = "\x1b[0m", "\x1b[2m"
_STYLES = {
    "debug": "\x1b[36m",
    "info": "\x1b[32m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
    "critical": "\x1b[1;31m",
}
CODES = frozenset((_RESET, _FAINT, *_STYLES.values()))  # all that a line of ours has


class ConsoleLines:
    """A renderer for structlog: the same shape for our events, vLLM's records, and engine lines.

    Args:
        colors: whether the level and the source are colored.
    """

    def __init__(self, colors: bool) -> None:
        self._colors = colors

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> str:
        time = one_line(str(event.pop("timestamp", "")))
        level = one_line(str(event.pop("level", "")))
        source = one_line(_source(str(event.pop("logger", "")), event), _SOURCE_LIMIT)
        exception = str(event.pop("exception", "") or "")
        head = f"{time} {level:<{_LEVEL_WIDTH}} {source:<{_SOURCE_WIDTH}} "
        lines = _wrapped(head, _said(event))
        lines += [_INDENT + line for line in plain(exception).splitlines()]
        if self._colors:
            lines[0] = lines[0].replace(head, self._colored(time, level, source), 1)
        return "\n".join(lines)

    def _colored(self, time: str, level: str, source: str) -> str:
        style = _STYLES.get(level, "")
        return (
            f"{_FAINT}{time}{_RESET} {style}{level:<{_LEVEL_WIDTH}}{_RESET}"
            f" {_FAINT}{source:<{_SOURCE_WIDTH}}{_RESET} "
        )


def _source(logger: str, event: MutableMapping[str, Any]) -> str:
    """The engine's process by its name; else whose logger it is."""
    process = event.pop("process", None)
    event.pop("pid", None) if process else None
    root, _, rest = logger.partition(".")
    if root == "ichat_lifecycle":
        return _OURS
    return str(process) if process else (rest if root == "engine" else root) or root


def _said(event: MutableMapping[str, Any]) -> str:
    """The event, its fields that hold something, and its place in the source."""
    text, place = event.pop("event", ""), event.pop("place", None)
    fields = [f"{name}={_value(value)}" for name, value in event.items() if value is not None]
    return " ".join([str(text), *fields, *([f"({place})"] if place else [])])


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if text and not any(c.isspace() for c in text) else repr(value)


def _wrapped(head: str, text: str) -> list[str]:
    found: list[str] = []
    for line in plain(text).splitlines() or [""]:
        found += textwrap.wrap(
            line if found else head + line,
            WIDTH,
            initial_indent=_INDENT if found else "",
            subsequent_indent=_INDENT,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=False,
            replace_whitespace=False,
        ) or [head if not found else _INDENT]
    return [line.rstrip() for line in found]
