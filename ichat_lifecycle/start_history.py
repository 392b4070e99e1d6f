"""How long earlier starts of the same model with the same arguments took: the only honest source of
an expected time."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from ichat_lifecycle import private_files
from ichat_lifecycle.home import cache_directory

log = structlog.get_logger("ichat_lifecycle")

STARTS_KEPT = 5
KEYS_KEPT = 200
FILE_LIMIT = 1_000_000  # bytes: more than so many starts can take


def default_path() -> Path:
    """`starts.json` in the user's cache directory."""
    return cache_directory() / "starts.json"


_LONGEST_S = 10 * 365 * 24 * 3600.0

# Where it listens and what it is called do not change how long it takes.
_NO_MATTER = frozenset({"--host", "--port", "--uds", "--served-model-name", "--api-key"})


def key_of(model: str, argv: Sequence[str]) -> str:
    """What starts have in common that should take equally long: the model, and its arguments in
    whatever order. The arguments themselves are not told: they may hold secrets."""
    digest = hashlib.sha256("\0".join(sorted(_flags(argv))).encode()).hexdigest()
    return f"{model} {digest[:16]}"


def _flags(argv: Sequence[str]) -> Iterator[str]:
    """Each flag with its values, as one text."""
    flag: list[str] = []
    for word in (*argv, "--"):
        if word.startswith("--") and flag:
            if flag[0].split("=")[0] not in _NO_MATTER:
                yield " ".join(flag)
            flag = []
        flag.append(word)


@dataclass(frozen=True)
class Expected:
    """How long a start should take: the median of `starts` earlier ones, in seconds."""

    seconds: float
    starts: int


class StartHistory:
    """Seconds from run() to READY, the newest STARTS_KEPT for each of KEYS_KEPT keys.

    A file that cannot be read or written costs a warning and the expected time, nothing else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_path()

    def expected(self, key: str) -> Expected | None:
        """What earlier starts took, or None where there was none."""
        starts = self._read().get(key)
        return Expected(round(statistics.median(starts), 1), len(starts)) if starts else None

    def record(self, key: str, seconds: float) -> None:
        """Adds one start."""
        known = self._read()
        starts = [*known.pop(key, []), round(seconds, 2)][-STARTS_KEPT:]
        kept = dict([*known.items(), (key, starts)][-KEYS_KEPT:])
        try:
            private_files.make_directory(self._path.parent)
            private_files.close_to_all(self._path.parent)
            private_files.write(self._path, json.dumps(kept))
        except OSError as error:
            log.warning("start_history_unwritable", path=str(self._path), error=error.strerror)

    def _read(self) -> dict[str, list[float]]:
        try:
            known = json.loads(private_files.read(self._path, FILE_LIMIT))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {
            key: [float(s) for s in starts]
            for key, starts in known.items()
            if isinstance(starts, list) and starts and all(map(_is_a_time, starts))
        }


def _is_a_time(value: object) -> bool:
    """Whether it can be seconds: JSON has NaN, too, and numbers that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= _LONGEST_S and math.isfinite(value)
