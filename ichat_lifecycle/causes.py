"""Why an engine failed to start or died, read out of what its processes printed.

vLLM's own error says "See root cause above": the cause stands only in a child's log.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ichat_lifecycle.errors import (
    AddressError,
    ArgumentsError,
    Category,
    InputMissingError,
    LifecycleError,
    LimitError,
    StartError,
)

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

_SIGKILL = 9
_CRASHES = frozenset({4, 6, 7, 8, 11})  # SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of causes: how it is recognised, what it ends with, what to do."""

    pattern: re.Pattern[str]
    error: type[LifecycleError]
    code: str
    hint: str
    category: Category


def _kind(
    pattern: str, error: type[LifecycleError], code: str, hint: str, category: Category
) -> Kind:
    return Kind(re.compile(pattern, re.IGNORECASE), error, code, hint, category)


# The first that fits counts.
KINDS = (
    _kind(
        r"KV cache is needed|No available memory for the cache",
        LimitError,
        "kv_cache_too_small",
        "raise --gpu-memory-utilization or VLLM_CPU_KVCACHE_SPACE, or lower --max-model-len",
        Category.MEMORY,
    ),
    _kind(
        r"out of memory|MemoryError|memory utilization|available memory|kv cache.*memory"
        r"|Cannot allocate memory",
        LimitError,
        "out_of_memory",
        "lower --gpu-memory-utilization, --max-model-len or VLLM_CPU_KVCACHE_SPACE, or free memory",
        Category.MEMORY,
    ),
    _kind(
        r"Too many open files|No space left on device|Resource temporarily unavailable",
        LimitError,
        "system_limit",
        "raise the limit that the message names (ulimit -n, disk space, processes)",
        Category.CONFIGURATION,
    ),
    _kind(
        r"Address already in use|EADDRINUSE|Cannot assign requested address|EADDRNOTAVAIL",
        AddressError,
        "engine_port_unavailable",
        "end what holds the port, or choose others with VLLM_PORT, --master-port and VLLM_HOST_IP",
        Category.PORT,
    ),
    _kind(
        r"Permission denied|Operation not permitted",
        InputMissingError,
        "input_unreadable",
        "make the model's files, or what else the message names, accessible for this user",
        Category.PERMISSION,
    ),
    _kind(
        r"SafetensorError|Error while deserializing header|header too (?:large|small)"
        r"|incomplete metadata|PytorchStreamReader failed|invalid load key"
        r"|size mismatch for|Attempted to load weight",
        InputMissingError,
        "model_corrupt",
        "the weights are damaged, cut off (an unfinished download, a Git LFS pointer) or of another"
        " model: fetch them again",
        Category.MODEL,
    ),
    _kind(
        r"is not a valid JSON file|JSONDecodeError",
        InputMissingError,
        "model_config_invalid",
        "a JSON file of the model (config.json, tokenizer.json) is damaged: fetch it again",
        Category.MODEL,
    ),
    _kind(
        r"Can't load tokenizer|Couldn't instantiate the backend tokenizer"
        r"|Unable to load vocabulary|tokenizer.* (?:not found|missing|does not exist)",
        InputMissingError,
        "tokenizer_missing",
        "put the tokenizer's files beside the model's, or name their directory with --tokenizer",
        Category.MODEL,
    ),
    _kind(
        r"undefined symbol|cannot open shared object file"
        r"|\.so[\w.]*: (?:file too short|invalid ELF)",
        StartError,
        "kernel_failed",
        "a compiled library does not fit this machine: install vLLM, torch and the driver to match",
        Category.KERNEL,
    ),
    _kind(
        r"No such file or directory|does not appear to have a file named|Repository Not Found"
        r"|is not a valid model identifier|couldn't connect to .*huggingface"
        r"|LocalEntryNotFoundError|Invalid repository ID or local directory"
        r"|Cannot find any model weights",
        InputMissingError,
        "input_missing",
        "check --model-path; offline, the model has to be a complete local directory",
        Category.MODEL,
    ),
    _kind(
        r"Model architectures .* are not supported|does not recognize this architecture"
        r"|No model architectures are specified",
        StartError,
        "model_unsupported",
        "this vLLM does not know the model's architecture: a newer one may",
        Category.MODEL,
    ),
    _kind(
        r"validation errors? for|greater than the derived max_model_len|must be divisible",
        ArgumentsError,
        "bad_engine_arguments",
        "change the argument that the message names",
        Category.CONFIGURATION,
    ),
    _kind(
        r"CUDA error|CUBLAS_|CUDNN_|NCCL error|HIP error|no kernel image|illegal memory access"
        r"|device-side assert|\btriton\b|OutOfResources|Illegal instruction|SIGILL"
        r"|Segmentation fault|Bus error|not compiled with CUDA|not implemented for '"
        r"|Minimum capability"
        r"|unsupported (?:GPU|device|hardware|CUDA|PTX|toolchain|arch|compute|conversion|dtype)",
        StartError,
        "kernel_failed",
        "the compiled kernels failed on this machine: check that vLLM, torch and the driver fit it",
        Category.KERNEL,
    ),
)
UNKNOWN = _kind(
    "",
    StartError,
    "engine_start_failed",
    "the engine's own log lines above have the details",
    Category.UNKNOWN,
)
KILLED = _kind(
    "",
    StartError,
    "engine_killed",
    "killed, perhaps by the kernel's out-of-memory killer: see dmesg and the container's limits",
    Category.UNKNOWN,  # an operator's kill looks the same
)
CRASHED = _kind(
    "",
    StartError,
    "kernel_failed",
    "compiled code crashed: check that vLLM, torch and the driver fit this machine, and that"
    " /dev/shm is not full",
    Category.KERNEL,
)


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of the end of an engine that had started."""

    root_cause: str | None
    hint: str
    category: Category


def classify(text: str) -> Kind:
    """The kind of cause that a text tells of; UNKNOWN where it tells none."""
    flat = " ".join(text.split())
    return next((kind for kind in KINDS if kind.pattern.search(flat)), UNKNOWN)


def by_signal(exit_code: int | None) -> Kind:
    """What the signal that ended a process says; `exit_code` is multiprocessing's, -9 for SIGKILL.

    UNKNOWN for a process that ended by itself.
    """
    if exit_code == -_SIGKILL:
        return KILLED
    return CRASHED if exit_code is not None and -exit_code in _CRASHES else UNKNOWN


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
