"""Whoever answers: no head without an end is read to the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from ichat_lifecycle.short_heads import HEAD_BYTES, ShortHeads
from ichat_lifecycle.testing.hostile_plane import TRICKS, HostilePlane, Trick, answer

LARGE = {"X": "a" * (HEAD_BYTES - 1000)}


@contextlib.asynccontextmanager
async def asking(trick: Trick) -> AsyncIterator[tuple[httpx.AsyncClient, HostilePlane]]:
    async with (
        HostilePlane(trick).serving() as plane,
        httpx.AsyncClient(transport=ShortHeads(), base_url=plane.url, timeout=60) as client,
    ):
        yield client, plane


@pytest.mark.parametrize("name", ["endless interim answers", "an endless head", "an endless line"])
def test_a_head_without_end_is_an_error(name: str) -> None:
    async def scenario() -> None:
        async with asking(TRICKS[name]) as (client, _):
            with pytest.raises(httpx.HTTPError) as caught:
                await client.get("/")
            assert not isinstance(caught.value, httpx.TimeoutException)

    asyncio.run(scenario())


def test_a_head_and_a_body_of_a_usual_size_pass_each_time() -> None:
    body = b"x" * 10 * HEAD_BYTES

    async def scenario() -> None:
        async with asking(answer(body, headers=LARGE)) as (client, plane):
            for _ in range(3):
                assert (await client.get("/")).content == body
                assert (await client.post("/", content=b"y" * 10 * HEAD_BYTES)).content == body
            assert len(plane.heads) == 6

    asyncio.run(scenario())
