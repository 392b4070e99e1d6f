"""vLLM's metrics over the change from one engine to the next.

vLLM and the libraries of its app register their collectors in prometheus_client's global registry,
once per process as they see it. A second engine's constructor removes every collector named
`vllm:…`, also those that belong to a module and are never made again; a second app finds the names
of its HTTP metrics taken, and counts nothing from then on, without an error.

So around each build: what the last build of this kind registered is taken out of the registry; what
is registered instead goes on with the values of its predecessor (counters, histograms, summaries; a
gauge is the new one's own); and what has no successor is put back. An old app that still ends its
requests counts on in the same values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.metrics import MetricWrapperBase

_GOES_ON = (Counter, Histogram, Summary)
# Where prometheus_client keeps the numbers of a metric without labels, or of one set of labels.
_VALUES = ("_value", "_count", "_sum", "_buckets", "_created")


class KeptMetrics:
    """The metrics of one kind of build: of engines, or of apps.

    Args:
        registry: prometheus_client's global one by default.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._built: dict[Any, tuple[str, ...]] = {}

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Around a build. Where it fails, all that was there before is there again."""
        before = self._registered()
        for collector in self._built.keys() & before.keys():
            self._registry.unregister(collector)
        try:
            yield
        finally:
            after = self._registered()
            lost = {c: names for c, names in before.items() if c not in after}
            self._built = {c: names for c, names in after.items() if c not in before}
            for collector, names in lost.items():
                self._succeed(collector, names, after)

    def _succeed(self, old: Any, names: tuple[str, ...], after: dict[Any, tuple[str, ...]]) -> None:
        new = next((c for c, taken in after.items() if set(taken) & set(names)), None)
        if new is None:
            self._registry.register(old)
            # Of the same build as before: the next one may make it anew.
            self._built[old] = names
        elif isinstance(new, _GOES_ON) and _alike(old, new):
            _go_on(old, new)

    def _registered(self) -> dict[Any, tuple[str, ...]]:
        # There is no public way to list collectors; vLLM reads the same attribute.
        return {c: tuple(names) for c, names in self._registry._collector_to_names.items()}


def _alike(old: Any, new: MetricWrapperBase) -> bool:
    return (
        type(old) is type(new)
        and old._labelnames == new._labelnames
        and getattr(old, "_kwargs", None) == getattr(new, "_kwargs", None)
        and getattr(old, "_upper_bounds", None) == getattr(new, "_upper_bounds", None)
    )


def _go_on(old: Any, new: Any) -> None:
    """Has both count in the same values, whichever of them is asked to."""
    if not new._labelnames:
        _share(old, new)
        return
    with new._lock:
        for labels, child in old._metrics.items():
            if (successor := new._metrics.get(labels)) is not None:
                _share(child, successor)
            else:
                new._metrics[labels] = child
        old._metrics, old._lock = new._metrics, new._lock


def _share(old: Any, new: Any) -> None:
    for name in _VALUES:
        if hasattr(old, name) and hasattr(new, name):
            setattr(new, name, getattr(old, name))
