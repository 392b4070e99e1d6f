"""vLLM's `--shutdown-timeout`, for us the drain: how long running requests may finish in a stop."""

from __future__ import annotations

from typing import Any

from ichat_lifecycle.config import SECONDS_MAX, SHOWN, Settings
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.printable import brief

FLAG = "--shutdown-timeout"


def with_shutdown_timeout(settings: Settings, given: Any) -> Settings:
    """The settings with `stop.drain` from the flag, unless that was set itself.

    Args:
        given: the flag's value, as text or a number; None where it is not given.

    Raises:
        ArgumentsError: it is no whole number of seconds, or negative.
    """
    seconds = _seconds(given)
    if seconds is None or "drain" in settings.stop.model_fields_set:
        return settings
    data = settings.model_dump(exclude_unset=True)
    data["stop"] = {**data.get("stop", {}), "drain": seconds}
    return Settings.model_validate(data)


def overruled(settings: Settings, given: Any) -> bool:
    """Whether the flag is given, and `stop.drain` is set to something else, which wins."""
    seconds = _seconds(given)
    return seconds is not None and seconds != settings.stop.drain


def _seconds(given: Any) -> int | None:
    if given is None:
        return None
    shown = FLAG if given is True else f"{FLAG} {brief(str(given), SHOWN)}"
    try:
        seconds = int(str(given))
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= SECONDS_MAX:
        raise ArgumentsError(f"{shown}: expected whole seconds, from 0 to {SECONDS_MAX}")
    return seconds
