"""How often and how soon engines are restarted."""

from __future__ import annotations

import pytest

from ichat_lifecycle.config import Restart
from ichat_lifecycle.restart_budget import RestartBudget


def spent(budget: RestartBudget, *times_s: float) -> None:
    for at_s in times_s:
        budget.spend(at_s)


def test_the_budget_holds_for_a_window_that_moves() -> None:
    budget = RestartBudget(Restart(max=2, window=100), lambda: 0.0)
    assert budget.left(0) == 2
    spent(budget, 0, 50)
    assert budget.left(99.9) == 0
    assert budget.left(100) == 1
    assert budget.left(150) == 2


def test_no_budget_is_none() -> None:
    assert RestartBudget(Restart(max=0), lambda: 0.0).left(0) == 0


def test_the_first_begins_at_once_and_each_further_one_waits_twice_as_long() -> None:
    budget = RestartBudget(Restart(max=6, backoff=2, backoff_max=10), lambda: 0.0)
    delays = []
    for at_s in range(6):
        delays.append(budget.delay_s(at_s))
        budget.spend(at_s)
    assert delays == [0, 2, 4, 8, 10, 10]


def test_a_quiet_window_forgets_the_backoff_too() -> None:
    budget = RestartBudget(Restart(max=3, window=100), lambda: 0.0)
    spent(budget, 0, 1)
    assert budget.delay_s(2) > 0
    assert budget.delay_s(101) == 0


@pytest.mark.parametrize(("chance", "part"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_chance_takes_up_to_a_half(chance: float, part: float) -> None:
    budget = RestartBudget(Restart(backoff=4), lambda: chance)
    budget.spend(0)
    assert budget.delay_s(0) == 4 * part


def test_a_thousand_restarts_are_a_number() -> None:
    budget = RestartBudget(Restart(max=1000), lambda: 0.0)
    spent(budget, *range(999))
    assert budget.delay_s(1000) == Restart().backoff_max
