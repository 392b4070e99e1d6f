"""Which phase a load is in, by what the engine itself prints: never by a timer.

The texts are vLLM's own, from 0.28 to 0.33: of its loaders, its model runners and its compiler.
"""

from __future__ import annotations

import re

from ichat_lifecycle.log_line import parse

CONFIGURING = "configuring"
STARTING_ENGINE = "starting_engine"
DOWNLOADING = "downloading"  # from a hub; see download_watch
LOADING_WEIGHTS = "loading_weights"
PROFILING = "profiling"
COMPILING = "compiling"
ALLOCATING = "allocating_kv_cache"
CAPTURING = "capturing_graphs"
FINISHING = "finishing_engine"

# What begins a phase, looked for in the text of a line; `percent` where it says how far that is.
_BEGINS = tuple(
    (re.compile(pattern), phase)
    for pattern, phase in (
        (r"^Starting to load model ", LOADING_WEIGHTS),
        (r"Loading (\S+ )?checkpoint shards: +(?P<percent>\d+)% Completed", LOADING_WEIGHTS),
        (
            r"Multi-thread loading (\S+ checkpoint )?shards: +(?P<percent>\d+)% Completed",
            LOADING_WEIGHTS,
        ),
        # From here on it runs the model once, to see how much memory is left for the cache.
        (r"^(Loading weights|Model loading) took ", PROFILING),
        (r"Using cache directory: .* for vLLM's torch\.compile", COMPILING),
        (r"Dynamo bytecode transform time", COMPILING),
        (r"Compiling a graph for ", COMPILING),
        (r"^Warming up model for the compilation", COMPILING),
        (r"^Available KV cache memory: ", ALLOCATING),
        (r"^(\w+ )?KV cache size: ", ALLOCATING),
        (r"^Explicitly set .* for KV cache", ALLOCATING),
        (r"Capturing CUDA graphs?[^:]*: +(?P<percent>\d+)%", CAPTURING),
        (r"^(Graph capturing finished|init engine \(profile)", FINISHING),
    )
)


class LoadPhases:
    """Follows one load, line by line.

    Each phase is entered once: of several ranks the first one counts, and what the others print
    later does not lead back.
    """

    def __init__(self) -> None:
        self._current = ""
        self._left: set[str] = set()

    def read(self, line: str) -> tuple[str, float | None] | None:
        """The phase, and how much of it is done (0 to 1, None where that is not told); None for a
        line that says nothing new of that."""
        text = parse(line).text
        for begins, phase in _BEGINS:
            if match := begins.search(text):
                return self._enter(phase, match.groupdict().get("percent"))
        return None

    def _enter(self, phase: str, percent: str | None) -> tuple[str, float | None] | None:
        if phase in self._left:
            return None
        if phase == self._current and percent is None:
            return None
        if phase != self._current:
            self._left.add(self._current)
            self._current = phase
        return phase, int(percent) / 100 if percent else None
