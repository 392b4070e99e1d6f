"""The first cause of a failed start, out of logs as vLLM writes them."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from ichat_lifecycle.cause_kinds import by_signal, classify
from ichat_lifecycle.causes import CAUSE_LIMIT, death, first_cause, start_error
from ichat_lifecycle.errors import (
    PERMANENT,
    ArgumentsError,
    Category,
    DeadlineError,
    EngineDiedError,
    ExitCode,
    InputMissingError,
    LifecycleError,
    LimitError,
    StartError,
)
from ichat_lifecycle.journal import Reason

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


class JSONDecodeError(ValueError):
    """As json's."""


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


KINDS: dict[str, tuple[type[LifecycleError], int, str]] = {
    "out_of_memory": (LimitError, 71, "memory"),
    "kv_cache_too_small": (LimitError, 71, "memory"),
    "shared_memory_full": (LimitError, 71, "memory"),
    "disk_full": (LimitError, 71, "configuration"),
    "too_many_processes": (LimitError, 71, "configuration"),
    "too_many_files": (LimitError, 71, "configuration"),
    "noexec_mount": (StartError, 70, "permission"),
    "read_only": (StartError, 70, "permission"),
    "cache_unwritable": (StartError, 70, "permission"),
    "compiler_missing": (StartError, 70, "configuration"),
    "program_missing": (StartError, 70, "configuration"),
    "no_home": (StartError, 70, "configuration"),
    "not_utf8": (StartError, 70, "configuration"),
    "service_link": (ArgumentsError, 2, "configuration"),
    "engine_port_unavailable": (StartError, 70, "port"),
    "input_missing": (InputMissingError, 66, "model"),
    "hub_denied": (InputMissingError, 66, "model"),
    "hub_busy": (StartError, 70, "model"),
    "hub_unreachable": (StartError, 70, "model"),
    "certificates_unusable": (ArgumentsError, 2, "configuration"),
    "input_unreadable": (InputMissingError, 66, "permission"),
    "model_corrupt": (InputMissingError, 66, "model"),
    "model_config_invalid": (InputMissingError, 66, "model"),
    "tokenizer_missing": (InputMissingError, 66, "model"),
    "model_unsupported": (StartError, 70, "model"),
    "bad_engine_arguments": (ArgumentsError, 2, "configuration"),
    "kernel_failed": (StartError, 70, "kernel"),
    "engine_killed": (StartError, 70, "unknown"),
    "engine_start_failed": (StartError, 70, "unknown"),
}
HEADER = "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: "
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
    ("OSError: [Errno 24] Too many open files", "too_many_files", "Errno 24"),
    (MISSING, "input_missing", MISSING),
    ("RuntimeError: Cannot find any model weights with `/x`", "input_missing", "`/x`"),
    ("PermissionError: [Errno 13] Permission denied: '/x'", "input_unreadable", "'/x'"),
    ("AssertionError: a bug", "engine_start_failed", "AssertionError: a bug"),
    # A real engine's words on weights that end half way, begin with noise, or are a Git LFS
    # pointer; with a header of noise; and of no byte at all.
    (HEADER + "incomplete metadata, file not fully covered", "model_corrupt", "incomplete"),
    (HEADER + "header too large", "model_corrupt", "SafetensorError: Error while"),
    (
        HEADER + "invalid JSON in header: expected value at line 1 column 1",
        "model_corrupt",
        "invalid JSON in header",
    ),
    (HEADER + "header too small", "model_corrupt", "header too small"),
    # ZeroMQ's, torch.distributed's and Python's own, on a port that was really taken.
    (
        "zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:42695')",
        "engine_port_unavailable",
        "ZMQError: Address already in use",
    ),
    (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local "
        "network address. port: 42695, useIpv6: false, code: -98, name: EADDRINUSE, message: "
        "address already in use",
        "engine_port_unavailable",
        "port: 42695",
    ),
    (
        "OSError: [Errno 99] Cannot assign requested address",
        "engine_port_unavailable",
        "Errno 99",
    ),
    # Torch's own, on an allocation of 4 PiB.
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 4503599627370496 bytes. Error code 12 (Cannot "
        "allocate memory)",
        "out_of_memory",
        "4503599627370496",
    ),
    ("torch.AcceleratorError: CUDA error: out of memory", "out_of_memory", "CUDA error"),
    (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the "
        "device",
        "kernel_failed",
        "no kernel image",
    ),
    (
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "kernel_failed",
        "illegal memory access",
    ),
    (
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456, "
        "Hardware limit: 101376. Reducing block sizes or `num_stages` may help.",
        "kernel_failed",
        "OutOfResources: out of resource",
    ),
    (
        "RuntimeError: Triton Error [CUDA]: device kernel image is invalid",
        "kernel_failed",
        "Triton Error",
    ),
    (
        "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory",
        "kernel_failed",
        "libcudart",
    ),
    ("OSError: /x/_C.abi3.so: undefined symbol: _ZN3c10", "kernel_failed", "undefined symbol"),
    # What a real engine says where the system withholds something.
    (
        "RuntimeError: Insufficient space in /dev/shm for shared-memory allocation: 160 MiB "
        "required, 16 MiB free. Increase /dev/shm (e.g. --shm-size or --ipc=host).",
        "shared_memory_full",
        "160 MiB required",
    ),
    (
        "RuntimeError: unable to write to file </torch_1_2_3>: No space left on device (28)",
        "shared_memory_full",
        "torch_1_2_3",
    ),
    (
        "RuntimeError: unable to open shared memory object </torch_1_2_3> in read-write mode: No "
        "space left on device (28)",
        "shared_memory_full",
        "read-write mode",
    ),
    ("OSError: [Errno 28] No space left on device: '/psm_9d3ac1f2'", "shared_memory_full", "psm_"),
    ("OSError: [Errno 28] No space left on device: '/data/x'", "disk_full", "'/data/x'"),
    ("OSError: [Errno 122] Disk quota exceeded: '/home/u/x'", "disk_full", "quota"),
    ("OSError: [Errno 27] File too large: '/home/u/x'", "disk_full", "too large"),
    ("RuntimeError: No space left on device (os error 28)", "disk_full", "os error"),
    ("RuntimeError: can't start new thread", "too_many_processes", "new thread"),
    (
        "BlockingIOError: [Errno 11] Resource temporarily unavailable",
        "too_many_processes",
        "Errno 11",
    ),
    (
        "ImportError: /scratch/a/cx.so: failed to map segment from shared object: Operation not "
        "permitted",
        "noexec_mount",
        "cx.so",
    ),
    ("OSError: /scratch/x.so: failed to map segment from shared object", "noexec_mount", "x.so"),
    (
        "ImportError: /x/y.so: failed to map segment from shared object: Cannot allocate memory",
        "out_of_memory",
        "y.so",
    ),
    ("OSError: [Errno 30] Read-only file system: '/root/.cache/vllm'", "read_only", "Errno 30"),
    (
        "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
        "torch._inductor.config.cpp.cxx: (None, 'g++')",
        "compiler_missing",
        "'g++'",
    ),
    ("RuntimeError: Failed to find C compiler. Please specify via CC", "compiler_missing", "CC"),
    (
        "FileNotFoundError: [Errno 2] No such file or directory: 'ninja'",
        "compiler_missing",
        "ninja",
    ),
    (
        "FileNotFoundError: [Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'",
        "compiler_missing",
        "nvcc",
    ),
    (
        "FileNotFoundError: [Errno 2] No such file or directory: '/models/gcc-docs/config.json'",
        "input_missing",
        "config.json",
    ),
    ("PermissionError: [Errno 13] Permission denied: '/.cache'", "cache_unwritable", "'/.cache'"),
    (
        "PermissionError: [Errno 13] Permission denied: '/tmp/torchinductor_root/ab'",
        "cache_unwritable",
        "torchinductor",
    ),
    (
        "subprocess.CalledProcessError: Command 'lscpu --json --extended=CPU,CORE,NODE --online' "
        "returned non-zero exit status 127.",
        "program_missing",
        "lscpu",
    ),
    (
        "FileNotFoundError: [Errno 2] No such file or directory: '/.cache/vllm/modelinfos'",
        "cache_unwritable",
        "modelinfos",
    ),
    (
        "FileNotFoundError: [Errno 2] No such file or directory: '/root/.cache/huggingface/hub/x'",
        "input_missing",
        "huggingface",
    ),
    ("RuntimeError: could not determine home directory", "no_home", "home"),
    (
        "UnicodeDecodeError: 'ascii' codec can't decode byte 0xe2 in position 602: ordinal not in",
        "not_utf8",
        "ascii",
    ),
    (
        "UnicodeDecodeError: 'gbk' codec can't decode byte 0x94 in position 5: illegal multibyte",
        "not_utf8",
        "gbk",
    ),
    ("KeyError: 'getpwuid(): uid not found: 12345'", "no_home", "12345"),
    (
        "ValueError: VLLM_PORT 'tcp://10.96.0.1:8000' appears to be a URI. This may be caused by",
        "service_link",
        "10.96.0.1",
    ),
    ("Fatal Python error: Illegal instruction", "kernel_failed", "Illegal instruction"),
    (
        "NotImplementedError: \"rms_norm\" not implemented for 'Half'",
        "kernel_failed",
        "rms_norm",
    ),
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
    # A real engine's words on a config.json that is none, on a tokenizer.json that is none, on a
    # model without its tokenizer's files, and on one of an unknown type.
    (
        OSError("It looks like the config file at '/x/config.json' is not a valid JSON file."),
        "model_config_invalid",
        "'/x/config.json'",
    ),
    (
        JSONDecodeError("Expecting property name enclosed in double quotes: line 1 column 2"),
        "model_config_invalid",
        "JSONDecodeError: Expecting property name",
    ),
    (
        ValueError(
            "Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` library "
            "serialization file, \n(2) a slow tokenizer instance to convert or \n(3) an equivalent "
            "slow tokenizer class to instantiate and convert. \nYou need to have sentencepiece or "
            "tiktoken installed to convert a slow tokenizer to a fast one."
        ),
        "tokenizer_missing",
        "Couldn't instantiate the backend tokenizer",
    ),
    (
        ValidationError(
            "1 validation error for ModelConfig\n  Value error, The checkpoint you are trying to "
            "load has model type `nonsense` but Transformers does not recognize this architecture."
        ),
        "model_unsupported",
        "`nonsense`",
    ),
    (PermissionError(13, "Permission denied", "/x"), "input_unreadable", "'/x'"),
    (AssertionError("Torch not compiled with CUDA enabled"), "kernel_failed", "not compiled"),
    (TypeError("the caller's own"), "engine_start_failed", "TypeError: the caller's own"),
]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nobody who runs these tests has to be."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def check(found: LifecycleError, code: str, cause: str) -> None:
    """Its class and exit code, its code, the cause in the engine's own words, and a hint."""
    kind, exit_code, category = KINDS[code]
    assert (type(found), found.exit_code, found.code) == (kind, ExitCode(exit_code), code)
    assert found.category == category
    assert Reason.of(found).as_dict()["category"] == category
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


