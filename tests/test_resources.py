"""The stack of resources under virtual time: reverse order, once each, bounded, nothing hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from ichat_lifecycle.resources import Released, ResourceStack
from ichat_lifecycle.testing.plan import Outcome
from ichat_lifecycle.testing.virtual_time import run_virtual

DEADLINE_S = 5.0
HANGS = Outcome(hang=True)
IGNORES = Outcome(hang=True, ignore_cancel_s=1000)
FAILS = Outcome(delay_s=1, error=RuntimeError("stuck"))
CANCELS = Outcome(error=asyncio.CancelledError())


@dataclass
class Bench:
    """A stack with a, b and c on it, and what became of them."""

    plans: dict[str, Outcome] = field(default_factory=dict)
    began: list[str] = field(default_factory=list)
    released: list[Released] = field(default_factory=list)
    stack: ResourceStack = field(default_factory=ResourceStack)

    def __post_init__(self) -> None:
        for name in "abc":
            self.stack.push(name, self._release(name), DEADLINE_S)

    def _release(self, name: str) -> Callable[[], asyncio.Future[None]]:
        async def release() -> None:
            self.began.append(name)
            await self.plans.get(name, Outcome()).play()

        return lambda: asyncio.ensure_future(release())

    async def release_above(self, name: str | None) -> None:
        await self.stack.release_above(name, self.released.append)

    @property
    def outcomes(self) -> list[tuple[str, float, str | None]]:
        return [(r.name, r.took_s, type(r.error).__name__) for r in self.released]


def released(above: str | None = None, **plans: Outcome) -> Bench:
    async def main() -> Bench:
        bench = Bench(plans)
        await bench.release_above(above)
        return bench

    return run_virtual(main())


@pytest.mark.parametrize(
    ("above", "order", "kept"),
    [(None, ["c", "b", "a"], ()), ("a", ["c", "b"], ("a",)), ("c", [], ("a", "b", "c"))],
)
def test_newest_first_down_to_the_named_one(
    above: str | None, order: list[str], kept: tuple[str, ...]
) -> None:
    bench = released(above)
    assert bench.began == [r.name for r in bench.released] == order
    assert bench.stack.names == kept
    assert (bench.stack.unreleased, bench.stack.lost) == (len(kept), ())


def test_a_name_that_is_not_held_means_everything() -> None:
    """A restart without a server cannot keep what stands on it."""
    assert released("zzz").stack.names == ()


@pytest.mark.parametrize(
    ("plan", "took_s", "error"),
    [
        (Outcome(delay_s=2), 2, "NoneType"),
        (Outcome(delay_s=4.9), 4.9, "NoneType"),
        (FAILS, 1, "RuntimeError"),
        (CANCELS, 0, "CancelledError"),
        (HANGS, DEADLINE_S, "TimeoutError"),
        (IGNORES, DEADLINE_S, "TimeoutError"),
    ],
)
def test_one_that_fails_or_hangs_harms_no_other(plan: Outcome, took_s: float, error: str) -> None:
    """It is bounded, reported with its error, counted as lost; the next is released too."""
    bench = released(b=plan)
    assert bench.outcomes == [("c", 0, "NoneType"), ("b", took_s, error), ("a", 0, "NoneType")]
    lost = () if error == "NoneType" else ("b",)
    assert bench.stack.lost == lost
    assert bench.stack.unreleased == len(lost), "STOPPED proves that nothing is"


def test_the_whole_is_bounded_by_the_sum_of_the_deadlines() -> None:
    bench = released(a=HANGS, b=IGNORES, c=HANGS)
    assert sum(r.took_s for r in bench.released) == 3 * DEADLINE_S
    assert bench.stack.unreleased == 3


def test_two_callers_release_each_once() -> None:
    """A second stop finds what the first has not begun, and repeats nothing."""

    async def main() -> Bench:
        bench = Bench({"c": Outcome(delay_s=2)})
        await asyncio.gather(bench.release_above(None), bench.release_above(None))
        return bench

    bench = run_virtual(main())
    assert sorted(bench.began) == ["a", "b", "c"]
    assert bench.stack.unreleased == 0


def test_what_is_pushed_meanwhile_is_released_too() -> None:
    async def main() -> Bench:
        bench = Bench({"c": Outcome(delay_s=2)})
        releasing = asyncio.ensure_future(bench.release_above(None))
        await asyncio.sleep(1)
        bench.stack.push("late", bench._release("late"), DEADLINE_S)
        await releasing
        return bench

    bench = run_virtual(main())
    assert bench.began == ["c", "late", "b", "a"]
    assert bench.stack.unreleased == 0


@pytest.mark.parametrize(
    ("plan", "error"), [(Outcome(delay_s=3), "NoneType"), (HANGS, "TimeoutError")]
)
def test_a_release_outlives_its_callers_cancellation(plan: Outcome, error: str) -> None:
    """Still held until it has ended; who releases next waits for it, and does not begin it anew."""

    async def main() -> Bench:
        bench = Bench({"c": plan})
        releasing = asyncio.ensure_future(bench.release_above("a"))
        await asyncio.sleep(1)
        releasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await releasing
        assert bench.stack.names == ("a", "b", "c")
        await bench.release_above(None)
        assert asyncio.all_tasks() - {asyncio.current_task()} == set() or plan is HANGS
        return bench

    bench = run_virtual(main())
    assert bench.began == ["c", "b", "a"]
    assert [name for name, _, _ in bench.outcomes] == ["c", "b", "a"]
    assert bench.outcomes[0][2] == error
