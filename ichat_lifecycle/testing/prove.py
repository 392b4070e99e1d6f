"""Proofs that a backend keeps the eleven invariants, whatever its engine, its server and its
operator do. They take the backend as an argument: ten lines prove one of your own.

Each proof raises `Broken` for a life that breaks an invariant, with its plan and its timeline, and
else returns how many lives it took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ichat_lifecycle.testing.draw import MOST, SETTINGS, numbers_in, plan_of
from ichat_lifecycle.testing.explore import bursts, spread
from ichat_lifecycle.testing.invariants import Broken, check
from ichat_lifecycle.testing.life import Implementation, Life, Stage

__all__ = ["Broken", "Implementation", "bursts", "drawn_lives", "spread"]

# As many as there may be, evenly, and their bytes in one piece: a list of numbers takes Hypothesis
# twice as long, which was a third of a proof.
# Each made once: a strategy is checked anew each time that one is made.
_NUMBERS = [st.binary(min_size=3 * n, max_size=3 * n).map(numbers_in) for n in range(MOST + 1)]
numbers = st.integers(0, MOST).flatmap(_NUMBERS.__getitem__)


def drawn_lives(
    implementation: Implementation,
    lives: int = 1000,
    world: str = "default",
    see: Callable[[Life], None] = lambda life: None,
) -> int:
    """Lives that Hypothesis draws: each call's outcome, and what comes from outside, and when.

    A life that breaks an invariant is shrunk to the simplest plan that still does. The seed is
    Hypothesis' own (`pytest --hypothesis-seed=…`).

    Args:
        lives: how many.
        world: the settings they have; a name of draw.SETTINGS.
        see: gets each life that was lived.
    """
    lived = 0
    with Stage() as stage:

        @settings(
            max_examples=lives,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(numbers)
        def live(drawn: Sequence[int]) -> None:
            nonlocal lived
            lived += 1
            life = stage.live(plan_of(drawn, SETTINGS[world]), implementation)
            see(life)
            check(life)

        live()
    return lived
