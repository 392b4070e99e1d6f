"""The control plane's documents: complete, true to one snapshot, and always JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import NOON, FakeIdentity, FakeLife

from ichat_lifecycle.config import Settings, Stop
from ichat_lifecycle.control import view
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.journal import (
    AttemptOutcome,
    AttemptRecord,
    Kind,
    PhaseRecord,
    Progress,
    Reason,
    RecoveryRecord,
    Snapshot,
    StageOutcome,
    StageRecord,
    TransitionRecord,
)
from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.states import State, Trigger, allowed

LOADING = Snapshot(
    State.BOUND,
    NOON,
    100.0,
    seq=1,
    progress=Progress(
        "loading_weights",
        0.25,
        began_mono_s=90.0,
        expected_s=50.0,
        expected_from=3,
        phases=(("starting", 90.0), ("loading_weights", 94.0)),
    ),
)


def in_state(state: State, **changes: Any) -> FakeLife:
    return FakeLife(replace(LOADING, state=state, **changes), now_s=102.5)


def test_the_lifecycle_document_of_a_loading_worker_is_complete() -> None:
    life = FakeLife(LOADING, now_s=102.5, settings=Settings(stop=Stop(drain=100)))
    assert view.lifecycle_document(life, FakeIdentity(in_flight=3)) == {
        "state": "BOUND",
        "since": "2026-01-02T12:00:00+00:00",
        "for_s": 2.5,
        "ready": False,
        "reason": None,
        "loop": {"lag_s": 0.0, "blocked": False},
        "allowed": ["start_engine", "stop"],
        "progress": {
            "phase": "loading_weights",
            "fraction": 0.25,
            "elapsed_s": 12.5,
            "eta_s": 37.5,
            "expected_s": 50.0,
            "expected_from": 3,
            "phases": [
                {"phase": "starting", "began_s": 0.0, "took_s": 4.0},
                {"phase": "loading_weights", "began_s": 4.0, "took_s": 8.5},
            ],
            "download": None,
        },
        "in_flight": 3,
        "restarts": 0,
        "seq": 1,
        "stop_asked": False,
        "stop_bound_s": life.settings.stop_bound,
        "evidence": None,
        "warnings": [],
        "last_verdict": None,
        "model": "demo",
        "pid": 42,
        "start_id": "5eed",
        "control_url": "http://127.0.0.1:18000",
        "vllm_version": "0.32.0",
        "arguments": {},
    }


def test_a_blocked_loop_is_not_ready_whatever_the_state_says() -> None:
    ready, blocked = in_state(State.READY), LoopHealth(7.5, True, "slow.py:3 in wait")
    document = view.lifecycle_document(ready, FakeIdentity(), blocked)
    assert (document["state"], document["ready"]) == ("READY", False)
    assert document["loop"] == {"lag_s": 7.5, "blocked": True}
    assert document["reason"]["code"] == "loop_blocked"
    assert document["reason"]["root_cause"] == "slow.py:3 in wait"
    status, body = view.probe_document(ready, "readyz", blocked)
    assert (status, body["reason"]["code"]) == (503, "loop_blocked")
    assert view.probe_document(ready, "livez", blocked)[0] == 200
    assert view.probe_document(ready, "readyz", LoopHealth(2.9))[0] == 200


def test_a_degraded_worker_tells_why_and_what_the_last_probe_showed() -> None:
    life = in_state(
        State.DEGRADED,
        reason=Reason("engine_hung", "no answer", "RPC timed out", "wait", "unknown"),
        restarts=2,
        stop_asked=True,
        last_verdict=Verdict(VerdictKind.HUNG, Signs(silent_s=10.0, in_flight=4)),
    )
    document = view.lifecycle_document(life, FakeIdentity())
    assert document["reason"] == {
        "code": "engine_hung",
        "message": "no answer",
        "root_cause": "RPC timed out",
        "category": "unknown",
        "hint": "wait",
    }
    assert document["last_verdict"] == {
        "kind": "hung",
        "answered_s": None,
        "silent_s": 10.0,
        "token_silent_s": 0.0,
        "progressed": False,
        "in_flight": 4,
        "asleep": False,
        "loop_lag_s": 0.0,
        "compiling": "",
        "admin_request": "",
        "ranks": (),
        "error": "",
    }
    assert (document["restarts"], document["stop_asked"]) == (2, True)


@pytest.mark.parametrize("state", State)
def test_ready_and_allowed_follow_the_table(state: State) -> None:
    document = view.lifecycle_document(in_state(state), FakeIdentity())
    assert document["ready"] is (state is State.READY)
    assert document["allowed"] == [trigger.value for trigger in allowed(state)]


def test_in_flight_is_read_anew_for_each_document() -> None:
    identity = FakeIdentity(in_flight=1)
    life = in_state(State.READY)
    assert view.lifecycle_document(life, identity)["in_flight"] == 1
    identity.in_flight = 7
    assert view.lifecycle_document(life, identity)["in_flight"] == 7


@pytest.mark.parametrize(
    ("progress", "now", "elapsed_s", "eta_s"),
    [
        (Progress(began_mono_s=90, expected_s=50), 100, 10, 40),
        (Progress(began_mono_s=90, expected_s=50), 200, 110, 0),  # it took longer than expected
        (Progress(began_mono_s=90, expected_s=None), 100, 10, None),
        (Progress(began_mono_s=90, ended_mono_s=95, expected_s=50), 100, 5, None),  # frozen
        (Progress(began_mono_s=90), 0, 0, None),  # the clock was read before run() began
    ],
)
def test_elapsed_and_eta(
    progress: Progress, now: float, elapsed_s: float, eta_s: float | None
) -> None:
    life = FakeLife(replace(LOADING, progress=progress), now_s=now)
    shown = view.lifecycle_document(life, FakeIdentity())["progress"]
    assert (shown["elapsed_s"], shown["eta_s"]) == (elapsed_s, eta_s)


def test_a_clock_older_than_the_snapshot_never_gives_a_negative_time() -> None:
    assert view.lifecycle_document(FakeLife(LOADING, now_s=99.0), FakeIdentity())["for_s"] == 0


def test_a_document_mixes_no_two_states() -> None:
    """The writer replaces the snapshot while a document is made: only one of them may show."""

    class Flapping(FakeLife):
        reads = 0

        def __getattribute__(self, name: str) -> Any:
            if name == "snapshot":
                self.reads += 1
                state = State.READY if self.reads % 2 else State.STOPPING
                return replace(LOADING, state=state)
            return super().__getattribute__(name)

    document = view.lifecycle_document(Flapping(LOADING), FakeIdentity())
    assert document["ready"] == (document["state"] == "READY")
    assert document["allowed"] == [t.value for t in allowed(State(document["state"]))]
    status, body = view.probe_document(Flapping(LOADING), "readyz")
    assert (status == 200) == (body["state"] == "READY")


def history(count: int) -> FakeLife:
    life = in_state(State.READY)
    for seq in range(1, count + 1):
        life.journal.add(
            Kind.TRANSITION,
            TransitionRecord(
                seq, Trigger.DEGRADE, State.READY, State.DEGRADED, NOON, 1.0, 0.5, "why"
            ),
        )
    return life


def test_the_history_gives_each_transition_whole_and_in_order() -> None:
    transitions = view.history_document(history(3))["transitions"]
    assert [transition["seq"] for transition in transitions] == [1, 2, 3]
    assert transitions[0] == {
        "seq": 1,
        "trigger": "degrade",
        "source": "READY",
        "dest": "DEGRADED",
        "at": "2026-01-02T12:00:00+00:00",
        "took_s": 0.5,
        "cause": "why",
    }


@pytest.mark.parametrize(("after", "seqs"), [(0, [1, 2, 3]), (2, [3]), (3, []), (99, [])])
def test_the_history_after_a_sequence_number(after: int, seqs: list[int]) -> None:
    transitions = view.history_document(history(3), after)["transitions"]
    assert [transition["seq"] for transition in transitions] == seqs


def test_the_history_has_all_that_the_journal_keeps() -> None:
    life = history(1)
    life.journal.add(Kind.STAGE, StageRecord(NOON, "drain", StageOutcome.DONE, 1.25, ended=4))
    life.journal.add(Kind.RECOVERY, RecoveryRecord(NOON, "backoff", 2, delay_s=1.5))
    life.journal.add(Kind.PHASE, PhaseRecord(NOON, "loading_weights", 0.5, 3.0))
    failed = AttemptOutcome.FAILED
    life.journal.add(
        Kind.ATTEMPT, AttemptRecord(NOON, Trigger.SERVE, State.ENGINE_UP, failed, 0.5, "no app")
    )
    document = view.history_document(life, after=1)
    rest = {"attempts", "verdicts", "phases", "stages", "recoveries"}
    assert set(document) == {"transitions", *rest}
    assert (document["transitions"], document["verdicts"]) == ([], [])
    (stage,), (step,), (phase,) = (document[k] for k in ("stages", "recoveries", "phases"))
    assert (stage["stage"], stage["took_s"], stage["ended"]) == ("drain", 1.25, 4)
    assert (step["step"], step["delay_s"]) == ("backoff", 1.5)
    assert (phase["phase"], phase["fraction"]) == ("loading_weights", 0.5)
    (attempt,) = document["attempts"]
    assert (attempt["trigger"], attempt["outcome"]) == ("serve", "failed")


ALIVE = dict.fromkeys(State, 200) | {State.STOPPED: 503}
READY = dict.fromkeys(State, 503) | {State.READY: 200}


@pytest.mark.parametrize("ever_ready", [False, True])
@pytest.mark.parametrize("state", State)
def test_the_three_probes_in_every_state(state: State, ever_ready: bool) -> None:
    life = in_state(state, ever_ready=ever_ready, reason=Reason("code", "message"))
    expected: dict[view.Probe, int] = {
        "livez": ALIVE[state],
        "readyz": READY[state],
        "startupz": 200 if ever_ready else 503,
    }
    for probe, status in expected.items():
        assert view.probe_document(life, probe) == (
            status,
            {
                "status": "ok" if status == 200 else "unavailable",
                "state": state.value,
                "reason": {
                    "code": "code",
                    "message": "message",
                    "root_cause": None,
                    "hint": None,
                    "category": None,
                },
            },
        )


def test_a_probe_without_a_reason_says_null() -> None:
    assert view.probe_document(in_state(State.BOUND), "readyz")[1]["reason"] is None


@pytest.mark.parametrize(
    ("state", "expected_s", "seconds"),
    [
        (State.BOUND, None, 5),
        (State.BOUND, 10.2, 11),  # rounded up: earlier would be in vain
        (State.BOUND, 300.0, 30),
        (State.BOUND, 0.2, 1),
        (State.BOUND, -5.0, 5),  # overdue: nobody knows
        (State.SERVING, 10.0, 10),
        (State.DEGRADED, 10.0, 5),
        (State.STOPPING, 10.0, 5),
    ],
)
def test_retry_after_is_the_rest_of_a_start_within_bounds(
    state: State, expected_s: float | None, seconds: int
) -> None:
    progress = Progress(began_mono_s=100.0, expected_s=expected_s)
    life = FakeLife(replace(LOADING, state=state, progress=progress), now_s=100.0)
    assert view.retry_after_s(life) == seconds


def test_retry_after_once_the_start_has_ended_is_no_eta() -> None:
    progress = Progress(began_mono_s=0.0, ended_mono_s=1.0, expected_s=20.0)
    assert view.retry_after_s(FakeLife(replace(LOADING, progress=progress), now_s=2.0)) == 5


@pytest.mark.parametrize(
    ("code", "took_s", "seconds"),
    [
        ("engine_died", 11.2, 12),
        ("engine_hung", 300.0, 30),
        ("restart_asked", 4.0, 4),
        ("engine_died", None, 5),
        ("engine_unresponsive", 11.2, 5),  # the engine stays, and may answer at once
        ("asleep", 11.2, 5),
    ],
)
def test_retry_after_of_a_lost_engine_is_what_the_last_start_took(
    code: str, took_s: float | None, seconds: int
) -> None:
    reason = Reason(code, "for a reason")
    snapshot = replace(
        LOADING, state=State.DEGRADED, reason=reason, engine_took_s=took_s, progress=Progress()
    )
    assert view.retry_after_s(FakeLife(snapshot, now_s=100.0)) == seconds


class Unprintable:
    def __str__(self) -> str:
        return "shown by name"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.5, 0.5),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        ("text", "text"),
        (State.READY, "READY"),
        (Path("/models/x"), "/models/x"),
        (Unprintable(), "shown by name"),
        ((1, [2]), [1, [2]]),
        ({"b", "a"}, ["a", "b"]),
        ({1: Path("x"), "y": {"z": float("-inf")}}, {"1": "x", "y": {"z": "-inf"}}),
    ],
)
def test_whatever_an_argument_holds_can_be_shown(value: Any, shown: Any) -> None:
    document = view.lifecycle_document(in_state(State.READY), FakeIdentity(arguments={"a": value}))
    assert document["arguments"] == {"a": shown}
    assert type(document["arguments"]["a"]) is type(shown)
    json.dumps(document, allow_nan=False)


def test_a_value_that_holds_itself_ends_somewhere() -> None:
    loop: list[Any] = []
    loop.append(loop)
    json.dumps(view.plain(loop))


def test_the_documents_of_view_need_no_web_framework() -> None:
    code = (
        "import sys, ichat_lifecycle.control.view; "
        "sys.exit(any(m in sys.modules for m in ('fastapi', 'uvicorn', 'starlette')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
