"""Waiting for a condition, with a generous deadline: these machines are shared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 240.0


def until(condition: Callable[[], Any], what: str = "it", within_s: float = DEADLINE_S) -> Any:
    """What the condition gives, once that is something; an AssertionError after `within_s`."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {within_s:g} s"
        time.sleep(0.01)
    return found
