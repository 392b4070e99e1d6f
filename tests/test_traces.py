"""Episodes of a life, and the traces made of them."""

from __future__ import annotations

import asyncio
import http.server
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from stand_ins import NOON
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import otlp
from ichat_lifecycle.adapters.otlp import PROTOCOL_VARIABLE, Traces, send, spans_of
from ichat_lifecycle.episodes import Episode, Episodes, Part
from ichat_lifecycle.errors import EngineDiedError, StartError
from ichat_lifecycle.journal import Reason, StageOutcome
from ichat_lifecycle.recorder import Recorder
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.states import State, Trigger

ENDPOINT = "http://collector/v1/traces"


class Life:
    """A real recorder; wall and loop go on together, as `after` says."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.recorder = Recorder(self, asyncio.Event())

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.now_s - 1000)

    def after(self, seconds: float) -> Recorder:
        self.now_s += seconds
        return self.recorder

    def phase(self, name: str, after_s: float, fraction: float | None = None) -> None:
        self.after(after_s).phase(name, fraction, self.now_s)

    def enters(
        self, trigger: Trigger, dest: State, after_s: float = 0, reason: Reason | None = None
    ) -> None:
        recorder = self.after(after_s)
        cause = reason.message if reason else None
        recorder.entered(
            trigger,
            recorder.snapshot.state,
            dest,
            mono_s=self.now_s,
            took_s=0,
            reason=reason,
            cause=cause,
        )

    def starts(self) -> None:
        """12 s from run() to READY."""
        self.recorder.begin(self.now_s)
        self.phase("importing", 1)
        self.enters(Trigger.BIND, State.BOUND, 3)
        self.phase("loading_weights", 1, 0.0)
        self.phase("loading_weights", 2, 0.5)
        self.enters(Trigger.START_ENGINE, State.ENGINE_UP, 2)
        self.enters(Trigger.SERVE, State.SERVING, 1)
        self.phase("warm_up", 0)
        self.enters(Trigger.BECOME_READY, State.READY, 2)

    def loses_its_engine(self) -> None:
        error = EngineDiedError("the engine died")
        self.after(5).recovery("lost", 3, error=error)
        self.enters(Trigger.DEGRADE, State.DEGRADED, reason=Reason.of(error))
        self.recorder.stage("cut", StageOutcome.DONE, 0.0, ended=4)
        self.recorder.recovery("backoff", 2, delay_s=1.5)
        self.after(2).stage("release engine", StageOutcome.DONE, 0.5)
        self.enters(Trigger.RESTART_ENGINE, State.BOUND)
        self.phase("loading_weights", 1)

    def recovers(self) -> None:
        self.enters(Trigger.START_ENGINE, State.ENGINE_UP, 3)
        self.enters(Trigger.SERVE, State.SERVING, 0)
        self.enters(Trigger.BECOME_READY, State.READY, 1)

    def stops(self) -> None:
        self.enters(Trigger.STOP, State.STOPPING, 1)
        self.after(4).stage("drain", StageOutcome.DONE, 4.0, ended=2)
        self.after(1).stage("release engine", StageOutcome.DONE, 1.0)
        self.enters(Trigger.FINISH, State.STOPPED)


def lived(*chapters: str) -> list[Episode]:
    life = Life()
    found: list[Episode] = []
    episodes = Episodes(life.recorder.journal, found.append)
    life.recorder.listeners.append(episodes.changed)
    for chapter in chapters:
        getattr(life, chapter)()
    episodes.close(life.recorder.snapshot)
    return found


def seconds(whole: Episode | Part) -> float:
    return (whole.end - whole.begin).total_seconds()


# --- episodes


def test_a_start_is_its_phases_without_a_gap() -> None:
    (start,) = lived("starts")
    assert (start.name, start.begin, seconds(start), start.error) == ("start", NOON, 12, None)
    lengths = {part.name: seconds(part) for part in start.parts}
    assert lengths == {"starting": 1, "importing": 4, "loading_weights": 5, "warm_up": 2}
    assert sum(lengths.values()) == seconds(start)
    ends = [part.end for part in start.parts]
    assert [part.begin for part in start.parts] == [NOON, *ends[:-1]]


def test_what_came_before_run_is_part_of_the_start() -> None:
    """The interpreter's start and its imports, seconds on a cold machine."""
    life = Life()
    found: list[Episode] = []
    life.recorder.listeners.append(Episodes(life.recorder.journal, found.append).changed)
    life.recorder.head_start_s = 1.5
    life.starts()
    (start,) = found
    assert (seconds(start), seconds(start.parts[0])) == (13.5, 2.5)
    assert life.recorder.snapshot.since_mono_s == life.now_s


