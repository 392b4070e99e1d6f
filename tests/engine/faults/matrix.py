"""The rows of the fault matrix: what each fault is, and who drives it on either server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import control_faults, engine_faults, starts, stops, theirs
from .engine_faults import EXIT_75, IN_PLACE
from .lab import Lab
from .measure import Measured

CORE, WORKER = "EngineCore", "the worker"

Ours = Callable[[Lab, str, Path], Measured]
Theirs = Callable[[Lab, Path], str]


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        ours: drives a variant of it, with an empty directory to use.
        theirs: drives it on `vllm serve`; None where that says nothing.
        variants: at least one.
    """

    number: int
    fault: str
    ours: Ours
    theirs: Theirs | None = None
    variants: tuple[str, ...] = ("",)


# In the order in which they are run: those that leave a worker usable come first, on one worker,
# and then one that ends it.
ROWS = (
    Row(
        1,
        "kill -9 EngineCore, 4 streams running",
        lambda lab, variant, _: engine_faults.killed(lab, CORE, 0.1, variant),
        lambda lab, _: theirs.killed(lab, CORE),
        (IN_PLACE, EXIT_75),
    ),
    Row(
        2,
        "kill -9 the engine's worker process, 4 streams running",
        lambda lab, variant, _: engine_faults.killed(lab, WORKER, 0.5, variant),
        lambda lab, _: theirs.killed(lab, WORKER),
        (IN_PLACE,),
    ),
    Row(
        3,
        "kill -STOP EngineCore, 4 streams running",
        lambda lab, variant, _: engine_faults.stopped(lab, CORE, variant),
        lambda lab, _: theirs.stopped(lab, CORE),
        (IN_PLACE, EXIT_75),
    ),
    Row(
        4,
        "kill -STOP the worker process, 4 streams running",
        lambda lab, variant, _: engine_faults.stopped(lab, WORKER, variant),
        lambda lab, _: theirs.stopped(lab, WORKER),
        (IN_PLACE,),
    ),
    Row(
        5,
        "kill -STOP the worker process, idle",
        lambda lab, variant, _: engine_faults.stopped(lab, WORKER, variant, idle=True),
        lambda lab, _: theirs.stopped(lab, WORKER, idle=True),
        (IN_PLACE,),
    ),
    Row(
        6,
        "kill -STOP for 4 s, then CONT",
        lambda lab, variant, _: engine_faults.paused(lab, variant),
        lambda lab, _: theirs.paused(lab),
        (CORE, WORKER),
    ),
    Row(
        7,
        "saturation: all sequences taken, longest prompts",
        lambda lab, _, __: engine_faults.saturated(lab),
    ),
    Row(
        21,
        "control plane: 200 idle connections, 100 MB, malformed HTTP, wrong tokens",
        lambda lab, _, __: control_faults.attacked(lab),
    ),
    Row(
        9,
        "SIGTERM, 4 streams running",
        lambda lab, _, __: stops.with_streams(lab),
        lambda lab, _: theirs.with_streams(lab),
    ),
    Row(
        8,
        "SIGTERM, idle",
        lambda lab, _, __: stops.idle(lab),
        lambda lab, _: theirs.idle(lab),
    ),
    Row(
        10,
        "SIGTERM, streams longer than the drain deadline",
        lambda lab, _, __: stops.past_the_drain(lab),
    ),
    Row(
        11,
        "second SIGTERM while draining",
        lambda lab, _, __: stops.second_signal(lab),
        lambda lab, _: theirs.second_signal(lab),
    ),
    Row(
        12,
        "SIGTERM during the start",
        lambda lab, variant, _: stops.during_start(lab, variant),
        lambda lab, _: theirs.during_start(lab),
        tuple(stops.MOMENTS),
    ),
    Row(
        13,
        "kill -9 our own process",
        lambda lab, variant, _: stops.killed_ourselves(lab, variant),
        lambda lab, _: theirs.killed_itself(lab),
        ("READY", "loading"),
    ),
    Row(
        14,
        "port taken",
        lambda lab, _, __: starts.port_taken(lab),
        lambda lab, _: theirs.port_taken(lab),
    ),
    Row(
        15,
        "no model at the path",
        starts.no_model,
        theirs.no_model,
        ("missing", "unreadable"),
    ),
    Row(
        16,
        "not enough memory",
        lambda lab, _, __: starts.no_memory(lab),
        lambda lab, _: theirs.no_memory(lab),
    ),
    Row(
        17,
        "a model that cannot be served",
        starts.broken_model,
        lambda lab, directory: theirs.broken_model(lab, "corrupt weights", directory),
        tuple(starts.BREAKS),
    ),
    Row(
        18,
        "EngineCore stopped during the load",
        lambda lab, variant, _: starts.stalled(lab, variant),
        lambda lab, _: theirs.stalled(lab),
        ("for ever", "slow"),
    ),
    Row(
        19,
        "the event loop blocked for 60 s by a middleware",
        lambda lab, _, directory: stops.loop_blocked(lab, directory),
    ),
    Row(
        20,
        "too little of something",
        lambda lab, variant, directory: {
            "RLIMIT_NOFILE 64": lambda: starts.few_files(lab),
            "full disk for the log": lambda: starts.full_disk(lab),
            "no cache directory": lambda: starts.no_cache(lab, directory),
        }[variant](),
        None,
        ("RLIMIT_NOFILE 64", "full disk for the log", "no cache directory"),
    ),
)
