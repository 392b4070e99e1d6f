"""The classes of causes that keep an engine from running: how each is recognized in the text of an
error, what the process ends with, and what to do about it.

Anything that another process printed is only searched for patterns, and never obeyed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ichat_lifecycle import certificates, compile_cache
from ichat_lifecycle.errors import (
    ArgumentsError,
    Category,
    InputMissingError,
    LifecycleError,
    LimitError,
    StartError,
)

# What moves the directories that vLLM and its libraries write to.
CACHES = (
    "TMPDIR, XDG_CACHE_HOME, VLLM_CACHE_ROOT, TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR, HF_HOME"
)
SHM_HINT = (
    "/dev/shm is too small or full: enlarge it (docker run --shm-size, an emptyDir with"
    " medium: Memory at /dev/shm), and remove what other processes have left in it"
)
_OWN_CACHE_PATH = (
    r"(?:/\.(?:cache|config)/vllm\b|/modelinfos\b|/\.triton\b|torchinductor|torch_compile_cache)"
)
_CACHE_PATH = (
    r"(?:/\.(?:cache|config|triton|local|nv|humming|cupy)\b|torchinductor|torch_extensions"
    r"|torch_compile_cache|torch_aot_compile)"
)

# 'PATH', "PATH", or PATH: as the first word of a loader's message.
_QUOTED_PATH = re.compile(r"['\"](/[^'\"]+)['\"]|(/[^\s'\":]+): failed to map segment")
SHM_NEEDED = 64 << 20  # bytes; vLLM asks for 160 MiB, of which it touches what messages need

# Their texts are those of a damaged cache, too; where the error came from decides.
_ALSO_OF_CACHES = ("model_corrupt", "model_config_invalid", "kernel_failed")
_DAMAGED_CACHE = re.compile(r"Compile cache file corrupted|corrupted compilation artifact")

_SIGKILL, _SIGBUS = 9, 7
_CRASHES = frozenset({4, 6, _SIGBUS, 8, 11})  # SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV


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


# What the hub's client, transformers and vLLM say, each of whom hides what the one below has said.
# The most exact comes first.
HUB_KINDS = (
    _kind(
        r"trying to access a gated repo|Cannot access gated repo|\bGatedRepoError\b"
        r"|Invalid credentials in Authorization header",
        InputMissingError,
        "hub_denied",
        "accept the model's terms at the hub, and set HF_TOKEN to a token that may read it",
        Category.MODEL,
    ),
    _kind(
        r"429 Too Many Requests(?: for url|: you have reached your)"
        r"|429 Client Error: Too Many Requests for url: \S*(?:huggingface|hf\.co)",
        StartError,
        "hub_busy",
        "the hub takes no more requests from this address for now: start again later, or set"
        " HF_TOKEN, whose limit is higher",
        Category.MODEL,
    ),
    _kind(
        r"couldn't connect to '[^']*' to load (?:this file|the (?:files|model))"
        r"|There was a specific connection error when trying to load"
        r"|error happened while trying to locate the files? on the Hub"
        r"|cannot find the requested files in the local cache",
        StartError,
        "hub_unreachable",
        "start again once the hub answers; see HF_ENDPOINT and HTTPS_PROXY, SSL_CERT_FILE where a"
        " proxy has a certificate of its own, and HF_TOKEN where a token is asked for",
        Category.MODEL,
    ),
)
HUB_UNREACHABLE = HUB_KINDS[-1]
# Errors of the network, which say nothing of the hub themselves.
_NETWORK = re.compile(
    r"^\w*(?:Connect|Proxy|Read|SSL|Timeout|RemoteProtocol|MaxRetry|HTTPStatus)\w*: "
)
_LOOKS_UP = re.compile(r"Invalid repository ID or local directory")
INPUT_MISSING = _kind(
    r"No such file or directory|does not appear to have a file named|is not a valid git identifier"
    r"|LocalEntryNotFoundError|Invalid repository ID or local directory"
    r"|Cannot find any model weights",
    InputMissingError,
    "input_missing",
    "check --model-path; offline, the model has to be a complete local directory",
    Category.MODEL,
)

CERTIFICATES = _kind(
    r"no certificate or crl found",
    ArgumentsError,
    "certificates_unusable",
    f"see {', '.join(certificates.VARIABLES)}: {certificates.HINT}",
    Category.CONFIGURATION,
)
# OpenSSL's error does not have the name of the file.
_NO_NAME = re.compile(r"Error: (?:\[Errno \d+\] )?(?:No such file or directory|Permission denied)$")

# The first that fits counts.
KINDS = (
    # The system's own limits come first: their texts hold words of the classes below, such as the
    # "No such file or directory" of a compiler that is missing.
    _kind(
        r"Insufficient space in /dev/shm|insufficient shared memory|out of shared memory"
        r"|unable to (?:open shared memory object|write to file) </?\w+>.*No space left on device"
        r"|No space left on device.*(?:/dev/shm|/psm_|/torch_|/sem\.)"
        r"|(?:/dev/shm|/psm_|/torch_|/sem\.).*No space left on device",
        LimitError,
        "shared_memory_full",
        SHM_HINT,
        Category.MEMORY,
    ),
    _kind(
        r"No space left on device|\bENOSPC\b|Disk quota exceeded|\bEDQUOT\b"
        r"|\[Errno 27\] File too large|Not enough free disk space",
        LimitError,
        "disk_full",
        f"free some space{{place}}, raise the quota, or move what is written: {CACHES}",
        Category.CONFIGURATION,
    ),
    _kind(
        r"can't start new thread|pthread_create failed|Thread creation failed"
        r"|failed to (?:create|spawn) (?:a )?(?:new )?(?:thread|process)"
        r"|(?<!Again: )Resource temporarily unavailable",
        LimitError,
        "too_many_processes",
        "raise the limit on processes and threads (ulimit -u, a container's --pids-limit or"
        " podPidsLimit, systemd's TasksMax), or start fewer of them (OMP_NUM_THREADS)",
        Category.CONFIGURATION,
    ),
    _kind(
        r"Too many open files",
        LimitError,
        "too_many_files",
        "raise the limit on open files (ulimit -n, systemd's LimitNOFILE)",
        Category.CONFIGURATION,
    ),
    _kind(
        r"failed to map segment from shared object(?!.*Cannot allocate memory)",
        StartError,
        "noexec_mount",
        f"compiled code may not be executed{{place}}, which is mounted noexec: mount it with exec,"
        f" or move it elsewhere: {CACHES}",
        Category.PERMISSION,
    ),
    _kind(
        r"Read-only file system|\bEROFS\b",
        StartError,
        "read_only",
        f"mount a writable file system{{place}}, or move what is written: HOME, {CACHES}",
        Category.PERMISSION,
    ),
    _kind(
        r"No working C\+\+ compiler|InvalidCxxCompiler|Failed to find C compiler"
        r"|(?:\bg\+\+|\bgcc|\bcc|\bc\+\+|clang(?:\+\+)?|nvcc|ninja|ptxas)[\d.-]*['\"]?:"
        r" (?:command )?not found"
        r"|No such file or directory: '[^']*?(?:g\+\+|gcc|cc|c\+\+|clang(?:\+\+)?|nvcc|ninja|ptxas)"
        r"[\d.-]*'"
        r"|Ninja is required|Could not find nvcc|CUDA_HOME environment variable is not set",
        StartError,
        "compiler_missing",
        "torch compiles code while the engine starts: install a C++ compiler (g++; for kernels on a"
        " GPU nvcc and ninja, too), name it with CXX and CC, or compile nothing with"
        " --enforce-eager",
        Category.CONFIGURATION,
    ),
    _kind(
        r"returned non-zero exit status 127\b"
        r"|No such file or directory: '(?:[^']*/)?(?:lscpu|numactl|git|nvidia-smi|rocminfo)'",
        StartError,
        "program_missing",
        "install the program that the message names, or put its directory on PATH",
        Category.CONFIGURATION,
    ),
    _kind(
        r"could not determine (?:the )?home directory|uid not found"
        r"|No username set in the environment",
        StartError,
        "no_home",
        "this user has no entry in /etc/passwd: set HOME and USER",
        Category.CONFIGURATION,
    ),
    _kind(
        r"UnicodeDecodeError: '(?!utf-?8)[\w-]+' codec can't decode",
        StartError,
        "not_utf8",
        "the locale is not one of UTF-8, in which libraries read their files: set PYTHONUTF8=1",
        Category.CONFIGURATION,
    ),
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
        r"appears to be a URI",
        ArgumentsError,
        "service_link",
        "Kubernetes sets such variables for a Service of this name: set enableServiceLinks: false"
        " in the Pod's spec, or rename the Service",
        Category.CONFIGURATION,
    ),
    # One of the ports that the engine takes for itself, mostly at random: the next start finds
    # others, or the same ones once their holder has ended. So it is worth another try.
    _kind(
        r"Address already in use|EADDRINUSE|Cannot assign requested address|EADDRNOTAVAIL",
        StartError,
        "engine_port_unavailable",
        "start again; where it stays like this, end what holds the port, or choose others with"
        " VLLM_PORT, --master-port and VLLM_HOST_IP",
        Category.PORT,
    ),
    _kind(
        rf"Permission denied.*{_CACHE_PATH}|{_CACHE_PATH}.*Permission denied"
        r"|PermissionError at .*when downloading"
        # What could not be made is missing when it is written to.
        rf"|(?:No such file or directory|Not a directory): '[^']*{_OWN_CACHE_PATH}",
        StartError,
        "cache_unwritable",
        "this user cannot write there{place}: set HOME, or XDG_CACHE_HOME, VLLM_CACHE_ROOT and"
        " HF_HOME, to a directory that it can write",
        Category.PERMISSION,
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
    *HUB_KINDS,
    CERTIFICATES,
    _kind(
        r"Repository Not Found|is not a valid model identifier",
        InputMissingError,
        "input_missing",
        "check --model-path; a private repository is found with HF_TOKEN alone",
        Category.MODEL,
    ),
    INPUT_MISSING,
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
OUT_OF_SHARED_MEMORY = _kind("", LimitError, "shared_memory_full", SHM_HINT, Category.MEMORY)
COMPILE_CACHE = _kind(
    "",
    StartError,
    "compile_cache_corrupt",
    "a cache of compiled code is damaged, and each start would read it again: remove {caches}",
    Category.CONFIGURATION,
)
CRASHED = _kind(
    "",
    StartError,
    "kernel_failed",
    "compiled code crashed: check that vLLM, torch and the driver fit this machine, and that"
    " /dev/shm is not full",
    Category.KERNEL,
)


def classify(text: str) -> Kind:
    """The kind of cause that a text describes, its hint completed; UNKNOWN for none of them."""
    flat = " ".join(text.split())
    kind = next((kind for kind in KINDS if kind.pattern.search(flat)), UNKNOWN)
    if _NO_NAME.search(flat) and (wrong := certificates.unusable(os.environ)):
        return replace(CERTIFICATES, hint=f"{', '.join(wrong)}: {certificates.HINT}")
    if kind is HUB_UNREACHABLE and _is_offline():
        return INPUT_MISSING
    if "{place}" not in kind.hint:
        return kind
    return replace(kind, hint=kind.hint.replace("{place}", _place(flat)))


def of_the_hub(kind: Kind, error: str, others: Sequence[str]) -> Kind:
    """The kind of a failed load's error, looked at again with the errors around it.

    A hub that cannot be reached for a moment is no model that is missing: the same start succeeds
    later.
    """
    looked_up = kind is INPUT_MISSING and _LOOKS_UP.search(error)
    unclear = looked_up or (kind is UNKNOWN and _NETWORK.search(error))
    if not (unclear or kind in HUB_KINDS) or _is_offline():
        return kind
    for one in HUB_KINDS:
        if any(one.pattern.search(text) for text in (error, *others)):
            return one
    return HUB_UNREACHABLE if looked_up and any(map(_NETWORK.search, others)) else kind


def _is_offline() -> bool:
    """As the hub's client reads it: nothing is asked for, so what is not there is missing."""
    given = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return given.upper() in ("1", "ON", "YES", "TRUE")


