"""A damaged cache of compiled code, recognized by the frames of the error's traceback.

The error itself may be of any kind, and its text never names the cache: "EOFError: Ran out of
input", "SyntaxError: source code string cannot contain null bytes". The next start reads the same
files and fails the same way.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ichat_lifecycle.home import known_home

# Frames that read what an earlier start has compiled: vLLM's, torch's, Triton's and FlashInfer's.
_READS = re.compile(
    r'File "[^"]*/(?:vllm/compilation/\w+'
    r"|torch/_inductor/(?:standalone_compile|codecache|output_code)"
    r"|torch/_inductor/runtime/\w*cache\w*|torch/_functorch/_aot_autograd/\w*cache\w*"
    r'|triton/runtime/cache|flashinfer/jit/\w+)\.py", line \d+,'
    r" in (?:_?load\w*|initialize_cache|_?deserialize\w*|_?lookup\w*|_?read\w*|get_group)$"
    r'|File "[^"]*/triton/compiler/compiler\.py", line \d+, in (?:compile|__init__)$'
)
# What reading a damaged file ends in. Compiling anew in the same frames ends in other errors.
_DAMAGE = re.compile(
    r"^(?:SyntaxError|ValueError|TypeError|KeyError|EOFError|UnpicklingError|JSONDecodeError"
    r"|UnicodeDecodeError|AttributeError|AssertionError|ModuleNotFoundError|BadZipFile)\b"
    r"|file too short|invalid ELF header|PytorchStreamReader failed|corrupt"
)
_BEGIN = "Traceback (most recent call last):"


def damaged(cause: str, lines: Sequence[str]) -> bool:
    """Whether an error came from reading compiled code.

    Args:
        cause: the error, as `TypeName: text`.
        lines: what the engine printed, with its traceback.
    """
    if not _DAMAGE.search(cause):
        return False
    last = next((n for n, line in enumerate(lines) if line.rstrip().endswith(cause)), None)
    if last is None:
        return False
    begin = max((n for n in range(last) if _BEGIN in lines[n]), default=last)
    return any(_READS.search(line.rstrip()) for line in lines[begin:last])


def directories(environ: Mapping[str, str]) -> str:
    """Where compiled code is kept, for a hint."""
    home = known_home() or Path("~")
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    vllm = Path(environ.get("VLLM_CACHE_ROOT") or cache / "vllm") / "torch_compile_cache"
    inductor = environ.get("TORCHINDUCTOR_CACHE_DIR") or _inductor(environ)
    triton = environ.get("TRITON_CACHE_DIR") or str(home / ".triton" / "cache")
    return f"{vllm}, {inductor}, {triton}"


def _inductor(environ: Mapping[str, str]) -> str:
    user = environ.get("LOGNAME") or environ.get("USER") or "USER"
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")  # noqa: PTH118  # as torch
