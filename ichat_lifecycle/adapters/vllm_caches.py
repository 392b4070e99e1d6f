"""vLLM's memoised functions that are keyed by an engine's tokenizer or configuration.

Each keeps up to 128 of them, and a tokenizer is tens of megabytes: harmless where there is one
engine per process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_MEMOISED = type(lru_cache(id))

# Of packages whose functions take an engine's objects; others remember facts about the machine.
_PACKAGES = (
    "vllm.entrypoints",
    "vllm.renderers",
    "vllm.tokenizers",
    "vllm.transformers_utils.processor",
)


def forget(packages: tuple[str, ...] = _PACKAGES) -> None:
    """Empty them; what is asked again is worked out again."""
    for name, module in tuple(sys.modules.items()):
        if module is not None and any(name == p or name.startswith(p + ".") for p in packages):
            for function in _memoised(module):
                function.cache_clear()


def _memoised(module: Any) -> Iterator[Any]:
    # By type alone: to ask for an attribute runs the code of others. Transformers' stand-ins for
    # what is not installed raise at each of them.
    for value in tuple(vars(module).values()):
        if type(value) is _MEMOISED:
            yield value
