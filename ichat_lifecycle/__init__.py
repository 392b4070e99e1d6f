"""An explicit, guarded, observable life for vLLM's OpenAI-compatible server, in-process.

The names below are the public interface; importing this package imports neither vLLM nor FastAPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ichat_lifecycle.states import TABLE, State, Trigger

if TYPE_CHECKING:
    from ichat_lifecycle.backend import BaseBackend, VLLMBackend

__version__ = "0.1.0"

__all__ = ["TABLE", "BaseBackend", "State", "Trigger", "VLLMBackend", "__version__"]


def __getattr__(name: str) -> Any:
    # Engine processes import this package too (their main module is ours): keep it light.
    if name in ("BaseBackend", "VLLMBackend"):
        from ichat_lifecycle import backend

        return getattr(backend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
