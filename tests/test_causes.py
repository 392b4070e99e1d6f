"""The first cause of a failed start, out of logs as vLLM writes them."""

from __future__ import annotations

import pytest

from ichat_lifecycle.causes import CAUSE_LIMIT, first_cause, start_error
from ichat_lifecycle.errors import (
    ArgumentsError,
    DeadlineError,
    ExitCode,
    InputMissingError,
    LifecycleError,
    LimitError,
    StartError,
)

ECHO = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): "
    "{'EngineCore': 1}"
)
NEW = "(EngineCore pid=12) ERROR 11-22 16:00:00 [core.py:1510] "
WORKER = "(Worker_TP0 pid=13) ERROR 11-22 16:00:00 [multiproc_executor.py:953] "
OLD = "ERROR 11-22 16:00:00 [core.py:708] "
MEMORY = (
    "ValueError: Available memory on node 0 (6.64/7.96 GiB) on startup is less than desired CPU "
    "memory utilization (0.92, 7.32 GiB). Decrease --gpu-memory-utilization"
)
MISSING = "OSError: /models/x does not appear to have a file named pytorch_model.bin"
UNKNOWN = (
    "1 validation error for ModelConfig\n  Value error, Model architectures ['FooForCausalLM'] are "
    "not supported for now. Supported architectures: dict_keys(['AfmoeForCausalLM'"
    + ", 'Other'" * 2000
    + "])"
)


def log(prefix: str, cause: str, *after: str) -> list[str]:
    """A child's log, from its traceback on to the echoes of its parents."""
    return [
        "(EngineCore pid=12) INFO 11-22 15:59:59 [core.py:110] Initializing a V1 LLM engine",
        "(EngineCore pid=12) WARNING 11-22 15:59:59 [x.py:1] Error: not at the start of a line",
        prefix + "EngineCore failed to start.",
        prefix + "Traceback (most recent call last):",
        prefix + '  File "/x/vllm/v1/engine/core.py", line 1480, in run_engine_core',
        prefix + "    raise ValueError(",
        prefix + cause,
        *after,
        "(EngineCore pid=12) Process EngineCore:",
        "(EngineCore pid=12) Traceback (most recent call last):",
        "(EngineCore pid=12) RuntimeError: something that followed from it",
    ]


class ValidationError(ValueError):
    """As pydantic's."""


class LocalEntryNotFoundError(OSError):
    """As huggingface_hub's."""


@pytest.mark.parametrize("prefix", [NEW, WORKER, OLD, "(EngineCore pid=12) ", ""])
@pytest.mark.parametrize("cause", [MEMORY, "torch.OutOfMemoryError: CUDA out of memory. Tried"])
def test_the_first_exception_of_a_log(prefix: str, cause: str) -> None:
    """In each form of a line; without the module's path; not what followed from it."""
    assert first_cause(log(prefix, cause)) == cause.removeprefix("torch.")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["INFO 11-22 16:00:00 [a.py:1] all is well"],
        [f"(APIServer pid=1) RuntimeError: {ECHO}"],
        ["Exception: WorkerProc initialization failed due to an exception in a background process"],
        ["we saw ValueError: in a text", "    ValueError(", "KeyError"],
    ],
)
def test_a_log_without_a_cause(lines: list[str]) -> None:
    assert first_cause(lines) is None


def test_a_workers_cause_comes_before_its_parents_echo() -> None:
    """A worker fails, EngineCore says so, the server says so: the worker's words count."""
    lines = [
        WORKER + "torch.OutOfMemoryError: CUDA out of memory.",
        NEW + "Exception: WorkerProc initialization failed due to an exception in a background",
        f"(APIServer pid=1) RuntimeError: {ECHO}",
    ]
    assert first_cause(lines) == "OutOfMemoryError: CUDA out of memory."
    assert first_cause(lines[::-1]) == "OutOfMemoryError: CUDA out of memory."


