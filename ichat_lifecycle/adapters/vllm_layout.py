"""Where vLLM keeps the functions this package uses, in each layout it has had.

Only `adapters/vllm_*.py` import vLLM. A layout is chosen by what is there, never by comparing
version strings: a build from source or a fork has any version it likes.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichat_lifecycle.cause_kinds import UNKNOWN, classify
from ichat_lifecycle.errors import LifecycleError, StartError

SUPPORTED_RANGE = "0.27 to 0.33"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name in a module, and the parameters of it that we pass by name or position."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


Places = tuple[Symbol, ...]


def _places(name: str, parameters: tuple[str, ...], *modules: str) -> Places:
    return tuple(Symbol(module, name, parameters) for module in modules)


_ENGINE_ARGS = Symbol("vllm.engine.arg_utils", "AsyncEngineArgs")
_ASYNC_LLM = Symbol("vllm.v1.engine.async_llm", "AsyncLLM")

# Each function of vLLM that we use, by our name for it, at every place where it has been: newest
# first (0.33, 0.29 to 0.32, up to 0.28). The first place that is there is taken.
FUNCTIONS: Mapping[str, Places] = {
    "argument_parser": _places("FlexibleArgumentParser", (), "vllm.utils.argparse_utils"),
    "engine_args": (_ENGINE_ARGS,),
    "engine_client": (_ASYNC_LLM,),
    "usage_context": _places("UsageContext", (), "vllm.usage.usage_lib"),
    "make_arg_parser": _places(
        "make_arg_parser",
        ("parser",),
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "validate_serve_args": _places(
        "validate_parsed_serve_args",
        ("args",),
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "validate_api_args": _places(
        "validate_api_server_args",
        ("args",),
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.launcher",
        "vllm.entrypoints.openai.api_server",
    ),
    "build_app": _places(
        "build_app",
        ("args", "supported_tasks", "model_config"),
        "vllm.entrypoints.launchers.app",
        "vllm.entrypoints.openai.api_server",
    ),
    "init_app_state": _places(
        "init_app_state",
        ("engine_client", "state", "args", "supported_tasks"),
        "vllm.entrypoints.launchers.api_server.app_state",
        "vllm.entrypoints.openai.api_server",
    ),
    "uvicorn_log_config": _places(
        "get_uvicorn_log_config",
        ("args",),
        "vllm.entrypoints.launchers.utils.server_utils",
        "vllm.entrypoints.serve.utils.server_utils",
    ),
    "ssl_refresher": _places(
        "SSLCertRefresher",
        (),
        "vllm.entrypoints.launchers.utils.ssl",
        "vllm.entrypoints.serve.utils.ssl",
    ),
}

# What vLLM's own server also calls where it is there; older ones have no need of it.
OPTIONAL: Mapping[str, Places] = {
    "configure_logging_from_args": _places("configure_logging_from_args", ("args",), "vllm.logger"),
    "load_chat_template": _places(
        "load_chat_template",
        ("chat_template",),
        "vllm.renderers.chat_utils",
        "vllm.entrypoints.chat_utils",
    ),
    "propagate_flash_late_interaction": _places(
        "propagate_flash_late_interaction",
        ("args", "engine_args"),
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
}

# Parameters of the methods we call on classes above.
METHODS: Mapping[str, tuple[Symbol, tuple[str, ...]]] = {
    "from_cli_args": (_ENGINE_ARGS, ("args",)),
    "create_engine_config": (_ENGINE_ARGS, ("usage_context",)),
    "from_vllm_config": (
        _ASYNC_LLM,
        (
            "vllm_config",
            "usage_context",
            "enable_log_requests",
            "aggregate_engine_logging",
            "disable_log_stats",
        ),
    ),
    "shutdown": (_ASYNC_LLM, ("timeout",)),
    "is_sleeping": (_ASYNC_LLM, ()),
    "sleep": (_ASYNC_LLM, ("level",)),
    "wake_up": (_ASYNC_LLM, ("tags",)),
    "reset_prefix_cache": (_ASYNC_LLM, ()),
    "reset_mm_cache": (_ASYNC_LLM, ()),
    "get_supported_tasks": (_ASYNC_LLM, ()),
    "list_loras": (_ASYNC_LLM, ()),
    "collective_rpc": (_ASYNC_LLM, ("method",)),
}

# Imported one by one, so that a stop during the import (8 s of a start) is noticed between two.
_IMPORT_STEPS = (
    "torch",
    "transformers",
    "vllm",
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.v1.engine.async_llm",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """What `load` found: vLLM's version and each function by our name for it."""

    version: str
    functions: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(name) from None