def test_a_whole_holds_its_parts_where_the_two_clocks_differ() -> None:
    class Ahead(Life):
        def now(self) -> datetime:
            """Each look at the wall's clock takes a while, which the loop's has not seen."""
            self.looks += 1
            return super().now() - timedelta(microseconds=70 * self.looks)

        looks = 0

    life = Ahead()
    found: list[Episode] = []
    life.recorder.listeners.append(Episodes(life.recorder.journal, found.append).changed)
    life.starts()
    life.loses_its_engine()
    life.recovers()
    life.stops()
    assert len(found) == 3
    for whole in found:
        assert whole.begin == min(part.begin for part in whole.parts)
        assert all(part.end <= whole.end for part in whole.parts)


def test_a_recovery_has_its_steps_and_the_new_start() -> None:
    _, recovery = lived("starts", "loses_its_engine", "recovers")
    assert (recovery.name, recovery.error) == ("recovery", None)
    assert recovery.attributes == {"cause": "the engine died", "state": "READY"}
    assert seconds(recovery) == 7
    names = [part.name for part in recovery.parts]
    assert names == ["cut", "backoff", "release engine", "restarting", "loading_weights"]
    assert seconds(recovery.parts[1]) == 1.5
    assert recovery.parts[0].attributes == {"outcome": "done", "requests_ended": 4}


def test_an_engine_that_recovers_by_itself() -> None:
    life = Life()
    found: list[Episode] = []
    life.recorder.listeners.append(Episodes(life.recorder.journal, found.append).changed)
    life.starts()
    life.enters(Trigger.DEGRADE, State.DEGRADED, 1, Reason("engine_unresponsive", "no answer"))
    life.after(1).recovery("canary", 3, error=StartError("wrong"))
    life.enters(Trigger.RECOVER, State.READY, 8)
    recovery = found[-1]
    assert [part.name for part in recovery.parts] == ["canary"], "no phases of the start before"
    assert recovery.parts[0].error == "wrong"
    assert (seconds(recovery), recovery.attributes["cause"]) == (9, "no answer")


def test_a_stop_has_its_drain_and_its_releases() -> None:
    *_, stop = lived("starts", "stops")
    assert (stop.name, stop.error, seconds(stop)) == ("stop", None, 5)
    assert [(part.name, seconds(part)) for part in stop.parts] == [
        ("drain", 4),
        ("release engine", 1),
    ]
    assert stop.attributes["state"] == "STOPPED"


def test_a_start_that_fails_and_one_that_is_stopped_say_why() -> None:
    life = Life()
    found: list[Episode] = []
    life.recorder.listeners.append(Episodes(life.recorder.journal, found.append).changed)
    life.recorder.begin(life.now_s)
    life.phase("loading_weights", 1)
    error = StartError("no memory")
    life.after(2).attempt(Trigger.START_ENGINE, State.BOUND, 2, error)
    life.enters(Trigger.STOP, State.STOPPING, reason=Reason.of(error))
    (start,) = found
    assert start.error == "no memory"
    assert [(part.name, part.error) for part in start.parts][-1] == ("start_engine", "no memory")
    assert lived_until_stop().error == "stopped before it was READY"


def lived_until_stop() -> Episode:
    life = Life()
    found: list[Episode] = []
    life.recorder.listeners.append(Episodes(life.recorder.journal, found.append).changed)
    life.recorder.begin(life.now_s)
    life.enters(Trigger.STOP, State.STOPPING, 1)
    return found[0]


def test_a_stop_that_does_not_finish_is_told_all_the_same() -> None:
    life = Life()
    found: list[Episode] = []
    episodes = Episodes(life.recorder.journal, found.append)
    life.recorder.listeners.append(episodes.changed)
    life.starts()
    life.enters(Trigger.STOP, State.STOPPING, 1)
    life.after(3).stage("release engine", StageOutcome.FAILED, 3.0, error=StartError("stuck"))
    episodes.close(life.recorder.snapshot)
    episodes.close(life.recorder.snapshot)
    assert [episode.name for episode in found] == ["start", "stop"]
    assert (found[1].error, seconds(found[1])) == ("it did not end", 3)


# --- traces


