"""The record of verdicts: whole where it matters, short where it does not."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.journal import LIMITS, TEXT_LIMIT, Journal, Kind, PhaseRecord, Reason
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


def test_a_reader_gets_what_is_newer_in_order_and_no_more() -> None:
    journal = Journal()
    for verdict in (IDLE, HUNG, BUSY):
        journal.judged(verdict, State.READY, AT)
        journal.add(Kind.PHASE, PhaseRecord(AT, "warm_up", None, 1.0))
    seen = journal.since(0)
    assert [entry.id for entry in seen] == [1, 2, 3, 4, 5, 6]
    assert [entry.kind.value for entry in seen] == ["verdict", "phase"] * 3
    assert journal.since(4) == seen[4:]
    assert journal.since(6) == journal.since(7) == []


def test_the_newest_of_some_kinds_are_there_however_much_there_is_of_others() -> None:
    journal = Journal()
    for number in range(5):
        journal.add(Kind.PHASE, PhaseRecord(AT, str(number), None, 1.0))
        journal.judged(HUNG, State.READY, AT)
    assert [entry.id for entry in journal.newest(3)] == [8, 9, 10]
    assert [entry.id for entry in journal.newest(3, [Kind.PHASE])] == [5, 7, 9]
    assert [entry.id for entry in journal.newest(99, [Kind.PHASE])] == [1, 3, 5, 7, 9]
    assert journal.newest(3, [Kind.STAGE]) == []


def test_one_that_takes_another_ones_place_is_new() -> None:
    journal = Journal()
    journal.judged(IDLE, State.READY, AT)
    journal.judged(IDLE, State.READY, AT)
    (entry,) = journal.since(1)
    assert (entry.id, entry.as_dict()["times"]) == (2, 2)
    assert journal.since(0) == [entry]


def test_an_entry_names_itself_and_its_kind() -> None:
    journal = Journal()
    journal.judged(HUNG, State.READY, AT)
    document = journal.since(0)[0].as_dict()
    assert (document["id"], document["event"], document["kind"]) == (1, "verdict", "hung")


@pytest.mark.parametrize("more", [0, 1, 50])
def test_the_oldest_go_when_there_are_too_many(more: int) -> None:
    turns = [IDLE, BUSY] * ((LIMITS[Kind.VERDICT] + more) // 2)
    assert len(recorded(*turns)) == min(len(turns), LIMITS[Kind.VERDICT])


def test_words_are_bounded_in_bytes_and_the_newest_stays() -> None:
    journal = Journal(words_bytes=10_000)
    for number in range(100):
        journal.add(Kind.PHASE, PhaseRecord(AT, f"{number} " + "x" * 1000, None, 0.0))
    kept = [record.as_dict()["phase"] for record in journal.records(Kind.PHASE)]
    assert [phase.split()[0] for phase in kept] == [str(n) for n in range(91, 100)]
    assert journal.dropped_id == 91
    journal.add(Kind.PHASE, PhaseRecord(AT, "x" * 100_000, None, 0.0))
    assert len(journal.records(Kind.PHASE)) == 1
    journal.add(Kind.PHASE, PhaseRecord(AT, "short", None, 0.0), instead=True)
    journal.add(Kind.PHASE, PhaseRecord(AT, "short", None, 0.0))
    assert len(journal.records(Kind.PHASE)) == 2


def test_a_reason_is_cut() -> None:
    for error in (ValueError("x" * 10**6), LifecycleError("x" * 10**6, hint="y" * 10**6)):
        reason = Reason.of(error)
        assert (len(reason.message), len(reason.hint or "")) <= (TEXT_LIMIT, TEXT_LIMIT)
