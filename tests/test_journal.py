"""The record of verdicts: whole where it matters, short where it does not."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ichat_lifecycle.journal import VERDICTS_LIMIT, Journal
from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.states import State

AT = datetime(2026, 1, 1, tzinfo=UTC)
IDLE = Verdict(VerdictKind.IDLE, Signs(answered_s=0.001))
BUSY = Verdict(VerdictKind.BUSY, Signs(in_flight=1))
COMPILING = Verdict(VerdictKind.BUSY, Signs(in_flight=1, compiling="torch.compile"))
HUNG = Verdict(VerdictKind.HUNG, Signs(silent_s=10))


def recorded(*verdicts: Verdict) -> list[tuple[Verdict, int]]:
    journal = Journal()
    for verdict in verdicts:
        journal.judged(verdict, State.READY, AT)
    return [(record.verdict, record.times) for record in journal.verdicts]


def test_those_that_are_alike_in_a_row_are_one_record_with_the_newest_signs() -> None:
    newest = Verdict(VerdictKind.IDLE, Signs(answered_s=0.002))
    assert recorded(IDLE, IDLE, newest) == [(newest, 3)]
    assert recorded(IDLE, BUSY, IDLE) == [(IDLE, 1), (BUSY, 1), (IDLE, 1)]


def test_each_that_means_harm_has_its_own() -> None:
    assert recorded(HUNG, HUNG) == [(HUNG, 1), (HUNG, 1)]


def test_one_that_waited_for_a_compiler_is_not_lost_among_the_busy() -> None:
    seen = recorded(BUSY, COMPILING, COMPILING, BUSY)
    assert seen == [(BUSY, 1), (COMPILING, 2), (BUSY, 1)]


def test_a_change_of_state_begins_another() -> None:
    journal = Journal()
    for state in (State.READY, State.DEGRADED):
        journal.judged(IDLE, state, AT)
    assert [record.state for record in journal.verdicts] == [State.READY, State.DEGRADED]


@pytest.mark.parametrize("more", [0, 1, 50])
def test_the_oldest_go_when_there_are_too_many(more: int) -> None:
    turns = [IDLE, BUSY] * ((VERDICTS_LIMIT + more) // 2)
    assert len(recorded(*turns)) == min(len(turns), VERDICTS_LIMIT)