def in_context(kind: Kind, cause: str, lines: Sequence[str]) -> Kind:
    """The kind of a cause, looked at again with what was printed around it."""
    if kind is not UNKNOWN and kind.code not in _ALSO_OF_CACHES:
        return kind
    if not (_DAMAGED_CACHE.search(cause) or compile_cache.damaged(cause, lines)):
        return kind
    where = compile_cache.directories(os.environ)
    return replace(COMPILE_CACHE, hint=COMPILE_CACHE.hint.replace("{caches}", where))


def by_signal(exit_code: int | None) -> Kind:
    """Return the kind for a process that a signal ended; `exit_code` is -9 for SIGKILL.

    UNKNOWN for a process that ended by itself.
    """
    if exit_code == -_SIGKILL:
        return KILLED
    if exit_code == -_SIGBUS and _shared_memory_is_short():
        return OUT_OF_SHARED_MEMORY
    return CRASHED if exit_code is not None and -exit_code in _CRASHES else UNKNOWN


def _shared_memory_is_short() -> bool:
    """Whether /dev/shm cannot hold what an engine shares: a page that does not fit is a SIGBUS."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return True
    return found.f_bavail * found.f_frsize < SHM_NEEDED


def _place(text: str) -> str:
    """The path in a text, with the mount that it is on; "" without one.

    The mount is looked up in the kernel's list: a dead file server would not answer `stat`.
    """
    found = _QUOTED_PATH.search(text)
    if found is None:
        return ""
    path = os.path.normpath(found[1] or found[2])
    mount = _mount_of(path)
    return f" at {path}" + (f" (mounted at {mount})" if mount else "")


def _mount_of(path: str) -> str | None:
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    points = (line.split(" ")[1].replace("\\040", " ") for line in lines if line.count(" ") > 1)
    above = (p for p in points if p in ("/", path) or path.startswith(p + "/"))
    return max(above, key=len, default=None)
