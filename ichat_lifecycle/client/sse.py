"""Server-sent events out of bytes, as the HTML standard has them (but for a CR alone)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ichat_lifecycle.client.documents import MalformedError

# Longer than any event of ours: something else would fill the memory.
EVENT_LIMIT = 1 << 20
RETRY_LIMIT_S, RETRY_DIGITS = 60.0, 9


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """`id` is that of the last event that had one."""

    id: str
    event: str
    data: str


class TooLongError(MalformedError):
    """An event has no end."""


class EventParser:
    """Takes bytes as they come, in whatever pieces.

    Attributes:
        retry_s: how long the server wants a reader to wait before it comes again, in seconds, at
            most 60; None until it has said so.
    """

    def __init__(self) -> None:
        self.retry_s: float | None = None
        self._rest = bytearray()
        self._id = ""
        self._event = ""
        self._data: list[str] = []
        self._size = 0  # of that data

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """The events that `chunk` completes.

        Raises:
            TooLongError: an event is longer than EVENT_LIMIT bytes.
        """
        self._rest += chunk
        # A long line that comes byte by byte is not looked through each time.
        if b"\n" in chunk:
            # Not splitlines(): to that, more than a line feed ends a line.
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                yield from self._take(line.removesuffix(b"\r").decode("utf-8", "replace"))
        if len(self._rest) + self._size > EVENT_LIMIT:
            raise TooLongError(f"an event of more than {EVENT_LIMIT} bytes")

    def _take(self, line: str) -> Iterator[ServerEvent]:
        if not line:
            if self._data:
                yield ServerEvent(self._id, self._event or "message", "\n".join(self._data))
            self._event, self._data, self._size = "", [], 0
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
                self._size += len(value) + 1  # an empty one takes memory, too
            case "retry" if value.isascii() and value.isdigit():
                self.retry_s = min(RETRY_LIMIT_S, int(value[:RETRY_DIGITS]) / 1000)
