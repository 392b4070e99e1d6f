"""`GET /metrics`: this worker's life in Prometheus' form. vLLM's own metrics are on the main port.

What has happened is counted as it enters the journal; what is now is read when it is asked for.
README's table of metrics is compared with these by a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ichat_lifecycle import __version__
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.view import Identity, Life, takes_requests
from ichat_lifecycle.journal import (
    AttemptOutcome,
    AttemptRecord,
    Entry,
    Reader,
    RecoveryRecord,
    Snapshot,
    StageOutcome,
    StageRecord,
    TransitionRecord,
    VerdictRecord,
)
from ichat_lifecycle.ports import VerdictKind
from ichat_lifecycle.states import State, Trigger

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "ichat_lifecycle"
DONE = "done"

# An answer takes about a millisecond, and 10 s of silence are a miss.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Up to the longest grace periods.
DRAIN_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics(Collector):
    """One life as metrics.

    Args:
        loop: how the worker's event loop is.
        lines_dropped: how many lines of the log have found no reader.
    """

    def __init__(
        self,
        life: Life,
        identity: Identity,
        loop: Callable[[], LoopHealth],
        lines_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._life = life
        self._reader = Reader(life.journal)
        self._times = _Times(life.snapshot)
        self._registry = CollectorRegistry()
        self._registry.register(_Now(life, identity, loop, self.state_seconds, lines_dropped))
        self._transitions = self._counter(
            "transitions",
            "Transitions by outcome: done, refused, failed or interrupted.",
            trigger=Trigger,
            outcome=(DONE, *AttemptOutcome),
        )
        self._verdicts = self._counter(
            "verdicts", "What the watchdog has found of the engine.", kind=VerdictKind
        )
        self._drains = self._counter("drains", "Drains by how they ended.", outcome=StageOutcome)
        self._drained = self._counter(
            "drained_requests",
            "Requests under way in a drain: completed, or cut with an error.",
            outcome=("completed", "cut"),
        )
        self._recovery_steps = self._counter(
            "recovery_steps",
            "Steps of recoveries: an engine lost, a backoff, a restart, a canary that failed.",
            step=("lost", "backoff", "restart", "canary"),
        )
        self._latency = Histogram(
            f"{PREFIX}_probe_latency_seconds",
            "How long the engine took to answer the watchdog.",
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self._drain_length = Histogram(
            f"{PREFIX}_drain_duration_seconds",
            "How long drains took.",
            buckets=DRAIN_BUCKETS,
            registry=self._registry,
        )

    def _counter(self, name: str, help_: str, **labels: Iterable[str]) -> Counter:
        """All its series are there from the beginning: a rate needs a first value to rise from."""
        counter = Counter(f"{PREFIX}_{name}", help_, tuple(labels), registry=self._registry)
        for values in _products(labels):
            counter.labels(**values)
        return counter

    def text(self) -> bytes:
        """All of them, as Prometheus reads them. From any thread."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' client adds when each series was made, which doubles them and says nothing
        here: the process' age is known. Its own switch for that is for vLLM's metrics too."""
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    def state_seconds(self, mono_s: float) -> Mapping[str, float]:
        """How long the worker has been in each state by then. From any thread."""
        return self._times.until(mono_s)

    def count(self, snapshot: Snapshot) -> None:
        """Takes what is new in the journal; a listener of the lifecycle's, on its loop."""
        self._times = self._times.then(snapshot)
        for entry in self._reader.news():
            self._count(entry)

    def _count(self, entry: Entry) -> None:
        match entry.record:
            case TransitionRecord() as record:
                self._transitions.labels(record.trigger, DONE).inc()
            case AttemptRecord() as record:
                self._transitions.labels(record.trigger, record.outcome).inc()
            case VerdictRecord() as record:
                self._verdicts.labels(record.verdict.kind).inc()
                if record.verdict.signs.answered_s is not None:
                    self._latency.observe(record.verdict.signs.answered_s)
            case StageRecord() as record:
                self._count_stage(record)
            case RecoveryRecord() as record:
                self._recovery_steps.labels(record.step).inc()

    def _count_stage(self, record: StageRecord) -> None:
        ended = max(0, record.ended or 0)
        if record.stage == "drain":
            self._drains.labels(record.outcome).inc()
            self._drain_length.observe(record.took_s)
            self._drained.labels("completed").inc(ended)
        elif record.stage == "cut":
            self._drained.labels("cut").inc(ended)