# --- a hub that does not give the model; the words are those of vLLM 0.32 with a hub that was made
# to answer so

COULD_NOT = OSError(
    "We couldn't connect to 'http://hub.invalid' to load the files, and couldn't find them in the "
    "cached files.\nCheck your internet connection or see how to run the library in offline mode "
    "at 'https://huggingface.co/docs/transformers/installation#offline-mode'."
)
INVALID = ValueError(
    "Invalid repository ID or local directory specified: 'org/name'.\nPlease verify"
)
NOT_LOCATED = LocalEntryNotFoundError(
    "An error happened while trying to locate the file on the Hub and we cannot find the requested "
    "files in the local cache. Please check your connection and try again"
)
NO_HUB = LocalEntryNotFoundError(
    "Response from http://portal/config.json is missing the 'X-Repo-Commit' header, so it does not "
    "seem to be served by a Hugging Face Hub endpoint. We also cannot find the requested files in "
    "the local cache."
)
UNTRUSTED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
DISABLED = LocalEntryNotFoundError(
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local "
    "disk and outgoing traffic has been disabled."
)
GATED = OSError(
    "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface."
    "co/org/name.\n403 Client Error."
)
BAD_TOKEN = OSError(
    "There was a specific connection error when trying to load org/name:\n401 Client Error.\n"
    "Invalid credentials in Authorization header"
)
PRIVATE = OSError(
    "org/name is not a local folder and is not a valid model identifier listed on "
    "'https://huggingface.co/models'"
)
REVISION = OSError("v9 is not a valid git identifier (branch name, tag name or commit id)")


