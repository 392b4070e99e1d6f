"""A watch that was not running itself judges nothing that it has not seen."""

from __future__ import annotations

import pytest

from ichat_lifecycle.slept import LAG_S, LOOKS, Silence, overslept


def lasted_s(silence: Silence, from_s: float, heard_s: float | None = None) -> float:
    """Looks each tick until the silence is too long: when that is."""
    now_s = from_s
    while not silence.too_long(now_s):
        now_s += silence.tick_s
        if heard_s is not None and now_s <= heard_s:
            silence.heard(now_s)
    return now_s


@pytest.mark.parametrize("limit_s", [0.5, 10.0, 60.0])
def test_a_silence_is_too_long_at_its_limit(limit_s: float) -> None:
    assert lasted_s(Silence(limit_s, 0.0), 0.0) == pytest.approx(limit_s, abs=limit_s / LOOKS)


def test_what_is_heard_ends_it() -> None:
    assert lasted_s(Silence(60.0, 0.0), 0.0, heard_s=30.0) == pytest.approx(90.0, abs=3.1)


@pytest.mark.parametrize("frozen_s", [1.01, 59.0, 60.5, 86_400.0])
@pytest.mark.parametrize("at_s", [0.0, 31.0, 59.9])
def test_whoever_was_frozen_begins_anew(at_s: float, frozen_s: float) -> None:
    silence = Silence(60.0, 0.0)
    now_s = 0.0
    while now_s < at_s:
        assert not silence.too_long(now_s)
        now_s += silence.tick_s
    now_s += silence.tick_s + frozen_s
    assert not silence.too_long(now_s)
    assert lasted_s(silence, now_s) == pytest.approx(now_s + 60.0, abs=3.1)


def test_a_busy_machine_is_not_a_freeze() -> None:
    assert not overslept(10.0, 10.0 + LAG_S * 0.99)
    assert overslept(10.0, 10.0 + LAG_S)
