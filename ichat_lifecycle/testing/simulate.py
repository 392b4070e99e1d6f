"""Lives one plan and tells it: the lifecycle of production, fakes behind its ports, no waiting."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.testing.invariants import INVARIANTS
from ichat_lifecycle.testing.life import Implementation, Stage
from ichat_lifecycle.testing.plan import Plan, load_plan
from ichat_lifecycle.testing.timeline import timeline

EXIT_BROKEN = 1


def simulate(path: Path, implementation: Implementation = LifecycleBackend) -> int:
    """Prints the life of the plan in this file, and what it says of the invariants.

    Returns:
        0 where all hold, else 1.

    Raises:
        ArgumentsError: the file is not a plan.
        InputMissingError: it cannot be read.
    """
    return tell(load_plan(path), implementation, sys.stdout)


def tell(plan: Plan, implementation: Implementation, stream: TextIO) -> int:
    """The same, for a plan in hand."""
    with Stage() as stage:
        life = stage.live(plan, implementation)
    for line in timeline(life):
        print(line, file=stream)
    broken = [f"{rule.__name__}: {saw}" for rule in INVARIANTS for saw in rule(life)]
    for complaint in broken:
        print(f"BROKEN {complaint}", file=stream)
    if not broken:
        print(f"all {len(INVARIANTS)} invariants hold", file=stream)
    return EXIT_BROKEN if broken else 0
