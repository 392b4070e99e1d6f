"""The token of commands: the right one always passes, and guessing is slow and cheap to refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from structlog.testing import capture_logs

from ichat_lifecycle.control.http import HttpError
from ichat_lifecycle.control.token_guard import CLIENTS_MAX, HOLD_S, WRONG_AT_MOST, TokenGuard
from ichat_lifecycle.fleet.token import kept_token
from ichat_lifecycle.testing.virtual_time import run_virtual

TOKEN = "0123456789abcdef0123456789abcdef"


class Door:
    """A guard under a clock that a test sets, or has."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.now_s = 100.0
        self.held = 0.0
        self.guard = TokenGuard(TOKEN, clock or (lambda: self.now_s))

    def ask(self, token: str | None, client: str | None = "10.0.0.1") -> int:
        return asyncio.run(self.asked(token, client))

    async def asked(self, token: str | None, client: str | None = "10.0.0.1") -> int:
        headers = [(b"authorization", f"Bearer {token}".encode())] if token is not None else []
        peer = (client, 1) if client is not None else None
        scope: dict[str, Any] = {
            "type": "http",
            "headers": headers,
            "client": peer,
            "path": "/x",
            "method": "POST",
        }
        scope |= {"query_string": b"", "scheme": "http", "server": ("a", 1)}
        try:
            await self.guard.check(Request(scope))
        except HttpError as error:
            return error.status
        return 200


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    made = Door()

    async def sleep(seconds: float) -> None:
        made.held += seconds

    monkeypatch.setattr("ichat_lifecycle.control.token_guard.asyncio.sleep", sleep)
    return made


def test_the_right_token_passes_whatever_strangers_try(door: Door) -> None:
    """With two wrong ones a second, 3 of 16 right ones passed before."""
    for _ in range(100):
        door.now_s += 0.5
        assert door.ask("wrong") in (401, 429)
        assert door.ask(TOKEN) == 200


def test_guesses_of_one_client_are_held_back_and_another_ones_are_not(door: Door) -> None:
    assert [door.ask("wrong") for _ in range(12)] == [401] * 10 + [429] * 2
    assert door.held == 2.0
    assert door.ask("wrong", "10.0.0.2") == 401
    assert door.ask("wrong", None) == 401, "a Unix socket has no addresses"
    door.now_s += 10.0
    assert door.ask("wrong") == 401
    assert door.held == 2.0


def test_the_right_token_passes_at_once_while_guesses_of_the_same_client_wait() -> None:
    """As from behind one proxy: by the clock of the loop, it costs the right one nothing."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        door = Door(loop.time)
        for _ in range(WRONG_AT_MOST):
            assert await door.asked("wrong") == 401
        assert loop.time() == 0.0, "mistakes cost nothing"
        guesses = [asyncio.create_task(door.asked(f"wrong-{n}")) for n in range(100)]
        await asyncio.sleep(0)
        assert not any(guess.done() for guess in guesses)
        assert await door.asked(TOKEN) == 200
        assert loop.time() == 0.0
        assert set(await asyncio.gather(*guesses)) == {429}
        assert loop.time() == HOLD_S

    run_virtual(scenario())


def test_no_token_is_no_guess(door: Door) -> None:
    assert {door.ask(None) for _ in range(50)} == {401}
    assert door.held == 0.0


def test_an_ipv6_client_has_one_network(door: Door) -> None:
    statuses = [door.ask("wrong", f"2001:db8::{n:x}") for n in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    assert door.ask("wrong", "2001:db8:1::1") == 401
    assert door.ask("wrong", "::ffff:10.0.0.9") == 401


def test_clients_without_number_take_no_memory_and_fill_no_log(door: Door) -> None:
    with capture_logs() as told:
        for n in range(2 * CLIENTS_MAX):
            assert door.ask("wrong", f"10.1.{n // 256}.{n % 256}") == 401
    assert len(door.guard._wrong) == CLIENTS_MAX
    assert len(told) == 10


@pytest.mark.parametrize(("token", "weak"), [("short", True), (TOKEN, False)])
def test_a_token_that_can_be_guessed_is_a_warning(token: str, weak: bool) -> None:
    with capture_logs() as told, kept_token(token) as kept:
        assert kept == token
    assert [line["event"] for line in told] == ["weak_token"] * weak
    assert token not in str(told)


def test_one_of_its_own_is_strong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ichat_lifecycle.fleet.token.token_file", lambda pid: tmp_path / "a.token")
    with capture_logs() as told, kept_token(None) as kept:
        assert len(kept) == 32
    assert told == []
