"""The first cause of a failed start, read out of what the engine's processes printed.

vLLM's own error says "See root cause above": the cause stands only in a child's log.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ichat_lifecycle.errors import (
    ArgumentsError,
    InputMissingError,
    LifecycleError,
    LimitError,
    StartError,
)

CAUSE_LIMIT = 600  # characters; vLLM's list of the architectures that it knows has 10 000

# "ValueError: text" at the start of a line, after vLLM's own prefix of process, level and place.
_PREFIX = re.compile(r"^(\([^)]*\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_][\w]*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit)): (.+)$"
)
# Errors that only say that another process had one.
_ECHOES = ("See root cause above", "WorkerProc initialization failed", "failed to start")


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of causes: how it is recognised, what it ends with, what to do."""

    pattern: re.Pattern[str]
    error: type[LifecycleError]
    code: str
    hint: str


def _kind(pattern: str, error: type[LifecycleError], code: str, hint: str) -> Kind:
    return Kind(re.compile(pattern, re.IGNORECASE), error, code, hint)


KINDS = (
    _kind(
        r"KV cache is needed|No available memory for the cache",
        LimitError,
        "kv_cache_too_small",
        "raise --gpu-memory-utilization or VLLM_CPU_KVCACHE_SPACE, or lower --max-model-len",
    ),
    _kind(
        r"out of memory|MemoryError|memory utilization|available memory|kv cache.*memory"
        r"|Cannot allocate memory",
        LimitError,
        "out_of_memory",
        "lower --gpu-memory-utilization, --max-model-len or VLLM_CPU_KVCACHE_SPACE, or free memory",
    ),
    _kind(
        r"Too many open files|No space left on device|Resource temporarily unavailable",
        LimitError,
        "system_limit",
        "raise the limit that the message names (ulimit -n, disk space, processes)",
    ),
    _kind(
        r"No such file or directory|does not appear to have a file named|Repository Not Found"
        r"|is not a valid model identifier|Can't load tokenizer|couldn't connect to .*huggingface"
        r"|LocalEntryNotFoundError|Invalid repository ID or local directory"
        r"|Cannot find any model weights",
        InputMissingError,
        "input_missing",
        "check --model-path; offline, the model has to be a complete local directory",
    ),
    _kind(
        r"Permission denied",
        InputMissingError,
        "input_unreadable",
        "make the model's files readable for this user",
    ),
    _kind(
        r"Model architectures .* are not supported|does not recognize this architecture",
        StartError,
        "model_unsupported",
        "this vLLM does not know the model's architecture: a newer one may",
    ),
    _kind(
        r"validation errors? for|greater than the derived max_model_len|must be divisible",
        ArgumentsError,
        "bad_engine_arguments",
        "change the argument that the message names",
    ),
)


def first_cause(lines: Sequence[str]) -> str | None:
    """The first exception among the lines that is not an echo of another process's; or None."""
    for line in lines:
        match = _EXCEPTION.match(_PREFIX.sub("", line, count=1).lstrip())
        if match and not any(echo in line for echo in _ECHOES):
            return f"{match.group(1)}: {match.group(2)}"
    return None


def start_error(error: BaseException, lines: Sequence[str]) -> LifecycleError:
    """A failed load as one of our errors, with the root cause, an exit code and a hint."""
    if isinstance(error, LifecycleError):
        return error
    own = f"{type(error).__name__}: {error}"
    echo = any(text in own for text in _ECHOES)
    cause = (first_cause(lines) if echo else own) or own
    flat = " ".join(cause.split())
    shown = textwrap.shorten(flat, CAUSE_LIMIT, placeholder=" …")
    for kind in KINDS:
        if kind.pattern.search(flat):
            return kind.error(
                "the engine could not start", code=kind.code, hint=kind.hint, root_cause=shown
            )
    return StartError(
        "the engine could not start",
        code="engine_start_failed",
        root_cause=shown,
        hint="the engine's own log lines above have the details",
    )