class ConnectError(Exception):
    """As httpx's."""


class HfHubHTTPError(OSError):
    """As huggingface_hub's."""


def chained(*errors: Exception) -> Exception:
    """The first is raised from the second, and so on."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


BUSY = HfHubHTTPError("\n\n429 Too Many Requests for url: http://hub/org/name/config.json.")
LATER = HfHubHTTPError("Server error '503 Service Unavailable' for url 'http://hub/x'")
NO_NAME = ConnectError("[Errno -2] Name or service not known")


@pytest.mark.parametrize(
    ("errors", "code", "cause", "hint"),
    [
        ((COULD_NOT, NOT_LOCATED, NO_NAME), "hub_unreachable", "Name or service", "HF_ENDPOINT"),
        ((COULD_NOT, NOT_LOCATED, LATER), "hub_unreachable", "503 Service", "HTTPS_PROXY"),
        (
            (COULD_NOT, NOT_LOCATED, ConnectError(UNTRUSTED)),
            "hub_unreachable",
            "(ConnectError: [SSL: CERTIFICATE_VERIFY_FAILED]",
            "SSL_CERT_FILE",
        ),
        ((COULD_NOT, NO_HUB), "hub_unreachable", "X-Repo-Commit", "HF_ENDPOINT"),
        ((COULD_NOT,), "hub_unreachable", "http://hub.invalid", "HF_ENDPOINT"),
        ((INVALID, NO_NAME), "hub_unreachable", "Name or service", "HF_ENDPOINT"),
        ((INVALID, NOT_LOCATED, NO_NAME), "hub_unreachable", "Name or", "HF_ENDPOINT"),
        ((INVALID, KeyError("x")), "input_missing", "org/name", "--model-path"),
        ((INVALID,), "input_missing", "org/name", "--model-path"),
        ((DISABLED,), "input_missing", "traffic", "--model-path"),
        ((COULD_NOT, NOT_LOCATED, BUSY), "hub_busy", "429", "HF_TOKEN"),
        ((GATED,), "hub_denied", "gated repo", "HF_TOKEN"),
        ((BAD_TOKEN,), "hub_denied", "Invalid credentials", "HF_TOKEN"),
        ((PRIVATE,), "input_missing", "org/name", "HF_TOKEN"),
        ((REVISION,), "input_missing", "v9", "--model-path"),
    ],
)
def test_a_hub_that_does_not_give_the_model(
    errors: tuple[Exception, ...], code: str, cause: str, hint: str
) -> None:
    """One that is not up for a moment is worth another start: nobody has to change anything."""
    found = start_error(chained(*errors), ())
    check(found, code, cause)
    assert hint in str(found.hint)
    for error in errors:
        error.__cause__ = None


def test_a_hub_that_a_child_does_not_reach() -> None:
    """It prints what failed before whom that failed: the weights are fetched there."""
    last = f"huggingface_hub.errors.LocalEntryNotFoundError: {NOT_LOCATED}"
    after = [f"httpx2.ConnectError: {UNTRUSTED}", last]
    lines = log(NEW, f"httpcore2.ConnectError: {UNTRUSTED}", *[NEW + text for text in after])
    found = start_error(ECHO, lines)
    check(found, "hub_unreachable", "CERTIFICATE_VERIFY_FAILED")
    assert "on the Hub" in str(found.root_cause)
    another = log(NEW, "AssertionError: a bug", *[NEW + text for text in after])
    check(start_error(ECHO, another), "engine_start_failed", "a bug")


def test_certificates_that_are_not_there_are_no_missing_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenSSL's error names no file; one that names another is about that."""
    nameless = FileNotFoundError(2, "No such file or directory")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    check(start_error(nameless, ()), "input_missing", "No such file")
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such")
    found = start_error(nameless, ())
    check(found, "certificates_unusable", "No such file")
    assert "SSL_CERT_FILE=/no/such" in str(found.hint)
    named = FileNotFoundError(2, "No such file or directory", "/x")
    check(start_error(named, ()), "input_missing", "'/x'")
    library = "libcudart.so.13: cannot open shared object file: No such file or directory"
    check(start_error(ImportError(library), ()), "kernel_failed", "libcudart")
    damaged = OSError("[X509: NO_CERTIFICATE_OR_CRL_FOUND] no certificate or crl found (_ssl.c:1)")
    check(start_error(damaged, ()), "certificates_unusable", "X509")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_a_model_that_is_not_there_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    check(start_error(COULD_NOT, ()), "input_missing", "couldn't connect")
    check(start_error(chained(INVALID, NO_NAME), ()), "input_missing", "org/name")
    INVALID.__cause__ = None


