"""What may come as an answer: bytes without compression, and JSON of bounded shape."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx

from ichat_lifecycle.client.documents import MalformedError
from ichat_lifecycle.nesting import is_flat

ANSWER_LIMIT = 16 << 20  # bytes; a history of 10 000 transitions has 3 MB
# Brackets, braces, and commas, which bound how many values there are. Each may cost 100 bytes.
MARKS_LIMIT = 1_000_000
DEPTH_LIMIT = 31  # deeper than any document of ours


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `media_type` is without its parameters."""

    status: int
    media_type: str
    body: bytes

    def document(self) -> Any:
        """The JSON value in it. Raises MalformedError."""
        if self.media_type != "application/json":
            raise MalformedError("it is no application/json")
        try:
            return parse_json(self.body.decode())
        except UnicodeDecodeError:
            raise MalformedError("it is not JSON") from None


def media_type(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()


def check_encoding(response: httpx.Response) -> None:
    """Raises MalformedError: the answer is compressed, which nobody has asked for.

    A few bytes of that can be gigabytes, and more so where it was done twice.
    """
    if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise MalformedError("it is compressed")


async def whole_body(chunks: AsyncIterable[bytes], limit: int | None = None) -> bytes:
    """All of a body.

    Args:
        limit: of bytes; default: ANSWER_LIMIT.

    Raises:
        MalformedError: it is longer.
    """
    limit = ANSWER_LIMIT if limit is None else limit
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise MalformedError("it has no end")
    return bytes(body)


def parse_json(text: str) -> Any:
    """The JSON value, strictly: no NaN, no infinity.

    Raises:
        MalformedError: it is not JSON, or of more values or levels than any document of ours.
    """
    if sum(map(text.count, "[{,")) > MARKS_LIMIT:
        raise MalformedError("it has too many parts")
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise MalformedError("it is not JSON") from None
    if not is_flat(value, DEPTH_LIMIT):
        raise MalformedError("it is nested too deep")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
