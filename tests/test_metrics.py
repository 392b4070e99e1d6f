"""`/metrics`: counted as it happens, by Prometheus' conventions, and documented."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from stand_ins import FakeIdentity
from tools import promtool

from ichat_lifecycle.config import Settings
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.metrics import PREFIX, Metrics
from ichat_lifecycle.errors import StartError, TransitionRefused
from ichat_lifecycle.journal import Journal, Progress, Snapshot, StageOutcome
from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.recorder import Recorder
from ichat_lifecycle.states import State, Trigger

ROOT = Path(__file__).parent.parent
RULES = ROOT / "configs" / "prometheus-rules.yaml"
RULE_TESTS = ROOT / "tests" / "prometheus-rules.test.yaml"
DASHBOARD = ROOT / "configs" / "grafana-dashboard.json"


@dataclass
class FakeClock:
    def now(self) -> datetime:
        return datetime(2026, 1, 2, tzinfo=UTC)


class FakeEvent:
    def set(self) -> None: ...

    def clear(self) -> None: ...


class RecordedLife:
    """A real recorder, on a clock that the test moves."""

    settings = Settings()
    restarts_left = 2

    def __init__(self) -> None:
        self.now_s = 100.0
        self.recorder = Recorder(FakeClock(), FakeEvent())  # type: ignore[arg-type]
        self.recorder.begin(self.now_s)

    @property
    def snapshot(self) -> Snapshot:
        return self.recorder.snapshot

    @property
    def journal(self) -> Journal:
        return self.recorder.journal

    def monotonic(self) -> float:
        return self.now_s

    def enters(self, trigger: Trigger, dest: State, after_s: float) -> None:
        self.now_s += after_s
        self.recorder.entered(
            trigger, self.snapshot.state, dest, mono_s=self.now_s, took_s=0, reason=None, cause=None
        )


class Bench:
    """A life and its metrics, counted from its beginning as in a worker."""

    def __init__(self) -> None:
        self.life = RecordedLife()
        self.loop = LoopHealth()
        self.metrics = Metrics(self.life, FakeIdentity(in_flight=3), lambda: self.loop)
        self.life.recorder.listeners.append(self.metrics.count)

    def value(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.metrics.text().decode()):
            for sample in family.samples:
                if sample.name == f"{PREFIX}_{name}" and sample.labels == labels:
                    return float(sample.value)
        raise AssertionError(f"no {name} {labels}")


def eventful() -> Bench:
    """One of everything."""
    bench = Bench()
    recorder = bench.life.recorder
    recorder.phase("loading_weights", 0.5, 101.0)
    bench.life.enters(Trigger.BIND, State.BOUND, 2)
    recorder.attempt(Trigger.START_ENGINE, State.BOUND, 1.0, StartError("no"))
    recorder.judged(Verdict(VerdictKind.BUSY, Signs(answered_s=0.003)))
    recorder.stage("drain", StageOutcome.TIMED_OUT, 12.0, ended=3)
    recorder.stage("cut", StageOutcome.DONE, 0.1, ended=1)
    recorder.recovery("lost", 2, error=StartError("gone"))
    return bench


# --- counting


def test_transitions_are_counted_by_trigger_and_outcome() -> None:
    bench = Bench()
    bench.life.enters(Trigger.BIND, State.BOUND, 1)
    for error in (StartError("no"), TransitionRefused("not now")):
        bench.life.recorder.attempt(Trigger.START_ENGINE, State.BOUND, 0.1, error)
    bench.life.enters(Trigger.STOP, State.STOPPING, 1)
    values = {
        (trigger.value, outcome): bench.value("transitions_total", trigger=trigger, outcome=outcome)
        for trigger in Trigger
        for outcome in ("done", "refused", "failed", "interrupted")
    }
    assert {labels: value for labels, value in values.items() if value} == {
        ("bind", "done"): 1,
        ("start_engine", "failed"): 1,
        ("start_engine", "refused"): 1,
        ("stop", "done"): 1,
    }


def test_the_time_in_each_state_is_counted_up_to_now() -> None:
    bench = Bench()
    bench.life.enters(Trigger.BIND, State.BOUND, 2)
    bench.life.enters(Trigger.STOP, State.STOPPING, 3)
    bench.life.recorder.publish(stop_asked=True)
    bench.life.now_s += 0.5
    seconds = {state.value: bench.value("state_seconds_total", state=state) for state in State}
    expected = {"PARSED": 2, "BOUND": 3, "STOPPING": 0.5}
    assert seconds == pytest.approx(dict.fromkeys(State, 0) | expected)
    states = {state.value: bench.value("state", state=state) for state in State}
    assert {state for state, value in states.items() if value} == {"STOPPING"}


def test_a_worker_that_sits_in_one_state_is_in_it_all_the_time() -> None:
    bench = Bench()
    bench.life.now_s += 7
    assert bench.value("state_seconds_total", state="PARSED") == pytest.approx(7)


def test_each_verdict_counts_also_those_that_share_an_entry_of_the_journal() -> None:
    bench = Bench()
    for answered_s in (0.002, 0.002, 3.0):
        bench.life.recorder.judged(Verdict(VerdictKind.IDLE, Signs(answered_s=answered_s)))
    bench.life.recorder.judged(Verdict(VerdictKind.HUNG, Signs(answered_s=None, silent_s=10)))
    assert bench.value("verdicts_total", kind="idle") == 3
    assert bench.value("verdicts_total", kind="hung") == 1
    assert bench.value("probe_latency_seconds_count") == 3
    assert bench.value("probe_latency_seconds_sum") == pytest.approx(3.004)
    assert bench.value("probe_latency_seconds_bucket", le="0.0025") == 2


def test_drains_and_what_became_of_their_requests() -> None:
    bench = Bench()
    bench.life.recorder.stage("drain", StageOutcome.TIMED_OUT, 12.0, ended=3)
    bench.life.recorder.stage("cut", StageOutcome.DONE, 0.1, ended=2)
    bench.life.recorder.stage("drain", StageOutcome.DONE, 0.2, ended=None)
    bench.life.recorder.stage("release engine", StageOutcome.DONE, 1.0)
    assert bench.value("drains_total", outcome="timed_out") == 1
    assert bench.value("drains_total", outcome="done") == 1
    assert bench.value("drain_duration_seconds_count") == 2
    assert bench.value("drained_requests_total", outcome="completed") == 3
    assert bench.value("drained_requests_total", outcome="cut") == 2


def test_restarts_and_the_budget() -> None:
    bench = Bench()
    bench.life.recorder.recovery("lost", 2, error=StartError("gone"))
    bench.life.recorder.recovery("restart", 2)
    bench.life.enters(Trigger.RESTART_ENGINE, State.BOUND, 1)
    assert bench.value("restarts_total") == 1
    assert bench.value("restarts_left") == 2
    steps = {step: bench.value("recovery_steps_total", step=step) for step in ("lost", "restart")}
    assert steps == {"lost": 1, "restart": 1}


def test_phases_of_a_start_add_up_to_the_whole() -> None:
    bench = Bench()
    recorder = bench.life.recorder
    recorder.phase("importing", None, 103.0)
    recorder.phase("loading_weights", 0.1, 104.5)
    recorder.phase("loading_weights", 0.9, 106.0)
    recorder.phase("importing", None, 107.0)  # again: in one series with the first
    bench.life.now_s = 109.0
    phases = ("starting", "importing", "loading_weights")
    took = [bench.value("start_phase_seconds", phase=phase) for phase in phases]
    assert took == pytest.approx([3.0, 1.5 + 2.0, 2.5])
    assert sum(took) == pytest.approx(109.0 - 100.0)


def test_what_is_now_is_read_when_it_is_asked_for() -> None:
    bench = Bench()
    assert (bench.value("ready"), bench.value("requests_in_flight")) == (0, 3)
    bench.life.recorder.publish(state=State.READY)
    bench.loop = LoopHealth(0.25)
    assert (bench.value("ready"), bench.value("event_loop_lag_seconds")) == (1, 0.25)
    bench.loop = LoopHealth(5.0, blocked=True)
    assert bench.value("ready") == 0, "as /readyz says"


def test_no_phase_yet_is_no_series() -> None:
    assert Progress().took(5.0) == ()
    assert replace(Progress(), phases=(("a", 1.0),), ended_mono_s=3.0).took(9.0) == (("a", 2.0),)


# --- conventions and documents


def families() -> dict[str, tuple[str, frozenset[str]]]:
    """Kind and labels of each metric that there is."""
    found = {}
    for family in text_string_to_metric_families(eventful().metrics.text().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {key for sample in family.samples for key in sample.labels} - {"le"}
        found[name] = (family.type, frozenset(labels))
    return found


def test_promtool_finds_nothing_to_say() -> None:
    text = eventful().metrics.text()
    done = subprocess.run(
        [promtool(), "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_each_metric_is_documented_and_each_documented_one_exists() -> None:
    rows = re.findall(
        rf"^\| `({PREFIX}_\w+)(?:\{{([\w, ]+)\}})?` \| (\w+) \|",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    documented = {
        name: (kind, frozenset(labels.replace(" ", "").split(",")) - {""})
        for name, labels, kind in rows
    }
    assert documented == families()


def test_the_alert_rules_hold_in_their_own_tests() -> None:
    check = [promtool(), "test", "rules", str(RULE_TESTS)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_that_sees_it_fire() -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    tests = yaml.safe_load(RULE_TESTS.read_text(encoding="utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    fired = {
        case["alertname"]
        for test in tests["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert alerts == fired


def expressions() -> list[str]:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(targets) >= 8
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return alerts + [target["expr"] for target in targets]


@pytest.mark.parametrize("expression", expressions())
def test_alerts_and_dashboard_ask_for_what_exists(expression: str) -> None:
    known = families()
    names = re.findall(rf"({PREFIX}_\w+)(?:\{{([^}}]*)\}})?", expression)
    assert names
    for name, selectors in names:
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        assert family in known, name
        labels = set(re.findall(r"(\w+)\s*[=!]~?=?\s*\"", selectors)) - {"instance", "job"}
        assert labels <= known[family][1], expression


def test_no_series_says_only_when_it_was_made() -> None:
    assert "_created" not in eventful().metrics.text().decode()


def test_all_series_are_there_from_the_beginning() -> None:
    """A rate needs a first value to rise from."""
    bench = eventful()
    before = bench.metrics.text().count(b"\n")
    bench.life.recorder.judged(Verdict(VerdictKind.HUNG, Signs(answered_s=None)))
    bench.life.recorder.stage("drain", StageOutcome.FAILED, 1.0)
    bench.life.enters(Trigger.STOP, State.STOPPING, 1)
    assert bench.metrics.text().count(b"\n") == before