@pytest.mark.parametrize(
    "text",
    [
        "ClientResponseError: 429, message='Too Many Requests', url='http://images/x.png'",
        "HTTPError: 429 Client Error: Too Many Requests for url: http://images/x.png",
        "ConnectError: [Errno 111] Connection refused",
    ],
)
def test_what_a_client_asked_an_engine_to_fetch_is_no_trouble_with_the_hub(text: str) -> None:
    assert classify(text).code == "engine_start_failed"


@pytest.mark.parametrize("lines", [[], [NEW + f"RuntimeError: {ECHO}"], ["all is well"]])
def test_an_echo_without_a_cause(lines: list[str]) -> None:
    """Nothing better is known than vLLM's own words, which name the process."""
    check(start_error(ECHO, lines), "engine_start_failed", "Failed core proc(s): {'EngineCore': 1}")


@pytest.mark.parametrize("error", [DeadlineError("late"), InputMissingError("gone")])
def test_an_error_of_ours_stays_as_it_is(error: LifecycleError) -> None:
    assert start_error(error, log(NEW, MEMORY)) is error


# What a real engine printed on weights that end half way, its tracebacks shortened.
TRUNCATED = """\
(EngineCore pid=4689) INFO 11-22 22:43:36 [core.py:133] Initializing a V1 LLM engine (v0.32.0)
(VllmWorker-0 pid=4697) WARNING 11-22 22:43:48 [vllm.py:725] Model Runner V2 requires Triton
(Worker pid=4697) ERROR 11-22 22:43:48 [multiproc_executor.py:953] WorkerProc failed to start.
(Worker pid=4697) ERROR 11-22 22:43:48 [multiproc_executor.py:953] Traceback (most recent call last)
(Worker pid=4697) ERROR 11-22 22:43:48 [multiproc_executor.py:953]     self.worker.load_model()
(Worker pid=4697) ERROR 11-22 22:43:48 [multiproc_executor.py:953] \
safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete \
metadata, file not fully covered
(EngineCore pid=4689) ERROR 11-22 22:43:49 [core.py:1510] EngineCore failed to start.
(EngineCore pid=4689) ERROR 11-22 22:43:49 [core.py:1510] Exception: WorkerProc initialization \
failed due to an exception in a background process. See stack trace for root cause.
Process EngineCore:
Traceback (most recent call last):
Exception: WorkerProc initialization failed due to an exception in a background process. See \
stack trace for root cause.""".splitlines()


