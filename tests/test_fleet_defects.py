"""A defect in the supervision of one worker is the end of that one; the others and the fleet go on.

Invariant of every test here, of World.live: no task and no process is left.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fleet_world import Course, FakeProcess, World, plan, serving, until
from structlog.testing import capture_logs

from ichat_lifecycle.fleet.member import Member
from ichat_lifecycle.fleet.states import Stage

STEPS = ("_wait_for_turn", "_launch", "_watch", "_back_off", "_stop", "_rest")


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, step: str) -> None:
    """The first time that this worker comes to this step."""
    right = getattr(Member, step)
    failed: list[str] = []

    def maybe(self: Member, *args: Any, **more: Any) -> Any:
        if self.name == name and not failed:
            failed.append(step)
            raise RuntimeError("a defect")
        return right(self, *args, **more)

    monkeypatch.setattr(Member, step, maybe)


@pytest.mark.parametrize("step", STEPS)
def test_the_others_go_on_and_the_fleet_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fail_once(monkeypatch, "a", step)

    async def scenario(world: World) -> None:
        await until(serving(world, "b"))
        if step == "_stop":
            world.fleet.member("a").ask_to_stop("an operator")
        if step == "_rest":
            world.fleet.member("a").ask_to_stop("an operator")
            await until(lambda: world.fleet.member("a").gone)
        else:
            await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
            reason = world.fleet.member("a").reason
            assert reason == "an internal error: RuntimeError: a ***"
        assert not world.alive("a"), "its process has ended"
        assert world.fleet.member("b").serving
        assert world.fleet.member("b").starts == 1

    with capture_logs() as logs:
        ends = Course(ends_s=20.0, code=70) if step == "_back_off" else Course()
        world = World(a=[ends])
        world.around.scrub = lambda text: text.replace("defect", "***")  # it may quote a secret
        world.live(plan("a"), plan("b"), scenario=scenario)
    told = {line["event"] for line in logs if line["log_level"] == "error"}
    assert told & {"supervision_failed", "task_failed"}


def test_one_that_has_failed_can_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, "a", "_watch")

    async def scenario(world: World) -> None:
        await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
        world.fleet.restart("a")
        await until(serving(world, "a"))

    with capture_logs():
        assert World().live(plan("a"), plan("b"), scenario=scenario) == 0


def test_a_slot_of_one_that_has_failed_is_another_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, "a", "_watch")

    async def scenario(world: World) -> None:
        await until(serving(world, "b"))

    with capture_logs():
        World(limit=1).live(plan("a"), plan("b"), scenario=scenario)


def test_a_wait_that_fails_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: FakeProcess) -> int:
        if self.plan.name == "a":
            raise RuntimeError("a defect")
        return await asyncio.shield(self._end)

    monkeypatch.setattr(FakeProcess, "wait", fail)

    async def scenario(world: World) -> None:
        await until(serving(world, "b"))
        await until(world.fleet.member("a").rested.is_set)

    with capture_logs():
        World().live(plan("a"), plan("b"), scenario=scenario)


def test_a_change_that_fails_is_logged_and_the_next_one_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_: Any) -> bool:
        raise RuntimeError("a defect")

    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        with monkeypatch.context() as patched:
            patched.setattr(world.fleet, "_replace", fail)
            world.fleet.change([plan("a", env={"A": "1"}), plan("b")])
            await asyncio.sleep(1)
        assert world.fleet.member("a").starts == 1
        world.fleet.change([plan("a", env={"A": "1"}), plan("b")])
        await until(lambda: world.fleet.member("a").plan.env == {"A": "1"})
        await until(serving(world, "a", "b"))

    with capture_logs() as logs:
        World().live(plan("a"), plan("b"), scenario=scenario)
    (line,) = [line for line in logs if line["event"] == "task_failed"]
    assert line["task"] == "changes"
