"""Where vLLM keeps the functions this package uses, in each layout it has had.

Only `adapters/vllm_*.py` import vLLM. A layout is chosen by what is there, never by comparing
version strings: a build from source or a fork has any version it likes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ichat_lifecycle.errors import StartError

SUPPORTED_RANGE = "0.27 to 0.33"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name in a module, and the parameters of it that we pass by name or position."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


_ENGINE_ARGS = "vllm.engine.arg_utils"
_ASYNC_LLM = "vllm.v1.engine.async_llm"

COMMON: Mapping[str, Symbol] = {
    "argument_parser": Symbol("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    "engine_args": Symbol(_ENGINE_ARGS, "AsyncEngineArgs"),
    "engine_client": Symbol(_ASYNC_LLM, "AsyncLLM"),
    "usage_context": Symbol("vllm.usage.usage_lib", "UsageContext"),
}

# The same functions in both layouts, at different places.
_BUILD_APP = ("args", "supported_tasks", "model_config")
_INIT_STATE = ("engine_client", "state", "args", "supported_tasks")

SINCE_0_29: Mapping[str, Symbol] = {
    "make_arg_parser": Symbol(
        "vllm.entrypoints.launchers.cli_args", "make_arg_parser", ("parser",)
    ),
    "validate_serve_args": Symbol(
        "vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args", ("args",)
    ),
    "validate_api_args": Symbol(
        "vllm.entrypoints.launchers.launcher", "validate_api_server_args", ("args",)
    ),
    "build_app": Symbol("vllm.entrypoints.launchers.app", "build_app", _BUILD_APP),
    "init_app_state": Symbol(
        "vllm.entrypoints.launchers.api_server.app_state", "init_app_state", _INIT_STATE
    ),
    "uvicorn_log_config": Symbol(
        "vllm.entrypoints.launchers.utils.server_utils", "get_uvicorn_log_config", ("args",)
    ),
    "ssl_refresher": Symbol("vllm.entrypoints.launchers.utils.ssl", "SSLCertRefresher"),
}

UNTIL_0_28: Mapping[str, Symbol] = {
    "make_arg_parser": Symbol("vllm.entrypoints.openai.cli_args", "make_arg_parser", ("parser",)),
    "validate_serve_args": Symbol(
        "vllm.entrypoints.openai.cli_args", "validate_parsed_serve_args", ("args",)
    ),
    "validate_api_args": Symbol(
        "vllm.entrypoints.openai.api_server", "validate_api_server_args", ("args",)
    ),
    "build_app": Symbol("vllm.entrypoints.openai.api_server", "build_app", _BUILD_APP),
    "init_app_state": Symbol("vllm.entrypoints.openai.api_server", "init_app_state", _INIT_STATE),
    "uvicorn_log_config": Symbol(
        "vllm.entrypoints.serve.utils.server_utils", "get_uvicorn_log_config", ("args",)
    ),
    "ssl_refresher": Symbol("vllm.entrypoints.serve.utils.ssl", "SSLCertRefresher"),
}

# Parameters of the methods we call on classes above.
METHODS: Mapping[str, tuple[Symbol, tuple[str, ...]]] = {
    "from_cli_args": (COMMON["engine_args"], ("args",)),
    "create_engine_config": (COMMON["engine_args"], ("usage_context",)),
    "from_vllm_config": (
        COMMON["engine_client"],
        (
            "vllm_config",
            "usage_context",
            "enable_log_requests",
            "aggregate_engine_logging",
            "disable_log_stats",
        ),
    ),
    "shutdown": (COMMON["engine_client"], ("timeout",)),
    "is_sleeping": (COMMON["engine_client"], ()),
    "sleep": (COMMON["engine_client"], ("level",)),
    "wake_up": (COMMON["engine_client"], ("tags",)),
    "reset_prefix_cache": (COMMON["engine_client"], ()),
    "reset_mm_cache": (COMMON["engine_client"], ()),
    "get_supported_tasks": (COMMON["engine_client"], ()),
    "list_loras": (COMMON["engine_client"], ()),
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
    for module in _IMPORT_STEPS:
        checkpoint(module)
        _import(module)
    vllm = _import("vllm")
    version = str(getattr(vllm, "__version__", "unknown"))
    new = importlib.util.find_spec("vllm.entrypoints.launchers") is not None
    functions: dict[str, Any] = {}
    for name, symbol in {**COMMON, **(SINCE_0_29 if new else UNTIL_0_28)}.items():
        checkpoint(symbol.module)
        functions[name] = _resolve(symbol, version)
    for method, (owner, parameters) in METHODS.items():
        _check(getattr(_resolve(owner, version), method, None), method, parameters, version)
    functions["envs"] = _import("vllm.envs")
    functions["platform"] = _import("vllm.platforms").current_platform
    return Layout(version, functions)


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
        raise StartError(
            f"vLLM cannot be imported: {error}",
            code="vllm_import_failed",
            hint="with CPU torch, torchvision, torchaudio and torchcodec must not be installed",
        ) from error


def _resolve(symbol: Symbol, version: str) -> Any:
    try:
        found = getattr(importlib.import_module(symbol.module), symbol.name)
    except (ImportError, AttributeError) as error:
        raise _unsupported(version, f"{symbol.module}.{symbol.name} is missing") from error
    _check(found, symbol.name, symbol.parameters, version)
    return found


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
