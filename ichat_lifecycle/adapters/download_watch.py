"""How far the download of a model from a hub has come, read off the hub's cache directory.

vLLM switches the progress bars of the weights off, so that nothing is printed. What is on disk
shows it: huggingface_hub writes each file as `blobs/….incomplete` and renames it once it is whole.
The total is known from the index of the weights, which is fetched first where there are several
files; a model of one file has none, and no time left is claimed for it.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL_S = 1.0  # between two looks
LOG_EVERY_S = 10.0
_RATE_OVER_S = 15.0
_FILES_MAX = 10_000
_INDEX_LIMIT = 32 * 2**20  # bytes
_INDEX_NAME = "*.safetensors.index.json"
_PARTIAL = ".incomplete"
_BLOCK = 512  # bytes of st_blocks


@dataclass(frozen=True, slots=True)
class Download:
    """A download that is under way.

    Attributes:
        bytes: on disk, what earlier attempts have left included.
        total_bytes: of the weights; None where it is not known.
        bytes_per_s: over the last 15 s.
    """

    bytes: int
    total_bytes: int | None
    bytes_per_s: float

    @property
    def fraction(self) -> float | None:
        """0 to 1; None where the total is not known."""
        return min(1.0, self.bytes / self.total_bytes) if self.total_bytes else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at this rate; None where the total is not known, or nothing arrives."""
        if not self.total_bytes or self.bytes_per_s <= 0:
            return None
        return max(0.0, self.total_bytes - self.bytes) / self.bytes_per_s

    def as_dict(self) -> dict[str, Any]:
        eta_s = self.eta_s
        return {
            "bytes": self.bytes,
            "total_bytes": self.total_bytes,
            "bytes_per_s": round(self.bytes_per_s),
            "eta_s": None if eta_s is None else round(eta_s, 1),
            "text": str(self),
        }

    def __str__(self) -> str:
        """For people, such as "2.3 of 5.0 GB, 74.1 MB/s, about 36 s left"."""
        if self.total_bytes:
            unit, divisor = _unit(self.total_bytes)
            said = f"{self.bytes / divisor:.1f} of {self.total_bytes / divisor:.1f} {unit}"
        else:
            unit, divisor = _unit(self.bytes)
            said = f"{self.bytes / divisor:.1f} {unit}"
        unit, divisor = _unit(self.bytes_per_s)
        said += f", {self.bytes_per_s / divisor:.1f} {unit}/s"
        return said if self.eta_s is None else f"{said}, about {self.eta_s:.0f} s left"


def _unit(count: float) -> tuple[str, int]:
    return next(
        ((unit, size) for unit, size in (("GB", 10**9), ("MB", 10**6)) if count >= size),
        ("kB", 10**3),
    )


class DownloadMeter:
    """Measures the download into one repository's directory of the cache.

    Args:
        directory: `models--ORG--NAME` in the cache; it need not be there yet.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._total: int | None = None

    def look(self) -> Download | None:
        """What there is now; None where no file is incomplete. Blocks for as long as the disk."""
        now_s = self._clock()
        sizes = self._sizes()
        if sizes is None:
            self._seen.clear()
            return None
        self._seen.append((now_s, sizes))
        while now_s - self._seen[0][0] > _RATE_OVER_S:
            self._seen.popleft()
        if self._total is None:
            self._total = self._total_of_index()
        since_s, before = self._seen[0]
        rate = max(0, sizes - before) / (now_s - since_s) if now_s > since_s else 0.0
        return Download(sizes, self._total, rate)

    def _sizes(self) -> int | None:
        """Bytes of all blobs; None where none is incomplete."""
        found, partial = 0, False
        try:
            with os.scandir(self._directory / "blobs") as entries:
                for _, entry in zip(range(_FILES_MAX), entries, strict=False):
                    status = entry.stat(follow_symlinks=False)
                    # A file that is written in several places at once has holes.
                    found += min(status.st_size, status.st_blocks * _BLOCK)
                    partial |= entry.name.endswith(_PARTIAL)
        except OSError:
            return None
        return found if partial else None

    def _total_of_index(self) -> int | None:
        try:
            for path in self._directory.glob(f"snapshots/*/{_INDEX_NAME}"):
                if path.stat().st_size <= _INDEX_LIMIT:
                    total = json.loads(path.read_bytes())["metadata"]["total_size"]
                    return total if type(total) is int and total > 0 else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None


def repository_directory(model: str, cache: str | None) -> Path | None:
    """Where a model of a hub is downloaded to; None for a local one.

    Args:
        model: as `--model` has it.
        cache: `--download-dir`; None for huggingface_hub's own.
    """
    if not model or os.path.exists(model) or model.count("/") > 1:  # noqa: PTH110  # any text
        return None
    root = cache or _hub_cache()
    return Path(root) / f"models--{model.replace('/', '--')}" if root else None


def _hub_cache() -> str | None:
    try:
        return str(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    except ImportError:
        return None
