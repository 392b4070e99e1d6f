"""A worker's answer without the secrets that its supervisor knows, as it comes.

What is JSON stays JSON, up to WHOLE bytes; anything else is looked at line by line. A body without
secrets passes byte for byte, whatever it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator

from ichat_lifecycle import strict_json
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.token_bucket import TokenBucket

WHOLE = 64 * 1024  # bytes of a document that are held back until it has come; usual are 20 KB
PIECE = 16 * 1024  # bytes that are looked at without a break, and of a line without an end
# Of a core, to look for secrets in one worker's answers: at once, and in the long run.
BURST_S, SHARE = 1.0, 0.1

# What stands between words rather than in a secret.
_WORDS = re.compile(rb".*[\s,;\"]", re.DOTALL)
_JSON = re.compile(rb"application/(?:[\w.-]+\+)?json\b", re.IGNORECASE)


def new_pace() -> TokenBucket:
    """What all answers of one worker share."""
    return TokenBucket(SHARE, BURST_S)


async def clean_body(
    chunks: AsyncIterator[bytes], kind: bytes, hidden: Secrets, pace: TokenBucket
) -> AsyncIterator[bytes]:
    """The body in pieces.

    Args:
        kind: its Content-Type.
        pace: in seconds of a core. Who takes too many waits between two pieces, and all others of
            the event loop do not.
    """
    held = bytearray()
    is_document = bool(_JSON.match(kind))
    wait_s = 0.0
    async for chunk in chunks:
        held += chunk
        is_document = is_document and len(held) <= WHOLE
        while not is_document and (end := _end_in(held)):
            await asyncio.sleep(wait_s)
            began_s = time.thread_time()
            piece = _clean(bytes(held[:end]), hidden)
            wait_s = pace.spend(asyncio.get_running_loop().time(), time.thread_time() - began_s)
            del held[:end]
            yield piece
    if held:
        yield _clean(bytes(held), hidden, is_document=is_document)


def _end_in(held: bytearray) -> int:
    """How much of it can be looked at by itself; 0 for nothing yet."""
    part = held[:PIECE]
    if end := part.rfind(b"\n") + 1:
        return end
    if len(held) < PIECE:
        return 0
    words = _WORDS.match(part)
    return words.end() if words is not None else PIECE


def _clean(body: bytes, hidden: Secrets, *, is_document: bool = False) -> bytes:
    text = body.decode("utf-8", "surrogateescape")
    clean: str = hidden.without_known(text)
    if clean == text:
        return body
    if is_document:
        with contextlib.suppress(ValueError):  # else it is none
            document = hidden.without_known(strict_json.parse(body))
            return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return clean.encode("utf-8", "surrogateescape")
