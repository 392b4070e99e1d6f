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
# Of a core, to look for secrets in one worker's answers: at once, and in the long run. So nobody
# waits for others longer than 3 s.
BURST_S, SHARE = 0.3, 0.1
CHUNKS, CHUNK_S = 100, 50e-6  # chunks of a body that are paid for together, and what one costs

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
        pace: in seconds of a core. Where too many were taken, each piece waits, whoever took them,
            and all others of the event loop do not.
    """
    loop, count = asyncio.get_running_loop(), 0
    held = bytearray()
    is_document = bool(_JSON.match(kind))
    async for chunk in chunks:
        held += chunk
        count += 1
        if count % CHUNKS == 0:  # tiny ones cost more than what is in them
            await asyncio.sleep(pace.spend(loop.time(), CHUNKS * CHUNK_S))
        is_document = is_document and len(held) <= WHOLE
        while not is_document and (end := _end_in(held)):
            piece = bytes(held[:end])
            del held[:end]
            yield await _cleaned(piece, hidden, pace)
    if held:
        yield await _cleaned(bytes(held), hidden, pace, is_document=is_document)


async def _cleaned(
    piece: bytes, hidden: Secrets, pace: TokenBucket, *, is_document: bool = False
) -> bytes:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(pace.spend(loop.time(), 0.0))
    began_s = time.thread_time()
    try:
        return _document(piece, hidden) if is_document else _text(piece, hidden)
    finally:
        pace.spend(loop.time(), time.thread_time() - began_s)


def _end_in(held: bytearray) -> int:
    """How much of it can be looked at by itself; 0 for nothing yet."""
    part = held[:PIECE]
    if end := part.rfind(b"\n") + 1:
        return end
    if len(held) < PIECE:
        return 0
    words = _WORDS.match(part)
    return words.end() if words is not None else PIECE


def _text(body: bytes, hidden: Secrets) -> bytes:
    text = body.decode("utf-8", "surrogateescape")
    clean: str = hidden.without_known(text)
    return body if clean == text else clean.encode("utf-8", "surrogateescape")


def _document(body: bytes, hidden: Secrets) -> bytes:
    """It stays JSON, and is taken apart only if it has to be."""
    clean = _text(body, hidden)
    if clean != body:
        with contextlib.suppress(ValueError):  # else it is none
            document = hidden.without_known(strict_json.parse(body))
            return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return clean
