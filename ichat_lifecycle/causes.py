"""Why an engine failed to start or died, read out of what its processes printed.

vLLM's own error says "See root cause above": the cause stands only in a child's log.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ichat_lifecycle.cause_kinds import UNKNOWN, by_signal, classify
from ichat_lifecycle.errors import Category, LifecycleError

CAUSE_LIMIT = 600  # characters; vLLM's list of the architectures that it knows has 10 000

# "ValueError: text" at the start of a line, after vLLM's own prefix of process, level and place.
_PREFIX = re.compile(r"^(\([^)]*\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
# Triton's OutOfResources ends like no other. The last is what faulthandler prints of a signal.
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_][\w]*\.)*"
    r"([A-Z]\w*(?:Error|Exception|Interrupt|Exit|OutOfResources)|OutOfResources"
    r"|Fatal Python error): (.+)$"
)
# Errors that only say that another process had one.
_ECHOES = (
    "See root cause above",
    "WorkerProc initialization failed",
    "failed to start",
    "Executor failed",
    "EngineCore encountered an issue",
)
_WORKERS_DEATH = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: (-?\d+)\)")
# The end of vLLM's own error: "Failed core proc(s): {'EngineCore': -9}".
_FAILED_BY_SIGNAL = re.compile(r"Failed core proc\(s\): \{[^}]*: (-\d+)")


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of the end of an engine that had started."""

    root_cause: str | None
    hint: str
    category: Category


def first_cause(lines: Sequence[str]) -> str | None:
    """The first exception among the lines that is not an echo of another process's; or None."""
    for line in lines:
        match = _EXCEPTION.match(_PREFIX.sub("", line, count=1).lstrip())
        if match and not any(echo in line for echo in _ECHOES):
            return f"{match.group(1)}: {match.group(2)}"
    return None


def death(exit_code: int | None, lines: Sequence[str]) -> Death:
    """Why an engine process ended by itself or by a signal (see `by_signal`).

    A worker's end comes first: EngineCore ends because of it. A signal says more than an error
    that may have been overcome hours ago, unless that is of the kind which ends in signals.
    """
    worker = next((m for line in lines if (m := _WORKERS_DEATH.search(line))), None)
    cause = first_cause(lines) or (worker and worker[0])
    told = classify(cause or "")
    kind = by_signal(int(worker[1]) if worker else exit_code)
    if kind is UNKNOWN or told.category in (Category.MEMORY, Category.KERNEL):
        kind = told
    return Death(_shown(cause) if cause else None, kind.hint, kind.category)


def start_error(error: BaseException, lines: Sequence[str]) -> LifecycleError:
    """A failed load as one of our errors, with the root cause, an exit code, class and hint."""
    if isinstance(error, LifecycleError):
        return error
    own = f"{type(error).__name__}: {error}"
    echo = any(text in own for text in _ECHOES)
    cause = (first_cause(lines) if echo else own) or own
    kind = classify(cause)
    if kind is UNKNOWN and (killed := _FAILED_BY_SIGNAL.search(own)):
        kind = by_signal(int(killed[1]))
    return kind.error(
        "the engine could not start",
        code=kind.code,
        hint=kind.hint,
        root_cause=_shown(cause),
        category=kind.category,
    )


def _shown(cause: str) -> str:
    return textwrap.shorten(" ".join(cause.split()), CAUSE_LIMIT, placeholder=" …")
