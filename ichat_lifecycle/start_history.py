"""How long earlier starts of the same model took: the only honest source of an expected time."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

import platformdirs
import structlog

log = structlog.get_logger("ichat_lifecycle")

STARTS_KEPT = 5
MODELS_KEPT = 200


def default_path() -> Path:
    """`starts.json` in the user's cache directory."""
    return Path(platformdirs.user_cache_dir("ichat-lifecycle")) / "starts.json"


class StartHistory:
    """Seconds from run() to READY, the newest STARTS_KEPT for each of MODELS_KEPT models.

    A file that cannot be read or written costs a warning and the expected time, nothing else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_path()

    def expected_s(self, key: str) -> float | None:
        """The median of earlier starts in seconds, or None where there was none."""
        starts = self._read().get(key)
        return round(statistics.median(starts), 1) if starts else None

    def record(self, key: str, seconds: float) -> None:
        """Adds one start."""
        known = self._read()
        starts = [*known.pop(key, []), round(seconds, 2)][-STARTS_KEPT:]
        kept = dict([*known.items(), (key, starts)][-MODELS_KEPT:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}.tmp")  # other workers write too
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            log.warning("start_history_unwritable", path=str(self._path), error=error.strerror)

    def _read(self) -> dict[str, list[float]]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {
            key: [float(s) for s in starts]
            for key, starts in known.items()
            if isinstance(starts, list) and all(isinstance(s, int | float) for s in starts)
        }