def test_a_real_log_of_truncated_weights() -> None:
    """The worker's own words, not the two echoes of them."""
    cause = "SafetensorError: Error while deserializing header: incomplete metadata, file not fully"
    check(start_error(ECHO, TRUNCATED), "model_corrupt", cause)


# --- an engine that ends


@pytest.mark.parametrize(("number", "code"), [(9, "engine_killed"), (4, "kernel_failed")])
def test_a_start_that_a_signal_ended(number: int, code: str) -> None:
    """It says nothing itself: vLLM's words have the signal."""
    error = RuntimeError(
        "Engine core initialization failed. See root cause above. Failed core proc(s): "
        f"{{'EngineCore': -{number}}}"
    )
    check(start_error(error, []), code, f"{{'EngineCore': -{number}}}")


@pytest.mark.parametrize(
    ("exit_code", "lines", "category", "hint"),
    [
        (-9, [], "unknown", "out-of-memory killer: see dmesg and the container's limits"),
        (-4, [], "kernel", "compiled code crashed"),
        (-7, [], "kernel", "/dev/shm"),
        (-11, [], "kernel", "compiled code crashed"),
        (-15, [], "unknown", "log lines above"),
        (1, [], "unknown", "log lines above"),
        (None, [], "unknown", "log lines above"),
        (1, ["torch.OutOfMemoryError: CUDA out of memory."], "memory", "free memory"),
        (-6, ["torch.OutOfMemoryError: CUDA out of memory."], "memory", "free memory"),
        (-9, ["ValueError: 1 validation error for X"], "unknown", "out-of-memory killer"),
        (1, [NEW + "RuntimeError: Executor failed."], "unknown", "log lines above"),
    ],
)
def test_why_an_engine_died(
    exit_code: int | None, lines: list[str], category: str, hint: str
) -> None:
    """By what it said, or else by its signal: an old error of a user's is not why it was killed."""
    found = death(exit_code, lines)
    assert found.category == category
    assert hint in found.hint


