"""The invariants, proved on production's own lifecycle; only the world behind its ports is fake."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable

import pytest
from on_loop import open_files

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.testing import prove
from ichat_lifecycle.testing.draw import SETTINGS, numbers_of, plan_of
from ichat_lifecycle.testing.life import Stage
from ichat_lifecycle.testing.timeline import timeline

Record = Callable[[str, object], None]

LIVES_PER_WORLD = int(os.environ.get("ICHAT_LIFECYCLE_LIVES", "5000"))  # fewer for each mutant


@pytest.mark.parametrize("world", SETTINGS)
def test_drawn_lives_keep_every_invariant(world: str, record_property: Record) -> None:
    lives = prove.drawn_lives(LifecycleBackend, LIVES_PER_WORLD, world)
    assert lives >= LIVES_PER_WORLD
    record_property("proved: drawn lives", lives)


def test_every_ordering_of_four_events_at_every_await(record_property: Record) -> None:
    lives = prove.bursts(LifecycleBackend)
    assert lives > 10_000
    record_property("proved: lives with up to 4 events in every order at every await", lives)


def test_two_events_however_far_apart(record_property: Record) -> None:
    lives = prove.spread(LifecycleBackend)
    assert lives > 4000
    record_property("proved: lives with 2 events at any two awaits", lives)


def test_one_event_at_every_turn_of_the_loop(record_property: Record) -> None:
    """Finer than the awaits: between a call's end and the moment its caller hears of it."""
    lives = prove.spread(LifecycleBackend, most=1, every_turn=True)
    assert lives > 500
    record_property("proved: lives with 1 event at any turn of the loop", lives)


def test_the_same_numbers_are_the_same_life() -> None:
    generator = random.Random(1)
    plans = [plan_of(numbers_of(generator), SETTINGS["default"]) for _ in range(200)]

    def lived() -> list[list[str]]:
        with Stage() as stage:
            return [list(timeline(stage.live(plan, LifecycleBackend))) for plan in plans]

    assert lived() == lived()


def test_lives_leave_no_file_open_and_no_thread() -> None:
    def held() -> tuple[int, int]:
        return open_files(), threading.active_count()

    before = held()
    assert prove.drawn_lives(LifecycleBackend, 200) >= 200
    assert held() == before