@dataclass(frozen=True)
class _Times:
    """How long the worker has been in each state, the one that it is in left out."""

    snapshot: Snapshot
    before: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(State, 0.0))

    def then(self, snapshot: Snapshot) -> _Times:
        if snapshot.state is self.snapshot.state:
            return replace(self, snapshot=snapshot)
        return _Times(snapshot, self.until(snapshot.since_mono_s))

    def until(self, mono_s: float) -> Mapping[str, float]:
        state, since_s = self.snapshot.state, self.snapshot.since_mono_s
        return {**self.before, state: self.before[state] + max(0.0, mono_s - since_s)}


class _Now(Collector):
    """What is true at the moment of asking."""

    def __init__(
        self,
        life: Life,
        identity: Identity,
        loop: Callable[[], LoopHealth],
        state_seconds: Callable[[float], Mapping[str, float]],
        lines_dropped: Callable[[], int],
    ) -> None:
        self._lines_dropped = lines_dropped
        self._life = life
        self._identity = identity
        self._loop = loop
        self._state_seconds = state_seconds

    def collect(self) -> Iterator[Metric]:
        now_s, snapshot, loop = self._life.monotonic(), self._life.snapshot, self._loop()
        yield _info("build", "What runs here.", self._build())
        yield _gauges(
            "state",
            "1 for the state that the worker is in, 0 for all others.",
            "state",
            {state: float(state is snapshot.state) for state in State},
        )
        yield _gauge(
            "ready",
            "1 while the worker takes requests, as /readyz says.",
            float(takes_requests(snapshot, loop)),
        )
        yield _counters(
            "state_seconds",
            "How long the worker has been in each state.",
            "state",
            self._state_seconds(now_s),
        )
        yield _gauges(
            "start_phase_seconds",
            "How long each phase of the last start took, or has taken so far.",
            "phase",
            _sums(snapshot.progress.took(now_s)),
        )
        yield _gauge(
            "requests_in_flight", "Inference requests under way.", self._identity.in_flight
        )
        yield _counter("restarts", "Engines started in place of another.", snapshot.restarts)
        yield _gauge(
            "restarts_left",
            "How many engines may still be replaced within the window.",
            self._life.restarts_left,
        )
        yield _counter(
            "log_lines_dropped", "Lines of the log that found no reader.", self._lines_dropped()
        )
        yield _gauge("event_loop_lag_seconds", "How late the worker's event loop is.", loop.lag_s)

    def _build(self) -> dict[str, str]:
        return {"version": __version__, "vllm_version": self._identity.vllm_version or ""}


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", help_, value)


def _gauges(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(GaugeMetricFamily(f"{PREFIX}_{name}", help_, labels=[label]), values)


def _counter(name: str, help_: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", help_, value)


def _counters(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(CounterMetricFamily(f"{PREFIX}_{name}", help_, labels=[label]), values)


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]
) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _info(name: str, help_: str, values: dict[str, str]) -> Metric:
    return InfoMetricFamily(f"{PREFIX}_{name}", help_, values)


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """A phase that came twice counts once."""
    sums: dict[str, float] = {}
    for name, seconds in pairs:
        sums[name] = sums.get(name, 0.0) + seconds
    return sums


def _products(labels: Mapping[str, Iterable[str]]) -> Iterator[dict[str, str]]:
    """Each combination of the labels' values."""
    for values in itertools.product(*labels.values()):
        yield dict(zip(labels, values, strict=True))
