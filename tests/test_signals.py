"""Real signals to this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from ichat_lifecycle.adapters.signals import STOP_SIGNALS, StopSignals


@pytest.fixture
def heard() -> Iterator[list[object]]:
    """What is asked while the handlers are installed; they are put back, whatever a test does."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    asked: list[object] = []
    signals = StopSignals(lambda cause, *, now: asked.append((cause, now)))
    signals.install()
    try:
        yield asked
    finally:
        signals.remove()
        after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("first", STOP_SIGNALS)
@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_the_first_is_graceful_and_each_further_one_means_now(
    heard: list[object], first: signal.Signals, second: signal.Signals
) -> None:
    for number in (first, second, first):
        signal.raise_signal(number)
    assert heard == [(first.name, False), (second.name, True), (first.name, True)]


def test_a_signal_comes_through_while_nothing_awaits(heard: list[object]) -> None:
    """A plain handler runs between two instructions, also under a loop that is blocked."""
    deadline = time.monotonic() + 30
    os.kill(os.getpid(), signal.SIGTERM)
    while not heard and time.monotonic() < deadline:
        pass
    assert heard == [("SIGTERM", False)]


def test_handlers_of_others_come_back() -> None:
    """Whatever was there when it was made, an ignored signal too."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        signals = StopSignals(lambda cause, *, now: None)
        signals.install()
        assert signal.getsignal(signal.SIGTERM) == signals._handle
        signals.remove()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