def test_a_trace_is_one_span_with_one_for_each_part() -> None:
    _, recovery = lived("starts", "loses_its_engine", "recovers")
    *parts, root = spans_of(recovery, {"model": "demo"})
    assert root.name == "lifecycle recovery"
    assert root.parent is None
    assert dict(root.attributes) == {"model": "demo", "cause": "the engine died", "state": "READY"}
    assert {span.context.trace_id for span in parts} == {root.context.trace_id}
    assert {span.parent.span_id for span in parts} == {root.context.span_id}
    told = [(span.name, span.start_time, span.end_time) for span in parts]
    assert told == [
        (part.name, int(part.begin.timestamp() * 1e9), int(part.end.timestamp() * 1e9))
        for part in recovery.parts
    ]
    assert root.instrumentation_scope.name == "ichat_lifecycle"


def test_what_failed_has_the_status_of_an_error() -> None:
    part = Part("cut", NOON, NOON, error="one")
    child, root = spans_of(Episode("stop", NOON, NOON, (part,), error="two"), {})
    assert (child.status.description, root.status.description) == ("one", "two")
    assert child.status.status_code.name == root.status.status_code.name == "ERROR"


def test_a_trace_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of OpenTelemetry's own detectors sends the command line; an error may quote anything."""
    monkeypatch.setenv("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "process")
    monkeypatch.setattr(sys, "argv", ["serve", "--api-key", "s3cret-key", "--hf-token=s3cret-hf"])
    secrets = Secrets()
    secrets.collect(sys.argv)
    part = Part("cut", NOON, NOON, {"error": "bad s3cret-key"}, error="got 's3cret-hf'")
    episode = Episode("stop", NOON, NOON, (part,), {"cause": "a s3cret-key"}, "s3cret-key")
    spans = spans_of(episode, {"model": "http://u:s3cret-pw@h"}, secrets.scrub)
    text = "".join(span.to_json() for span in spans)
    assert "process.command" in text
    assert "s3cret" not in text


class Sent:
    """What was exported; `hang` holds the thread."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.hang = threading.Event()
        self.hang.set()
        self.error: Exception | None = None

    def __call__(self, endpoint: str, spans: Sequence[Any]) -> None:
        assert self.hang.wait(30)
        if self.error is not None:
            raise self.error
        self.names.append(spans[-1].name)


def traced(sent: Sent, endpoint: str | None = ENDPOINT, flush_s: float = 30) -> None:
    async def main() -> None:
        life = Life()
        traces = Traces(life.recorder.journal, lambda: endpoint, lambda: {}, sent)
        life.recorder.listeners.append(traces.changed)
        life.starts()
        life.stops()
        await traces.flush(life.recorder.snapshot, flush_s)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_each_episode_is_sent() -> None:
    sent = Sent()
    traced(sent)
    assert sorted(sent.names) == ["lifecycle start", "lifecycle stop"]


def test_without_an_endpoint_nothing_is_sent() -> None:
    sent = Sent()
    traced(sent, None)
    assert sent.names == []


def test_a_collector_that_hangs_does_not_hold_up_the_end() -> None:
    sent = Sent()
    sent.hang.clear()
    traced(sent, flush_s=0.01)
    assert sent.names == []
    sent.hang.set()


def test_one_that_refuses_costs_a_warning() -> None:
    sent = Sent()
    sent.error = RuntimeError("refused")
    with capture_logs() as logs:
        traced(sent)
    warned = [line["trace"] for line in logs if line["event"] == "trace_not_sent"]
    assert sorted(warned) == ["start", "stop"]


class Collector(http.server.BaseHTTPRequestHandler):
    status = 200
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[tuple[str, type[Collector]]]:
    handler = type("Handler", (Collector,), {"bodies": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", handler
        server.shutdown()
        thread.join()


def test_they_arrive_over_http(
    collector: tuple[str, type[Collector]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    monkeypatch.setenv(PROTOCOL_VARIABLE, "http/protobuf")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "the-worker")
    endpoint, handler = collector
    (start,) = lived("starts")
    send(endpoint, spans_of(start, {"model": "demo"}))
    request = ExportTraceServiceRequest.FromString(b"".join(handler.bodies))
    (resource,) = request.resource_spans
    names = [span.name for span in resource.scope_spans[0].spans]
    assert names == ["starting", "importing", "loading_weights", "warm_up", "lifecycle start"]
    told = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert told["service.name"] == "the-worker"


def test_what_is_not_taken_is_an_error(
    collector: tuple[str, type[Collector]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, "http/protobuf")
    monkeypatch.setattr(otlp, "EXPORT_TIMEOUT_S", 0.2)
    endpoint, handler = collector
    handler.status = 400
    with pytest.raises(RuntimeError, match="did not take them"):
        send(endpoint, spans_of(Episode("stop", NOON, NOON, ()), {}))


def test_a_protocol_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, "smoke")
    with pytest.raises(ValueError, match="smoke: expected grpc or http/protobuf"):
        send(ENDPOINT, [])
