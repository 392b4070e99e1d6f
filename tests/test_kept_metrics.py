"""Counters go on over a second build, whichever way its libraries register them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.registry import Collector

from ichat_lifecycle.adapters.kept_metrics import KeptMetrics


class World:
    """A registry, and the two ways in which vLLM and its libraries build on it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engines, self.apps = KeptMetrics(self.registry), KeptMetrics(self.registry)
        self.module: Any = None  # a module's own collectors: made once per process

    def engine(self) -> Any:
        """As `PrometheusStatLogger`: unregisters all of vLLM's, whoever made them."""
        with self.engines.building():
            for collector in list(self.registry._collector_to_names):
                if getattr(collector, "_name", "").startswith("vllm:"):
                    self.registry.unregister(collector)
            tokens = Counter("vllm:tokens", "", ["engine"], registry=self.registry)
            running = Gauge("vllm:running", "", registry=self.registry)
            steps = Histogram("vllm:steps", "", buckets=(1, 2), registry=self.registry)
            return tokens.labels(engine="0"), running, steps

    def app(self) -> Callable[[str], None]:
        """As the instrumentator: where a name is taken, it counts nothing and reports nothing."""
        with self.apps.building():
            if self.module is None:
                self.module = Counter("vllm:websockets", "", registry=self.registry)
            total = sizes = None
            with contextlib.suppress(ValueError):
                total = Counter("http_requests", "", ["status"], registry=self.registry)
                sizes = Summary("http_sizes", "", ["status"], registry=self.registry)

            def count(status: str) -> None:
                if total is not None and sizes is not None:
                    total.labels(status).inc()
                    sizes.labels(status).observe(10)

            return count

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def test_every_counter_goes_on_over_three_engines() -> None:
    world = World()
    for number in range(1, 4):
        tokens, running, steps = world.engine()
        count = world.app()
        tokens.inc()
        running.inc()
        steps.observe(1.5)
        count("200")
        if number == 2:
            count("500")
        world.module.inc()
        assert world.value("vllm:tokens_total", engine="0") == number
        assert world.value("vllm:running") == 1, "a gauge is the new engine's own"
        assert world.value("vllm:steps_count") == number
        assert world.value("vllm:steps_bucket", le="2.0") == number
        assert world.value("vllm:steps_sum") == 1.5 * number
        assert world.value("http_requests_total", status="200") == number
        assert world.value("http_sizes_sum", status="200") == 10 * number
        assert world.value("vllm:websockets_total") == number
    assert world.value("http_requests_total", status="500") == 1


def test_what_the_old_app_still_counts_is_counted() -> None:
    world = World()
    world.engine()
    old = world.app()
    old("200")
    world.engine()
    new = world.app()
    for count, status in ((old, "200"), (new, "200"), (old, "503"), (new, "503")):
        count(status)
    assert world.value("http_requests_total", status="200") == 3
    assert world.value("http_requests_total", status="503") == 2


def test_a_build_that_fails_leaves_what_was_there() -> None:
    world = World()
    tokens, _, _ = world.engine()
    count = world.app()
    with pytest.raises(RuntimeError), world.engines.building():
        raise RuntimeError
    with pytest.raises(RuntimeError), world.apps.building():
        raise RuntimeError
    tokens.inc()
    count("200")
    assert world.value("vllm:tokens_total", engine="0") == 1
    assert world.value("http_requests_total", status="200") == 1
    tokens, _, _ = world.engine()
    tokens.inc()
    world.app()("200")
    assert world.value("vllm:tokens_total", engine="0") == 2
    assert world.value("http_requests_total", status="200") == 2


def test_a_custom_stat_loggers_metric_can_be_made_again() -> None:
    """One without vLLM's prefix, which vLLM itself leaves in the registry."""
    world = World()
    for number in range(1, 3):
        with world.engines.building():
            mine = Counter("my_tokens", "", registry=world.registry)
        mine.inc()
        assert world.value("my_tokens_total") == number


def test_what_is_not_alike_starts_anew_and_what_is_not_a_metric_is_let_be() -> None:
    registry = CollectorRegistry()
    kept = KeptMetrics(registry)

    class Other(Collector):
        def collect(self) -> list[Any]:
            return []

    registry.register(Other())
    for labels, buckets in (([], (1, 2)), (["rank"], (1, 2, 3))):
        with kept.building():
            counter = Counter("a", "", labels, registry=registry)
            histogram = Histogram("b", "", buckets=buckets, registry=registry)
        (counter.labels("0") if labels else counter).inc()
        histogram.observe(1)
    assert registry.get_sample_value("a_total", {"rank": "0"}) == 1
    assert registry.get_sample_value("b_count") == 1
