"""Goes on drawing lives for as long as it is asked to: `make fuzz MINUTES=5`.

A life that breaks an invariant is made simpler for as long as it still does, and its plan is
written to a file that `ichat-lifecycle simulate` takes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.testing.draw import SETTINGS, numbers_of, plan_of
from ichat_lifecycle.testing.invariants import Broken, check
from ichat_lifecycle.testing.life import Implementation, Stage

EXIT_BROKEN = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every life kept every invariant, else 1."""
    parser = argparse.ArgumentParser("python -m ichat_lifecycle.testing.fuzz")
    parser.add_argument("--minutes", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="default: a new one each time, which is told")
    parser.add_argument("--plan", type=Path, default=Path("broken-plan.json"), metavar="FILE")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
    return fuzz(LifecycleBackend, args.minutes * 60, seed, args.plan)


def fuzz(implementation: Implementation, seconds: float, seed: int, plan: Path) -> int:
    """Draws lives for so many seconds, on one core."""
    generator = random.Random(seed)
    began, cpu, lives = time.monotonic(), time.process_time(), 0
    with Stage() as stage:
        for world in itertools.cycle(SETTINGS):
            took = time.monotonic() - began
            if took >= seconds:
                break
            numbers = numbers_of(generator)
            lives += 1
            if broken := _broken(stage, numbers, world, implementation):
                broken = _simplest(stage, numbers, world, implementation, broken)
                plan.write_text(broken.life.plan.as_json(), encoding="utf-8")
                print(f"{broken}\nseed {seed}, life {lives}; the plan is in {plan}")
                return EXIT_BROKEN
    rate = lives / (time.process_time() - cpu)
    print(f"{lives:,} lives in {took:.0f} s, {rate:.0f} lives per second of one core; seed {seed}")
    return 0


def _broken(
    stage: Stage, numbers: Sequence[int], world: str, implementation: Implementation
) -> Broken | None:
    life = stage.live(plan_of(numbers, SETTINGS[world]), implementation)
    try:
        check(life)
    except Broken as broken:
        return broken
    return None


def _simplest(
    stage: Stage,
    numbers: Sequence[int],
    world: str,
    implementation: Implementation,
    broken: Broken,
) -> Broken:
    """Leaves out what the same invariant is broken without."""
    for left_out in range(len(numbers) - 1, -1, -1):
        fewer = [*numbers[:left_out], *numbers[left_out + 1 :]]
        again = _broken(stage, fewer, world, implementation)
        if again is not None and again.invariant == broken.invariant:
            numbers, broken = fewer, again
    return broken


if __name__ == "__main__":
    sys.exit(main())