def test_a_workers_end_is_why_its_engine_ends() -> None:
    """EngineCore ends with 1 then, whatever ended the worker."""
    said = "Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor."
    lines = [f"{NEW}{said}", NEW + "RuntimeError: Executor failed."]
    found = death(1, lines)
    assert found.root_cause == said.partition(",")[0]
    assert found.category == "kernel"


# --- an engine that had served for hours

CALLED = "(EngineCore pid=12) ERROR 11-22 16:00:00 [core.py:1750] "
FATAL = "(EngineCore pid=12) ERROR 11-22 16:00:00 [core.py:1512] "
IN_WORKER = "(Worker_TP0 pid=13) ERROR 11-22 16:00:00 [multiproc_executor.py:1063] "
FATAL_WORDS = "EngineCore encountered a fatal error."
WRONG_LORA = "ValueError: Loading lora x failed: No adapter found for /no/such/path"
# As vLLM prints a client's mistake: the worker, and EngineCore that has called it.
SURVIVED = [
    IN_WORKER + "WorkerProc hit an exception.",
    IN_WORKER + "Traceback (most recent call last):",
    IN_WORKER + WRONG_LORA,
    CALLED + "Invocation of add_lora method failed",
    CALLED + "Traceback (most recent call last):",
    CALLED + f"RuntimeError: Worker failed with error '{WRONG_LORA}', please check the stack trace",
]
SURVIVED_IN_ONE_PROCESS = [
    CALLED + "Invocation of add_lora method failed",
    CALLED + "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/path'",
    CALLED + "The above exception was the direct cause of the following exception:",
    CALLED + WRONG_LORA,
]
CUDA = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
IN_A_WORKER = [
    IN_WORKER + "WorkerProc hit an exception.",
    IN_WORKER + CUDA,
    FATAL + "EngineCore encountered a fatal error.",
    FATAL + f"RuntimeError: Worker failed with error '{CUDA}', please check the stack trace above",
]
IN_THE_CORE = [
    FATAL + "EngineCore encountered a fatal error.",
    FATAL + "Traceback (most recent call last):",
    FATAL + CUDA,
    "(EngineCore pid=12) Process EngineCore:",
    "(EngineCore pid=12) ValueError: something that followed from it",
]


