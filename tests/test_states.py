"""The table agrees with itself, with guards.py and actions.py, and with what states.md says."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from ichat_lifecycle import docs
from ichat_lifecycle.actions import Actions, Hooks
from ichat_lifecycle.config import Settings
from ichat_lifecycle.guards import GUARDS, Facts, Guard, failing
from ichat_lifecycle.resources import ResourceStack
from ichat_lifecycle.states import (
    LIVE_STATES,
    STARTING_STATES,
    TABLE,
    Row,
    State,
    Trigger,
    When,
    allowed,
    row_for,
)
from ichat_lifecycle.testing.fakes import FakeWorld

MARKERS = "\n".join(
    f"# {name}\n<!-- generated: {name} -->\nold\n<!-- end: {name} -->" for name in docs.SECTIONS
)


def leaving(state: State) -> list[Row]:
    return [row for row in TABLE if state in row.sources]


# --- the table


def test_every_guard_of_the_table_exists_and_every_guard_is_used() -> None:
    assert {guard for row in TABLE for guard in row.guards} == set(GUARDS)


def test_every_action_of_the_table_exists_and_every_action_is_used() -> None:
    hooks = cast(Hooks, None)  # nothing is called
    actions = Actions(FakeWorld().ports(), Settings(), ResourceStack(), hooks).by_name()
    assert {row.action for row in TABLE if row.action} == set(actions)


def test_each_trigger_is_one_row() -> None:
    """So that row_for and allowed are unambiguous, and no trigger is forgotten."""
    assert [row.trigger for row in TABLE] == list(Trigger)


def test_every_state_can_be_reached() -> None:
    reached = {State.PARSED}
    for _ in State:
        reached |= {row.dest for row in TABLE if reached & set(row.sources)}
    assert reached == set(State)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.trigger)
def test_a_row_leads_elsewhere(row: Row) -> None:
    """No row is a loop or is repeated for one source, and each says what it means."""
    assert row.dest not in row.sources
    assert len(set(row.sources)) == len(row.sources) > 0
    assert row.meaning


def test_stopping_is_left_by_finish_alone_and_stopped_not_at_all() -> None:
    assert [row.trigger for row in leaving(State.STOPPING)] == [Trigger.FINISH]
    assert leaving(State.STOPPED) == []
    assert allowed(State.STOPPED) == ()


def test_a_stop_can_be_asked_for_in_every_live_state() -> None:
    row = row_for(State.PARSED, Trigger.STOP)
    assert row is not None
    assert row.sources == LIVE_STATES
    assert set(State) - set(LIVE_STATES) == {State.STOPPING, State.STOPPED}
    assert tuple(State)[: tuple(State).index(State.READY)] == STARTING_STATES
    assert row.guards == (), "it can always be asked"


@pytest.mark.parametrize("state", State)
def test_allowed_and_row_for_say_the_same(state: State) -> None:
    with_row = [trigger for trigger in Trigger if row_for(state, trigger)]
    assert list(allowed(state)) == with_row == [row.trigger for row in leaving(state)]


def test_only_become_ready_and_recover_lead_to_ready() -> None:
    """Rule 4's other half: nothing becomes READY but by a proof."""
    to_ready = {row.trigger: row.guards for row in TABLE if row.dest is State.READY}
    assert to_ready == {
        Trigger.BECOME_READY: ("health_answered", "warmed_up"),
        Trigger.RECOVER: ("healthy_in_a_row", "canary_answered"),
    }


def test_only_a_stop_changes_the_state_before_it_acts() -> None:
    """Rule 3: STOPPING is seen while it drains; all else is claimed once it is so."""
    assert [row.trigger for row in TABLE if row.when is When.AFTER] == [Trigger.STOP]


# --- the guards


def test_the_facts_at_the_start_prove_nothing() -> None:
    """Of facts nobody has stated, only the absence of a stop and of resources holds."""
    holding = set(GUARDS) - set(failing(tuple(GUARDS), Facts()))
    assert holding == {"no_stop_asked", "everything_released"}


@pytest.mark.parametrize(("name", "guard"), GUARDS.items())
def test_a_guard_says_true_or_false(name: str, guard: Guard) -> None:
    """Not a truthy something: `transitions` misbehaves with that (trap 6)."""
    assert type(guard(Facts())) is bool, name


def test_more_answers_in_a_row_than_needed_are_enough() -> None:
    names = ("healthy_in_a_row",)
    streaks = [failing(names, Facts(healthy_streak=n, recover_after=2)) for n in range(4)]
    assert streaks == [names, names, (), ()]


# --- what is generated from them


def test_generated_text_is_stable_and_complete() -> None:
    """Rendering twice changes nothing; what stands outside the markers stays; each row is there."""
    text = docs.rendered(f"before\n{MARKERS}\nafter")
    assert docs.rendered(text) == text
    assert text.startswith("before\n") and text.endswith("\nafter")
    assert "old" not in text
    for row in TABLE:
        assert f"| `{row.trigger}` |" in text
        assert all(f"    {source} --> {row.dest}: {row.trigger}" in text for source in row.sources)
    assert f"**{Settings().stop_bound:g} s**" in text


@pytest.mark.parametrize("name", docs.SECTIONS)
@pytest.mark.parametrize("part", ["generated", "end"])
def test_a_missing_marker_is_an_error(name: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"no markers for '{name}'"):
        docs.rendered(MARKERS.replace(f"<!-- {part}: {name} -->", ""))


def test_drift_is_found_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "states.md"
    path.write_text(MARKERS, encoding="utf-8")
    assert docs.check(path) is not None
    docs.write(path)
    assert docs.check(path) is None
    path.write_text(path.read_text(encoding="utf-8").replace("READY", "STEADY", 1))
    assert docs.check(path) is not None
    path.write_text(path.read_text(encoding="utf-8").replace("STEADY", "READY") + "more prose\n")
    assert docs.check(path) is None, "prose is free"
