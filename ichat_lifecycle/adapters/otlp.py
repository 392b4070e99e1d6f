"""Episodes as OpenTelemetry traces, to where vLLM sends its own (`--otlp-traces-endpoint`).

The protocol is chosen as vLLM does: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, `grpc` by default or
`http/protobuf`. An exporter is made for each trace, of which there are few: one that stays would
hold threads and a channel while the next engine is forked.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import structlog

from ichat_lifecycle.adapters.threads import in_thread
from ichat_lifecycle.episodes import Episode, Episodes, Part
from ichat_lifecycle.journal import Journal, Snapshot
from ichat_lifecycle.redact import redact
from ichat_lifecycle.scrubbed import scrubbed

log = structlog.get_logger("ichat_lifecycle.traces")

PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
EXPORT_TIMEOUT_S = 2  # so long a thread of ours may outlive a worker whose collector hangs

Export = Callable[[str, Sequence[Any]], None]


class Traces:
    """Sends each episode of a life as one trace; a collector that is slow or dead costs nothing.

    Args:
        endpoint: where to; None for nowhere. Asked when an episode has ended: arguments are parsed
            by then.
        attributes: what is said of the worker on each trace.
        export: sends spans; blocking.
        scrub: takes secrets out of what is sent.
    """

    def __init__(
        self,
        journal: Journal,
        endpoint: Callable[[], str | None],
        attributes: Callable[[], Mapping[str, str]],
        export: Export | None = None,
        scrub: Callable[[str], str] = str,
    ) -> None:
        self._scrub = scrub
        self._endpoint = endpoint
        self._attributes = attributes
        self._export = export or send
        self._episodes = Episodes(journal, self._on_episode)
        self._sending: set[asyncio.Task[None]] = set()

    def changed(self, snapshot: Snapshot) -> None:
        """A listener of the lifecycle's, on its loop."""
        self._episodes.changed(snapshot)

    async def flush(self, snapshot: Snapshot, timeout_s: float) -> None:
        """The life is over: waits for what is being sent, but not longer."""
        self._episodes.close(snapshot)
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _on_episode(self, episode: Episode) -> None:
        endpoint = self._endpoint()
        if endpoint:
            task = asyncio.create_task(self._send(endpoint, episode), name="traces")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, endpoint: str, episode: Episode) -> None:
        try:
            spans = spans_of(episode, self._attributes(), self._scrub)
            await in_thread(lambda: self._export(endpoint, spans), "traces")
        except Exception as error:
            log.warning("trace_not_sent", trace=episode.name, error=self._scrub(repr(error)))


def spans_of(
    episode: Episode, attributes: Mapping[str, str], scrub: Callable[[str], str] = str
) -> Sequence[Any]:
    """A span for the whole, and one for each part below it.

    Raises:
        ImportError: OpenTelemetry's SDK is not there; it comes with vLLM.
    """
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import set_span_in_context

    collected = InMemorySpanExporter()
    provider = TracerProvider(resource=_resource(scrub), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(collected))
    tracer = provider.get_tracer("ichat_lifecycle")
    root = tracer.start_span(
        f"lifecycle {episode.name}",
        attributes=_clean({**attributes, **episode.attributes}, scrub),
        start_time=_ns(episode.begin),
    )
    below = set_span_in_context(root)
    for part in episode.parts:
        begin = _ns(part.begin)
        told = _clean(part.attributes, scrub)
        span = tracer.start_span(part.name, below, attributes=told, start_time=begin)
        _end(span, part, scrub)
    _end(root, episode, scrub)
    spans: Sequence[Any] = collected.get_finished_spans()
    return spans


def _resource(scrub: Callable[[str], str]) -> Any:
    """What OpenTelemetry's own detectors know; one of them has the process's command line."""
    from opentelemetry.sdk.resources import Resource

    found = Resource.create()
    return Resource(_clean(found.attributes, scrub), found.schema_url)


def _clean(attributes: Mapping[str, Any], scrub: Callable[[str], str]) -> dict[str, Any]:
    return {name: scrubbed(value, scrub) for name, value in redact(attributes).items()}


def _end(span: Any, whole: Episode | Part, scrub: Callable[[str], str]) -> None:
    from opentelemetry.trace import StatusCode

    if whole.error is not None:
        span.set_status(StatusCode.ERROR, scrub(whole.error))
    span.end(_ns(whole.end))


def _ns(at: datetime) -> int:
    return int(at.timestamp() * 1e9)


def send(endpoint: str, spans: Sequence[Any]) -> None:
    """Sends them, and forgets the connection.

    Raises:
        ValueError: a protocol that vLLM does not know either.
        RuntimeError: the collector did not take them.
    """
    exporter = _exporter(endpoint)
    try:
        result = exporter.export(spans)
    finally:
        exporter.shutdown()
    if result.name != "SUCCESS":
        raise RuntimeError(f"{redact(endpoint)} did not take them")


def _exporter(endpoint: str) -> Any:
    match os.environ.get(PROTOCOL_VARIABLE, "grpc"):
        case "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

            return grpc.OTLPSpanExporter(endpoint, insecure=True, timeout=EXPORT_TIMEOUT_S)
        case "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

            return http.OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        case other:
            raise ValueError(f"{PROTOCOL_VARIABLE}={other}: expected grpc or http/protobuf")