@pytest.mark.parametrize("end", [IN_A_WORKER, IN_THE_CORE], ids=["a worker's", "the core's"])
@pytest.mark.parametrize(
    "before", [[], SURVIVED, SURVIVED_IN_ONE_PROCESS, SURVIVED * 3], ids=["", "w", "c", "often"]
)
def test_a_clients_mistake_is_not_why_an_engine_died(before: list[str], end: list[str]) -> None:
    """Also where both come within the same seconds."""
    found = death(1, [*before, *end])
    assert found.root_cause == CUDA.removeprefix("torch.")
    assert found.category == Category.KERNEL


@pytest.mark.parametrize("before", [SURVIVED, SURVIVED_IN_ONE_PROCESS])
def test_a_signal_without_a_word_is_not_explained_by_a_clients_mistake(before: list[str]) -> None:
    found = death(-9, before)
    assert found.root_cause is None
    assert "out-of-memory killer" in found.hint


def test_a_record_in_one_line_is_survived_too() -> None:
    """As vLLM's JSON has it."""
    record = {"levelname": "ERROR", "name": "vllm.v1.engine.core", "process": 12}
    called = json.dumps(
        record | {"message": "Invocation of add_lora method failed", "exc_info": WRONG_LORA}
    )
    fatal = json.dumps(record | {"message": FATAL_WORDS, "exc_info": CUDA})
    assert death(1, [called, fatal]).root_cause == CUDA.removeprefix("torch.")
    assert death(-9, [called]).root_cause is None


@pytest.mark.parametrize("prefix", ["[n1] ", "(n1) ", "node-3 | "])
def test_a_users_own_prefix_hides_no_cause(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the process from 0.29 on, behind it before."""
    monkeypatch.setenv("VLLM_LOGGING_PREFIX", prefix)
    old = NEW.replace("ERROR", f"{prefix}ERROR")
    for form in (prefix + NEW, old, prefix + OLD):
        check(start_error(ECHO, log(form, MEMORY)), "out_of_memory", MEMORY)


def test_every_class_is_reached() -> None:
    """And none but these."""
    assert {category for _, _, category in KINDS.values()} == set(Category)


@pytest.mark.parametrize("text", ["", "all is well", "KeyError: 'x'"])
def test_what_is_not_known_is_unknown(text: str) -> None:
    assert classify(text).category == "unknown"


def test_an_error_without_a_class_shows_none() -> None:
    """What is not an engine's failure: a wrong flag of ours, an engine that sleeps."""
    assert Reason.of(EngineDiedError("x")).category is None
    assert Reason.of(ValueError("x")).as_dict()["category"] is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (
            "OSError: [Errno 28] No space left on device: '/proc/x/y'",
            "/proc/x/y (mounted at /proc)",
        ),
        ("OSError: /proc/a.so: failed to map segment from shared object", "at /proc/a.so (mounted"),
        ("OSError: [Errno 30] Read-only file system: '/proc'", "at /proc (mounted at /proc)"),
    ],
)
def test_the_hint_names_the_path_and_its_mount(text: str, place: str) -> None:
    assert place in classify(text).hint


