"""A collector of traces, as OpenTelemetry's: what it is sent over gRPC."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Collector:
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, request: Any, context: Any) -> bytes:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return b""  # all were taken

    def forget(self, name: str) -> None:
        """The trace of this name."""
        gone = {span.trace_id for span in self.traces().get(name, ())}
        self.spans = [span for span in self.spans if span.trace_id not in gone]

    def traces(self) -> dict[str, list[Any]]:
        """The spans of each of our traces, in the order of time, by the name of the first."""
        found = defaultdict(list)
        for span in self.spans:
            found[span.trace_id].append(span)
        ordered = [sorted(spans, key=lambda s: s.start_time_unix_nano) for spans in found.values()]
        roots = {root(spans).name: spans for spans in ordered}
        return {name: spans for name, spans in roots.items() if name.startswith("lifecycle ")}


def root(spans: Sequence[Any]) -> Any:
    return next((span for span in spans if not span.parent_span_id), spans[0])


def parts(spans: Sequence[Any]) -> list[str]:
    return [span.name for span in spans if span.parent_span_id]


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """One that runs, and where."""
    import grpc  # comes with vLLM
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    server, kept = grpc.server(futures.ThreadPoolExecutor(2)), Collector()
    export = grpc.unary_unary_rpc_method_handler(
        kept.export, request_deserializer=ExportTraceServiceRequest.FromString
    )
    routes = grpc.method_handlers_generic_handler(SERVICE, {"Export": export})
    server.add_generic_rpc_handlers((routes,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield kept, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
