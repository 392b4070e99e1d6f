"""A log that clients cannot fill: what they cause is a line once in a while."""

from __future__ import annotations

import asyncio
import logging
import math
import time

# At most one line of a kind in so many seconds, however many clients cause it. An error is ours,
# and told more often.
PERIOD_S = {logging.WARNING: 60.0, logging.ERROR: 1.0}


class _Calm(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._told_s: dict[str, float] = {}  # by message, of which Uvicorn has a few

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):
            return False  # an answer without end that a stop has ended: no traceback for each
        message, now_s = str(record.msg), time.monotonic()
        period_s = PERIOD_S.get(record.levelno, 0.0)
        if now_s - self._told_s.get(message, -math.inf) < period_s:
            return False
        self._told_s[message] = now_s
        return True


CALM_LOGGER = logging.getLogger("uvicorn.error.clients")
CALM_LOGGER.addFilter(_Calm())
