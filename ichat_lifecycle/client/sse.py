"""Server-sent events out of bytes, as the HTML standard has them (but for a CR alone)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Longer than any event of ours: something else would fill the memory.
EVENT_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """`id` is that of the last event that had one."""

    id: str
    event: str
    data: str


class TooLongError(ValueError):
    """An event has no end."""


class EventParser:
    """Takes bytes as they come, in whatever pieces.

    Attributes:
        retry_s: how long the server wants a reader to wait before it comes again, in seconds; None
            until it has said so.
    """

    def __init__(self) -> None:
        self.retry_s: float | None = None
        self._rest = b""
        self._id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """The events that `chunk` completes.

        Raises:
            TooLongError: an event is longer than EVENT_LIMIT bytes.
        """
        # Not splitlines(): to that, more than a line feed ends a line.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield from self._take(line.removesuffix(b"\r").decode("utf-8", "replace"))
        if len(self._rest) + sum(map(len, self._data)) > EVENT_LIMIT:
            raise TooLongError(f"an event of more than {EVENT_LIMIT} bytes")

    def _take(self, line: str) -> Iterator[ServerEvent]:
        if not line:
            if self._data:
                yield ServerEvent(self._id, self._event or "message", "\n".join(self._data))
            self._event, self._data = "", []
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id":
                self._id = value
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "retry" if value.isascii() and value.isdigit():
                self.retry_s = int(value) / 1000
