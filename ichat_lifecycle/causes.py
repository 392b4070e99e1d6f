"""Why an engine failed to start or died, read out of what its processes printed.

vLLM's own error says "See root cause above": the cause stands only in a child's log.

A failed load had no clients, so the first exception of all its lines is the cause. An engine that
served for hours has printed exceptions that it survived, most of them for a client's mistake (a
wrong path of a LoRA adapter). Its end is explained by the lines near the end only: those of the
last WINDOW_S seconds, and among these by what follows vLLM's own word that an exception is fatal,
or else by what is not known to have been survived.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ichat_lifecycle.cause_kinds import (
    HUB_KINDS,
    UNKNOWN,
    by_signal,
    classify,
    in_context,
    of_the_hub,
)
from ichat_lifecycle.errors import Category, LifecycleError
from ichat_lifecycle.log_line import LogLine, parse

CAUSE_LIMIT = 600  # characters; vLLM's list of the architectures that it knows has 10 000

# How long before an engine's end its lines count. A process that fails prints why, ends, and is
# noticed within a second or two; on a busy machine a large traceback can take a while.
WINDOW_S = 30.0

# "ValueError: text" at the start of what a line says.
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
    "Worker failed with error ",
    "RPC call to ",
)
# vLLM's words before the traceback of an exception that ends EngineCore, and of one that was only
# answered with: a method that a request has called (v1/engine/core.py, 0.27 to 0.33).
_FATAL = re.compile(r"^EngineCore (?:encountered a fatal error|failed to start)|^WorkerProc failed")
_SURVIVED = re.compile(r"^Invocation of \S+ method failed")
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
    return next((cause for line in lines if (cause := _cause_in(line)) is not None), None)


def _cause_in(line: str) -> str | None:
    for text in parse(line).lines:
        match = _EXCEPTION.match(text.lstrip())
        if match and not any(echo in text for echo in _ECHOES):
            return f"{match.group(1)}: {match.group(2)}"
    return None


def death(exit_code: int | None, recent: Sequence[str]) -> Death:
    """Why an engine process ended by itself or by a signal (see `by_signal`).

    A worker's end comes first: EngineCore ends because of it. A signal says more than an error
    that may have been overcome, unless that is of the kind which ends in signals.

    Args:
        recent: the lines of the last WINDOW_S seconds, oldest first.
    """
    worker = next((m for line in recent if (m := _WORKERS_DEATH.search(parse(line).text))), None)
    cause = _fatal_cause(recent) or (worker and worker[0])
    told = in_context(classify(cause or ""), cause or "", recent)
    kind = by_signal(int(worker[1]) if worker else exit_code)
    if kind is UNKNOWN or told.category in (Category.MEMORY, Category.KERNEL):
        kind = told
    return Death(_shown(cause) if cause else None, kind.hint, kind.category)


def _fatal_cause(recent: Sequence[str]) -> str | None:
    """The first cause that EngineCore logs as fatal; else the one that a failing worker logged."""
    fatal = next((n for n, line in enumerate(recent) if _FATAL.match(parse(line).text)), None)
    if fatal is not None and (cause := first_cause(recent[fatal:])) is not None:
        return cause
    before = recent if fatal is None else recent[:fatal]
    return first_cause(before[_after_survived(before) :])


def _after_survived(lines: Sequence[str]) -> int:
    """Where the last traceback ends of an exception that the engine went on after; 0 for none."""
    begins = [n for n, line in enumerate(lines) if _SURVIVED.match(parse(line).text)]
    if not begins:
        return 0
    marker, end = parse(lines[begins[-1]]), begins[-1] + 1
    # Each line of one record of a logger repeats its prefix, the place in the source with it.
    while end < len(lines) and _same_record(marker, parse(lines[end])):
        end += 1
    return end


def _same_record(one: LogLine, other: LogLine) -> bool:
    return bool(one.place) and (one.pid, one.place, one.level) == (
        other.pid,
        other.place,
        other.level,
    )


def start_error(error: BaseException, lines: Sequence[str]) -> LifecycleError:
    """A failed load as one of our errors, with the root cause, an exit code, class and hint."""
    if isinstance(error, LifecycleError):
        return error
    own = f"{type(error).__name__}: {error}"
    echo = any(text in own for text in _ECHOES)
    cause = (first_cause(lines) if echo else own) or own
    kind = in_context(classify(cause), cause, lines)
    # In a log the first cause comes first, in a chain of errors last.
    others = _causes_in(lines) if echo else _below(error)
    if (hub := of_the_hub(kind, cause, others)) in HUB_KINDS:
        said = (text for text in others if not echo or hub.pattern.search(text))
        kind, cause = hub, _both(cause, list(said)[-1:])
    if kind is UNKNOWN and (killed := _FAILED_BY_SIGNAL.search(own)):
        kind = by_signal(int(killed[1]))
    return kind.error(
        "the engine could not start",
        code=kind.code,
        hint=kind.hint,
        root_cause=_shown(cause),
        category=kind.category,
    )


def _causes_in(lines: Sequence[str]) -> list[str]:
    return [" ".join(cause.split()) for line in lines if (cause := _cause_in(line)) is not None]


def _below(error: BaseException) -> list[str]:
    """What an error followed from, each as a traceback shows it."""
    found = [error]
    while (under := _under(found[-1])) is not None and under not in found:
        found.append(under)
    return [" ".join(f"{type(one).__name__}: {one}".split()) for one in found[1:]]


def _under(error: BaseException) -> BaseException | None:
    context = None if error.__suppress_context__ else error.__context__
    return error.__cause__ or context


def _both(cause: str, others: Sequence[str]) -> str:
    """The hub's client says that it failed, and only another error why."""
    room = CAUSE_LIMIT // 2
    told = [f" ({_shown(other, room - len(' ()'))})" for other in others if other not in cause]
    return "".join([_shown(cause, room), *told]) if told else cause


def _shown(cause: str, limit: int = CAUSE_LIMIT) -> str:
    return textwrap.shorten(" ".join(cause.split()), limit, placeholder=" …")