def load(checkpoint: Callable[[str], None] = lambda step: None) -> Layout:
    """Imports vLLM and finds the functions; blocks for seconds.

    Args:
        checkpoint: called before each step with its name; may raise to end the import there.

    Raises:
        StartError: vLLM is not installed, cannot be imported, or has neither layout.
    """
    _load_torch_library()
    for module in _IMPORT_STEPS:
        checkpoint(module)
        _import(module)
    vllm = _import("vllm")
    version = str(getattr(vllm, "__version__", "unknown"))
    functions: dict[str, Any] = {}
    for name, places in FUNCTIONS.items():
        checkpoint(name)
        functions[name] = _resolve(places, version)
    for name, places in OPTIONAL.items():
        functions[name] = next((f for place in places if (f := _at(place))), None)
    for method, (owner, parameters) in METHODS.items():
        _check(getattr(_resolve((owner,), version), method, None), method, parameters, version)
    functions["envs"] = _import("vllm.envs")
    functions["platform"] = _import("vllm.platforms").current_platform
    return Layout(version, functions)


def _load_torch_library() -> None:
    """Has the loader do its third of a second of work on torch's library before torch is imported.

    An import does it with the interpreter lock held, and the event loop and the control plane stand
    still; a foreign function is called without. Where that fails, the import does it as ever.
    """
    spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        return
    library = Path(spec.submodule_search_locations[0]) / "lib" / "libtorch_cpu.so"
    dlopen = getattr(ctypes.CDLL(None), "dlopen", None)
    if library.exists() and dlopen is not None:
        dlopen.restype = ctypes.c_void_p
        dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
        dlopen(bytes(library), os.RTLD_LAZY)


def installed() -> bool:
    """Whether there is a vLLM to import, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if not installed():
            raise StartError(
                "vLLM is not installed",
                code="vllm_missing",
                hint="pip install 'ichat-lifecycle[cpu]' or 'ichat-lifecycle[gpu]'",
            ) from error
        raise _broken(error) from error


def _broken(error: ImportError) -> LifecycleError:
    kind = classify(str(error))
    if kind is not UNKNOWN:
        return kind.error(
            "vLLM cannot be imported",
            code=kind.code,
            hint=kind.hint,
            root_cause=str(error),
            category=kind.category,
        )
    return StartError(
        f"vLLM cannot be imported: {error}",
        code="vllm_import_failed",
        hint="with CPU torch, torchvision, torchaudio and torchcodec must not be installed",
    )


def _resolve(places: Places, version: str) -> Any:
    for place in places:
        if (found := _at(place)) is not None:
            _check(found, place.name, place.parameters, version)
            return found
    wanted = " or ".join(f"{place.module}.{place.name}" for place in places)
    raise _unsupported(version, f"{wanted} is missing")


def _at(place: Symbol) -> Any | None:
    """What is at this place; None where there is no such module or name."""
    try:
        return getattr(importlib.import_module(place.module), place.name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and place.module.startswith(error.name):
            return None
        raise _broken(error) from error
    except ImportError as error:
        raise _broken(error) from error


def _check(found: Any, name: str, parameters: tuple[str, ...], version: str) -> None:
    if found is None:
        raise _unsupported(version, f"{name} is missing")
    if not parameters:
        return
    signature = inspect.signature(found).parameters
    missing = [parameter for parameter in parameters if parameter not in signature]
    if missing:
        raise _unsupported(version, f"{name} has no parameter {', '.join(missing)}")


def _unsupported(version: str, what: str) -> StartError:
    return StartError(
        f"vLLM {version} is not supported: {what}",
        code="vllm_unsupported",
        hint=f"install a vLLM from {SUPPORTED_RANGE}",
    )