KINDS: dict[str, tuple[type[LifecycleError], int]] = {
    "out_of_memory": (LimitError, 71),
    "kv_cache_too_small": (LimitError, 71),
    "system_limit": (LimitError, 71),
    "input_missing": (InputMissingError, 66),
    "input_unreadable": (InputMissingError, 66),
    "model_unsupported": (StartError, 70),
    "bad_engine_arguments": (ArgumentsError, 2),
    "engine_start_failed": (StartError, 70),
}
# Causes that stand in a child's log, and what of them has to be told.
LOGGED = [
    (MEMORY, "out_of_memory", MEMORY),
    ("torch.OutOfMemoryError: CUDA out of memory.", "out_of_memory", "OutOfMemoryError"),
    ("ValueError: No available memory for the cache blocks.", "kv_cache_too_small", "No avail"),
    (
        "ValueError: To serve at least one request with the model's max seq len (4096), (0.5 GiB "
        "KV cache is needed, which is larger than the available KV cache memory (0.1 GiB).",
        "kv_cache_too_small",
        "0.5 GiB",
    ),
    ("OSError: [Errno 24] Too many open files", "system_limit", "Errno 24"),
    (MISSING, "input_missing", MISSING),
    ("RuntimeError: Cannot find any model weights with `/x`", "input_missing", "`/x`"),
    ("PermissionError: [Errno 13] Permission denied: '/x'", "input_unreadable", "'/x'"),
    ("AssertionError: a bug", "engine_start_failed", "AssertionError: a bug"),
]
# Causes that reach the loading thread as they are, before there is a child.
RAISED = [
    (MemoryError(), "out_of_memory", "MemoryError"),
    (FileNotFoundError(2, "No such file or directory", "/x"), "input_missing", "'/x'"),
    (LocalEntryNotFoundError("Cannot find a snapshot"), "input_missing", "a snapshot"),
    (
        ValidationError("1 validation error for CacheConfig\ngpu_memory_utilization\n  Input"),
        "bad_engine_arguments",
        "ValidationError: 1 validation error for CacheConfig gpu_memory_utilization Input",
    ),
    (ValidationError("2 validation errors for X\ndtype"), "bad_engine_arguments", "dtype"),
    (ValueError("(9) is greater than the derived max_model_len"), "bad_engine_arguments", "(9)"),
    (ValidationError(UNKNOWN), "model_unsupported", "FooForCausalLM"),
    (
        ValidationError(
            "1 validation error for ModelConfig\n  Value error, The checkpoint has model type "
            "`foo` but Transformers does not recognize this architecture."
        ),
        "model_unsupported",
        "`foo`",
    ),
    (TypeError("the caller's own"), "engine_start_failed", "TypeError: the caller's own"),
]


def check(found: LifecycleError, code: str, cause: str) -> None:
    """Its class and exit code, its code, the cause in the engine's own words, and a hint."""
    kind, exit_code = KINDS[code]
    assert (type(found), found.exit_code, found.code) == (kind, ExitCode(exit_code), code)
    assert found.root_cause is not None
    assert cause in found.root_cause
    assert len(found.root_cause) <= CAUSE_LIMIT
    assert "\n" not in found.line()
    assert found.hint


@pytest.mark.parametrize(("logged", "code", "cause"), LOGGED)
def test_a_cause_in_a_childs_log(logged: str, code: str, cause: str) -> None:
    """vLLM's own error is an echo: the log has the cause."""
    for prefix in (NEW, WORKER, OLD):
        check(start_error(ECHO, log(prefix, logged)), code, cause)


@pytest.mark.parametrize(("error", "code", "cause"), RAISED)
def test_a_cause_that_is_raised_here(error: Exception, code: str, cause: str) -> None:
    """It counts more than anything a log says."""
    check(start_error(error, log(NEW, "AssertionError: another")), code, cause)


@pytest.mark.parametrize("lines", [[], [NEW + f"RuntimeError: {ECHO}"], ["all is well"]])
def test_an_echo_without_a_cause(lines: list[str]) -> None:
    """Nothing better is known than vLLM's own words, which name the process."""
    check(start_error(ECHO, lines), "engine_start_failed", "Failed core proc(s): {'EngineCore': 1}")


@pytest.mark.parametrize("error", [DeadlineError("late"), InputMissingError("gone")])
def test_an_error_of_ours_stays_as_it_is(error: LifecycleError) -> None:
    assert start_error(error, log(NEW, MEMORY)) is error
