"""Real signals to this process."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator

import pytest

from ichat_lifecycle.adapters.signals import BURST_S, STOP_SIGNALS, StopSignals
from ichat_lifecycle.worker import _renew_on_hang_up


class Clock:
    """Monotonic seconds that a test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def supervised() -> bool:
    return False


@pytest.fixture
def heard(clock: Clock, supervised: bool) -> Iterator[list[object]]:
    """What is asked while the handlers are installed; they are put back, whatever a test does."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    asked: list[object] = []
    signals = StopSignals(
        lambda cause, *, now: asked.append((cause, now)), supervised=supervised, clock=clock
    )
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
    heard: list[object], clock: Clock, first: signal.Signals, second: signal.Signals
) -> None:
    for number in (first, second, first):
        signal.raise_signal(number)
        clock.now_s += 0.3
    assert heard == [(first.name, False), (second.name, True), (first.name, True)]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_copies_of_one_request_are_one_request(
    heard: list[object], clock: Clock, number: signal.Signals
) -> None:
    """A wrapper forwards the Ctrl-C that the whole group has received already."""
    for _ in range(10):
        signal.raise_signal(number)
        clock.now_s += 0.0002
    assert heard == [(number.name, False)]
    clock.now_s += BURST_S
    signal.raise_signal(number)
    assert heard == [(number.name, False), (number.name, True)]


@pytest.mark.parametrize("supervised", [True])
def test_sigterm_to_a_supervised_worker_is_graceful_however_often_it_comes(
    heard: list[object], clock: Clock
) -> None:
    """The kernel sends it once for each thread of a supervisor that was killed."""
    for _ in range(5):
        signal.raise_signal(signal.SIGTERM)
        clock.now_s += 0.3
    assert heard == [("SIGTERM", False)]
    signal.raise_signal(signal.SIGINT)
    assert heard == [("SIGTERM", False), ("SIGINT", True)]


@pytest.mark.parametrize("supervised", [True])
def test_a_supervisor_that_hurries_at_once_is_obeyed(heard: list[object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert heard == [("SIGTERM", False), ("SIGINT", True)]


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


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_a_hang_up_renews_the_certificate_except_in_a_terminal(terminal: bool) -> None:
    """There it means that the terminal is closed, and ends the worker as before."""
    renewed: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        _renew_on_hang_up(lambda: renewed.append(1), Stream(terminal))
        if terminal:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        else:
            signal.raise_signal(signal.SIGHUP)
            assert renewed == [1]
    finally:
        signal.signal(signal.SIGHUP, before)
