"""An explicit, guarded, observable life for vLLM's OpenAI-compatible server, in-process.

The names below are the public interface; importing this package imports neither vLLM nor FastAPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ichat_lifecycle.states import TABLE, State, Trigger

if TYPE_CHECKING:
    from ichat_lifecycle.backend import VLLMBackend
    from ichat_lifecycle.base_backend import BaseBackend, LifecycleBackend

__version__ = "0.1.0"

__all__ = [
    "TABLE",
    "BaseBackend",
    "LifecycleBackend",
    "State",
    "Trigger",
    "VLLMBackend",
    "__version__",
]

_PLACES = {
    "BaseBackend": "base_backend",
    "LifecycleBackend": "base_backend",
    "VLLMBackend": "backend",
}


def __getattr__(name: str) -> Any:
    # Engine processes import this package too (their main module is ours): keep it light.
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
