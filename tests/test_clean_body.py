"""What passes of a worker's answer: all of it but secrets, in pieces, as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ichat_lifecycle.control.clean_body import (
    BURST_S,
    CHUNK_S,
    PIECE,
    SHARE,
    WHOLE,
    clean_body,
    new_pace,
)
from ichat_lifecycle.redact import PLACEHOLDER, Secrets
from ichat_lifecycle.testing.virtual_time import run_virtual

SECRET = "aardvark-boat-clock-of-the-fleet"
NUMBER = "73946102"
JSON, TEXT, EVENTS = b"application/json", b"text/plain; charset=utf-8", b"text/event-stream"


def known() -> Secrets:
    hidden = Secrets()
    hidden.add(SECRET, NUMBER)
    return hidden


HIDDEN = known()


async def chunks_of(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def pieces(chunks: Iterable[bytes], kind: bytes = TEXT) -> list[bytes]:
    async def collect() -> list[bytes]:
        body = clean_body(chunks_of(chunks), kind, HIDDEN, new_pace())
        return [piece async for piece in body]

    return run_virtual(collect())


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[n : n + size] for n in range(0, len(body), size)]


@given(st.lists(st.binary(max_size=200), max_size=8), st.sampled_from([JSON, TEXT, b""]))
def test_a_body_without_secrets_passes_byte_for_byte(chunks: list[bytes], kind: bytes) -> None:
    assert b"".join(pieces(chunks, kind)) == b"".join(chunks)


@pytest.mark.parametrize("kind", [JSON, b"Application/Problem+JSON; charset=utf-8"])
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_document_stays_one(kind: bytes, size: int) -> None:
    document: dict[str, Any] = {
        "text": f"with {SECRET} in it",
        "list": [SECRET, 1.5, None, "演示"],
        SECRET: {"inner": f"Bearer {SECRET}"},
        "port": int(NUMBER),
        "number": NUMBER,
    }
    body = json.dumps(document).encode()
    passed = b"".join(pieces(cut(body, size), kind))
    assert SECRET.encode() not in passed
    assert json.loads(passed) == {
        "text": "with *** in it",
        "list": [PLACEHOLDER, 1.5, None, "演示"],
        PLACEHOLDER: {"inner": "Bearer ***"},
        "port": int(NUMBER),
        "number": PLACEHOLDER,
    }


@pytest.mark.parametrize(
    "body", [b'{"a": "%b', b'{"a": NaN, "b": "%b"}', b"%b", b'{"a": "\xff%b"}', b"[" * 9000 + b"%b"]
)
def test_what_only_says_that_it_is_json_has_no_secrets_either(body: bytes) -> None:
    (passed,) = pieces([body % SECRET.encode()], JSON)
    assert passed == body % PLACEHOLDER.encode()


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_secret_that_comes_in_two_chunks_is_one(size: int) -> None:
    body = f"a {SECRET}\nb {SECRET}\n{SECRET}".encode()
    assert b"".join(pieces(cut(body, size))) == b"a ***\nb ***\n***"


def test_an_event_passes_once_it_is_whole() -> None:
    """The stream goes on: nothing waits for its end."""

    async def scenario() -> None:
        more = asyncio.Queue[bytes]()

        async def coming() -> AsyncIterator[bytes]:
            while True:
                yield await more.get()

        body = clean_body(coming(), EVENTS, HIDDEN, new_pace())
        for _ in range(3):
            await more.put(b"id: 1\ndata: {")
            await more.put(f'"a": "{SECRET}"}}\n\n'.encode())
            event = await anext(body) + await anext(body)
            assert event == b'id: 1\ndata: {"a": "***"}\n\n'
        await body.aclose()  # type: ignore[attr-defined]

    run_virtual(scenario())


@pytest.mark.parametrize("kind", [JSON, TEXT])
def test_what_has_no_end_is_held_in_bounds_and_cut_between_words(kind: bytes) -> None:
    word = f"{SECRET}, {'and more, ' * 30}".encode()
    body = word * (10 * WHOLE // len(word))
    found = pieces(cut(body, 1000), kind)
    assert len(found) > 10
    assert max(map(len, found)) <= PIECE
    assert b"".join(found) == body.replace(SECRET.encode(), PLACEHOLDER.encode())
    plain = b"a" * (3 * WHOLE)
    assert b"".join(pieces([plain], kind)) == plain


@pytest.mark.parametrize("kind", [JSON, TEXT])
def test_who_takes_too_much_of_the_core_waits(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what all have cost; but never longer than others may owe."""
    used = 0.0

    def thread_time() -> float:  # each look costs half a second
        nonlocal used
        used += 0.25
        return used

    monkeypatch.setattr("ichat_lifecycle.control.clean_body.time.thread_time", thread_time)
    count = 20

    async def scenario() -> None:
        pace, loop = new_pace(), asyncio.get_running_loop()

        async def took_s() -> float:
            began_s = loop.time()
            assert [piece async for piece in clean_body(chunks_of([b"1\n"]), kind, HIDDEN, pace)]
            return loop.time() - began_s

        assert await took_s() == 0
        alone = [await took_s() for _ in range(count)]
        assert sum(alone) >= (count - 5) * 0.25 / SHARE
        together = await asyncio.gather(*(took_s() for _ in range(count)))
        assert max(await took_s(), *together) <= 2 * BURST_S / SHARE

    run_virtual(scenario())


@pytest.mark.parametrize("kind", [JSON, TEXT])
def test_who_sends_a_byte_at_a_time_pays_for_each(kind: bytes) -> None:
    count = 10_000

    async def scenario() -> float:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async for _ in clean_body(chunks_of([b"1"] * count), kind, HIDDEN, new_pace()):
            pass
        return loop.time() - began_s

    assert run_virtual(scenario()) >= (count * CHUNK_S - BURST_S) / SHARE