def test_a_hint_without_a_path_is_complete() -> None:
    hint = classify("RuntimeError: No space left on device (os error 28)").hint
    assert "{" not in hint
    assert "TMPDIR" in hint


@pytest.mark.parametrize(
    ("free", "code"), [(1 << 20, "shared_memory_full"), (1 << 34, "kernel_failed")]
)
def test_a_bus_error_is_a_lack_of_shared_memory_where_there_is_little(
    monkeypatch: pytest.MonkeyPatch, free: int, code: str
) -> None:
    """A page of shared memory that does not fit is no error of a call: the kernel sends SIGBUS."""
    found = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr("ichat_lifecycle.cause_kinds.os.statvfs", lambda path: found)
    assert by_signal(-7).code == code
    assert by_signal(-11).code == "kernel_failed"
    assert by_signal(-9).code == "engine_killed"


def test_an_answer_that_did_not_come_is_no_limit_of_the_system() -> None:
    assert classify("zmq.error.Again: Resource temporarily unavailable").category == "unknown"


def test_an_internal_port_that_is_taken_is_worth_another_start() -> None:
    """Only our own two ports are final for a fleet and for the systemd unit."""
    error = start_error(OSError("[Errno 98] Address already in use"), ())
    assert error.code == "engine_port_unavailable"
    assert error.exit_code not in PERMANENT


VLLM_READS = '  File "/x/vllm/compilation/backends.py", line 194, in initialize_cache'
TORCH_READS = '  File "/x/torch/_inductor/codecache.py", line 2100, in load_by_key_path'
TRITON_READS = '  File "/x/triton/compiler/compiler.py", line 240, in compile'
READS_A_MODEL = '  File "/x/vllm/model_executor/model_loader/utils.py", line 12, in load_weights'


def printed(frame: str, cause: str) -> list[str]:
    begin = "Traceback (most recent call last):"
    return [NEW + begin, NEW + frame, NEW + "    cache = read(file)", NEW + cause]


@pytest.mark.parametrize("frame", [VLLM_READS, TORCH_READS, TRITON_READS])
@pytest.mark.parametrize(
    "cause",
    [
        "SyntaxError: source code string cannot contain null bytes",
        "ValueError: malformed node or string on line 1: <ast.Call object at 0x7fa594f74f70>",
        "EOFError: Ran out of input",
        "_pickle.UnpicklingError: invalid load key, '\\xaa'.",
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "ImportError: /tmp/torchinductor_u/ab/cab.so: file too short",
    ],
)
def test_a_damaged_cache_of_compiled_code_is_named_with_its_directories(
    frame: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any error may come out of it: where it came from shows what it is."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/caches/vllm")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/caches/torch")
    error = start_error(ECHO, printed(frame, cause))
    assert (error.code, error.exit_code) == ("compile_cache_corrupt", 70)
    assert "/caches/vllm/torch_compile_cache, /caches/torch, " in str(error.hint)
    assert "/caches/vllm" in death(None, printed(frame, cause)).hint


@pytest.mark.parametrize(
    ("frame", "cause", "code"),
    [
        (READS_A_MODEL, "UnpicklingError: invalid load key, 'v'.", "model_corrupt"),
        (READS_A_MODEL, "EOFError: Ran out of input", "engine_start_failed"),
        (TORCH_READS, "InvalidCxxCompilerError: No working C++ compiler", "compiler_missing"),
        (TORCH_READS, "RuntimeError: another", "engine_start_failed"),
        (TORCH_READS, "OSError: [Errno 28] No space left on device", "disk_full"),
    ],
)
def test_other_errors_near_a_cache_stay_what_they_are(frame: str, cause: str, code: str) -> None:
    assert start_error(ECHO, printed(frame, cause)).code == code
    elsewhere = [*printed(VLLM_READS, "KeyError: 1"), *printed(READS_A_MODEL, cause)]
    assert start_error(ECHO, elsewhere[4:]).code == code
