"""Lines out of what a process prints."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from ichat_lifecycle.printable import plain

LINE_LIMIT = 16_384  # characters; a longer line is cut, so that nothing can fill the memory

_ENDS = re.compile(r"\r\n|\r(?!\Z)|\n")  # what follows the last \r has not come yet


class LineSplitter:
    """Lines out of bytes; a progress bar's steps, which end with a carriage return, are lines."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    @property
    def rest(self) -> str:
        """What has come of a line that has not ended, without what a terminal would obey."""
        return _plain(self._rest)

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that end in this chunk, without their ends and what a terminal would obey."""
        *lines, self._rest = _ENDS.split(self._rest + self._decoder.decode(chunk))
        for line in lines:
            yield from (
                _plain(line[n : n + LINE_LIMIT]) for n in range(0, len(line) or 1, LINE_LIMIT)
            )
        while len(self._rest) > LINE_LIMIT:
            yield _plain(self._rest[:LINE_LIMIT])
            self._rest = self._rest[LINE_LIMIT:]

    def end(self) -> Iterator[str]:
        """What has come of the last line, which ends here; nothing where it has ended."""
        if self.rest:
            yield self.rest
        self._decoder.reset()
        self._rest = ""


def _plain(text: str) -> str:
    return plain(text.rstrip("\r"))
