"""The supervisor of a fleet, under virtual time, on processes and sockets that are fakes."""

from __future__ import annotations

import asyncio
import errno
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_world import READY_S, STOP_S, Course, World, clock, plan, serving, until
from structlog.testing import capture_logs

from ichat_lifecycle.config import Restart
from ichat_lifecycle.errors import AddressError
from ichat_lifecycle.fleet.fleet import NoSuchWorkerError
from ichat_lifecycle.fleet.ports import KILL_MARGIN_S
from ichat_lifecycle.fleet.states import TABLE, Event, Stage, row_for
from ichat_lifecycle.testing.virtual_time import VirtualTimeLoop

# --- the table


def test_each_stage_is_reached_and_left_but_for_rest() -> None:
    reached = {row.dest for row in TABLE} | {Stage.PENDING}
    left = {stage for row in TABLE for stage in row.sources}
    assert reached == left == set(Stage)


def test_the_readme_explains_each_stage() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Many workers")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|.*\|.*\|$", section, re.MULTILINE)) >= set(Stage)


def test_no_stage_has_two_ways_for_one_event() -> None:
    ways = [(stage, row.event) for row in TABLE for stage in row.sources]
    assert len(ways) == len(set(ways))
    assert row_for(Stage.PENDING, Event.SERVE) is None


# --- starting


def test_all_start_serve_and_stop_clean() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        assert clock() == pytest.approx(READY_S, abs=0.1)

    world = World()
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 0
    for name in "ab":
        assert world.stages(name) == ["starting", "serving", "stopping", "stopped"]
    assert [process.signals for process in world.processes] == [["TERM"], ["TERM"]]


def test_not_more_start_at_the_same_time_than_may() -> None:
    names = [f"w{n}" for n in range(7)]

    async def scenario(world: World) -> None:
        await until(serving(world, *names))
        assert clock() == pytest.approx(4 * READY_S, abs=0.5)

    world = World(limit=2)
    world.live(*map(plan, names), scenario=scenario)
    assert world.most_starting == 2
    assert [p.plan.name for p in world.processes] == names


def test_one_that_fails_makes_room_for_the_next() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "b"))

    world = World(limit=1, a=[Course(ends_s=3, code=66, said="no such model")])
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 66
    assert world.records("a")[-1]["cause"] == "ended with 66: no such model"


def test_an_address_that_is_taken_starts_nothing() -> None:
    world = World()
    world.taken.add("b:1")
    with pytest.raises(AddressError, match="b:1"):
        world.live(plan("a"), plan("b"))
    assert (world.processes, [s.closed for s in world.sockets]) == ([], [True])


# --- ends


@pytest.mark.parametrize("code", [2, 66, 69])
def test_what_would_end_the_same_way_is_given_up(code: int) -> None:
    world = World(a=[Course(ends_s=2, code=code)])
    assert world.live(plan("a")) == code
    assert world.stages("a") == ["starting", "given_up"]


@pytest.mark.parametrize("code", [1, 70, 71, 75, 124, -9, -11])
def test_everything_else_is_worth_another_start(code: int) -> None:
    async def scenario(world: World) -> None:
        await until(lambda: len(world.processes) == 2)
        await until(serving(world, "a"))

    world = World(a=[Course(ends_s=20, code=code), Course()])
    assert world.live(plan("a"), scenario=scenario) == 0
    assert world.stages("a")[:6] == [
        "starting",
        "serving",
        "backing_off",
        "pending",
        "starting",
        "serving",
    ]
    how = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
    assert world.records("a")[2]["cause"] == how


def test_the_cause_is_what_the_worker_said_last_else_its_reason() -> None:
    said = Course(ends_s=2, code=75, said="the engine died", reason="it hung")
    told = Course(ends_s=2, code=75, reason="it hung")
    world = World(a=[said, told], restart=Restart(max=1))
    world.live(plan("a"))
    causes = [record["cause"] for record in world.records("a") if record["code"] == 75]
    assert causes[0] == "ended with 75: the engine died"
    assert causes[1].startswith("ended with 75: it hung; no more after 1 starts")


def test_an_end_with_0_that_nobody_asked_for_is_left_alone() -> None:
    world = World(a=[Course(ends_s=20, code=0)])
    assert world.live(plan("a")) == 0
    assert world.stages("a") == ["starting", "serving", "stopped"]


def test_the_waits_double_and_a_crash_loop_is_broken() -> None:
    world = World(a=[Course(ends_s=2, code=75)], restart=Restart(max=4, backoff=3, backoff_max=10))
    assert world.live(plan("a")) == 75
    delays = [r["delay_s"] for r in world.records("a") if r["dest"] == "backing_off"]
    assert delays == [0, 3, 6, 10]
    assert len(world.processes) == 5
    assert world.stages("a")[-1] == "given_up"


def test_ends_that_are_long_ago_do_not_count() -> None:
    async def scenario(world: World) -> None:
        await until(lambda: len(world.processes) == 6, within_s=10_000)

    world = World(a=[Course(ends_s=700, code=75)], restart=Restart(max=1, window=600))
    world.live(plan("a"), scenario=scenario)
    assert "given_up" not in world.stages("a")


def test_no_process_to_be_had_is_tried_again() -> None:
    async def scenario(world: World) -> None:
        await until(lambda: "backing_off" in world.stages("a"))
        world.unlaunchable = 0
        await until(serving(world, "a"))

    world = World()
    world.unlaunchable = errno.EAGAIN
    assert world.live(plan("a"), scenario=scenario) == 0
    cause = world.records("a")[1]["cause"]
    assert cause.startswith("ended with 71: no process could be started: [Errno 11]")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_lack_of_descriptors_is_no_fault_of_a_worker(number: int) -> None:
    """It was given up at once where the supervisor had too many connections."""

    async def scenario(world: World) -> None:
        member = world.fleet.member("a")
        await until(serving(world, "a"))
        left = member.restarts_left
        world.unlaunchable = number
        world.fleet.restart("a")
        await until(lambda: (member.reason or "").startswith("it waits for file descriptors"))
        await asyncio.sleep(1000)
        assert (member.stage, member.restarts_left, member.starts) == (Stage.PENDING, left, 1)
        world.unlaunchable = 0
        await until(serving(world, "a"), within_s=60)
        assert (member.restarts_left, member.starts, member.reason) == (left, 2, None)
        world.unlaunchable = number
        world.fleet.restart("a")
        await until(lambda: member.reason is not None and member.stage is Stage.PENDING)

    world = World()
    with capture_logs() as told:
        assert world.live(plan("a"), scenario=scenario) == 0, "a stop ends the wait"
    assert [line["event"] for line in told].count("worker_waits") == 2


def test_one_that_never_becomes_ready_is_waited_for() -> None:
    """Its own deadlines end it."""

    async def scenario(world: World) -> None:
        await asyncio.sleep(10_000)
        assert world.fleet.member("a").stage is Stage.STARTING

    World(a=[Course(ready_s=None)]).live(plan("a"), scenario=scenario)


@pytest.mark.parametrize("silent_s", [0.0, 0.5, 30.0])
def test_one_that_tells_nothing_any_more_is_killed_and_starts_again(silent_s: float) -> None:
    async def scenario(world: World) -> None:
        await until(lambda: len(world.processes) == 2, within_s=silent_s + 61)
        await until(serving(world, "a"))
        await asyncio.sleep(1000)

    world = World(watchdog_s=60, a=[Course(silent_s=silent_s), Course()])
    assert world.live(plan("a"), scenario=scenario) == 0
    assert [process.signals for process in world.processes] == [["KILL"], ["TERM"]]
    (back,) = [record for record in world.records("a") if record["dest"] == Stage.BACKING_OFF]
    assert back["cause"] == "killed by signal 9: it has told nothing for 60 s"


@pytest.mark.parametrize("frozen_s", [5.0, 59.9, 60.5, 61.0, 3600.0])
@pytest.mark.parametrize("at_s", [1.0, 29.0, 31.0, 59.0])
def test_a_fleet_that_was_frozen_as_a_whole_kills_nobody(at_s: float, frozen_s: float) -> None:
    """A container that is paused, a machine that is moved: nobody could tell, nobody could hear."""

    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        await asyncio.sleep(at_s)
        # A worker is slow to wake up, and tells something a while after its supervisor looks.
        (process,) = world.processes
        process.course = replace(process.course, silent_s=0.0)
        loop.block(frozen_s)
        await asyncio.sleep(20)
        process.course = replace(process.course, silent_s=None)
        process.beat(60)
        await asyncio.sleep(1000)

    world = World(watchdog_s=60, a=[Course()])
    world.live(plan("a"), scenario=scenario)
    assert [process.signals for process in world.processes] == [["TERM"]]


def test_one_that_is_silent_after_a_freeze_is_killed_a_watchdog_later() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        (process,) = world.processes
        process.course = replace(process.course, silent_s=0.0)
        loop.block(300)
        frozen_until_s = clock()
        await until(lambda: len(world.processes) == 2, within_s=70)
        assert clock() - frozen_until_s >= 60

    World(watchdog_s=60, a=[Course(), Course()]).live(plan("a"), scenario=scenario)


# --- the socket


def test_the_supervisor_answers_whenever_no_worker_does() -> None:
    async def scenario(world: World) -> None:
        (socket,) = world.sockets
        assert not socket.owners
        await until(lambda: bool(socket.owners))
        assert clock() == pytest.approx(1, abs=0.1), "from BOUND on"
        await until(lambda: not socket.owners)
        assert clock() == pytest.approx(20, abs=0.1), "from its end on"
        await until(serving(world, "a"))
        world.fleet.member("a").ask_to_stop("test")
        await until(lambda: not socket.owners, within_s=0.5)
        assert world.alive(), "from the beginning of the stop on"

    World(a=[Course(ends_s=20, code=75), Course()]).live(plan("a"), scenario=scenario)


def test_a_worker_that_stops_by_itself_leaves_the_socket_at_once() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        (process,) = world.processes
        for state in ("STOPPING", "STOPPED"):
            process.tell(state)
            assert not world.sockets[0].owners
        process.end(75)
        await until(lambda: len(world.processes) == 2)

    World().live(plan("a"), scenario=scenario)


# --- stopping


def test_all_stop_at_the_same_time() -> None:
    world = World()
    began = []

    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b", "c"))
        began.append(clock())

    async def main() -> float:
        running = asyncio.create_task(world.fleet.run([plan(n) for n in "abc"]))
        await asyncio.sleep(0.01)
        await scenario(world)
        world.fleet.ask_to_stop()
        await running
        return clock() - began[0]

    from ichat_lifecycle.testing.virtual_time import run_virtual

    assert run_virtual(main()) == pytest.approx(STOP_S, abs=0.1)


def test_a_second_stop_is_passed_on() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.ask_to_stop()
        await asyncio.sleep(1)
        world.fleet.ask_to_stop(now=True)
        await asyncio.sleep(1)
        assert not world.alive()

    world = World(a=[Course(stop_s=20)])
    assert world.live(plan("a"), scenario=scenario) == 0
    assert world.processes[0].signals == ["TERM", "INT"]


def test_a_stop_at_once_needs_no_graceful_one_before() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.ask_to_stop(now=True)
        await asyncio.sleep(1)
        assert not world.alive()

    assert World(a=[Course(stop_s=20)]).live(plan("a"), scenario=scenario) == 0


def test_a_sigterm_that_came_too_early_to_be_heard_is_a_clean_end() -> None:
    async def scenario(world: World) -> None:
        await asyncio.sleep(0.5)

    world = World(a=[Course(stop_s=0, stop_code=-signal.SIGTERM)])
    assert world.live(plan("a"), scenario=scenario) == 0


def test_one_that_outlasts_its_bound_is_killed_and_the_exit_code_says_so() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.ask_to_stop()
        await asyncio.sleep(30 + KILL_MARGIN_S - 0.5)
        assert world.processes[0].signals == ["TERM"]
        await asyncio.sleep(1)

    world = World(a=[Course(stop_s=None)])
    assert world.live(plan("a"), scenario=scenario) == 75
    assert world.processes[0].signals == ["TERM", "KILL"]


@pytest.mark.parametrize("frozen_s", [5.0, 36.0, 3600.0])
@pytest.mark.parametrize("at_s", [0.01, 1.0, 34.0])
def test_a_stop_does_not_run_out_while_all_are_frozen(at_s: float, frozen_s: float) -> None:
    """From the moment on at which its process knows, and until just before its bound."""

    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        world.fleet.ask_to_stop()
        await asyncio.sleep(at_s)
        loop.block(frozen_s)

    world = World(a=[Course(stop_s=at_s + frozen_s + 20)])
    assert world.live(plan("a"), scenario=scenario) == 0
    assert world.processes[0].signals == ["TERM"]


def test_a_stop_that_is_asked_for_in_a_freeze_has_all_of_its_time() -> None:
    """The signal comes when the supervisor goes on: the clock has jumped before, or in between."""

    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.block(3600)
        world.fleet.ask_to_stop()
        loop.block(3600)

    world = World(watchdog_s=60, a=[Course(stop_s=34)])
    assert world.live(plan("a"), scenario=scenario) == 0
    assert world.processes[0].signals == ["TERM"]


def test_a_stop_that_hangs_after_a_freeze_is_killed_a_bound_later() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        world.fleet.ask_to_stop()
        await asyncio.sleep(20)
        loop.block(3600)
        frozen_until_s = clock()
        await until(lambda: not world.alive(), within_s=40)
        assert clock() - frozen_until_s >= 30

    world = World(a=[Course(stop_s=None)])
    assert world.live(plan("a"), scenario=scenario) == 75
    assert world.processes[0].signals == ["TERM", "KILL"]


def test_a_stop_that_was_forced_is_not_clean() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))

    world = World(b=[Course(stop_code=124)])
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 124


@pytest.mark.parametrize("seconds", [0.0, 0.5, 5.0, 12.0, 20.5, 22.0])
def test_a_stop_at_any_moment_leaves_nothing(seconds: float) -> None:
    async def scenario(world: World) -> None:
        await asyncio.sleep(seconds)

    slow = Restart(max=9, backoff=60)
    world = World(limit=1, restart=slow, a=[Course(ends_s=20, code=75)], b=[Course()])
    world.live(plan("a"), plan("b"), plan("c"), scenario=scenario)
    for name in "abc":
        assert world.stages(name)[-1] in ("stopped", "given_up")


def test_a_stop_at_once_does_not_wait_for_a_word_of_the_worker() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.member("a").ask_to_stop("an operator", now=True)
        await asyncio.sleep(0.1)
        assert world.processes[0].signals == ["TERM", "INT"]

    assert World(a=[Course(silent_s=11)]).live(plan("a"), scenario=scenario) == 0


# --- commands


def test_one_is_stopped_and_started_again_while_the_other_serves() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.member("a").ask_to_stop("an operator")
        await world.fleet.member("a").rested.wait()
        assert (world.fleet.member("a").stage, world.fleet.member("b").stage) == (
            Stage.STOPPED,
            Stage.SERVING,
        )
        world.fleet.member("a").ask_to_start_again("an operator")
        await until(serving(world, "a"))

    world = World()
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 0
    assert world.stages("b") == ["starting", "serving", "stopping", "stopped"]


def test_a_restart_is_a_stop_and_a_start() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.member("a").ask_to_start_again("an operator")
        await until(lambda: len(world.processes) == 2)
        await until(serving(world, "a"))

    world = World()
    world.live(plan("a"), scenario=scenario)
    assert world.stages("a")[2:5] == ["stopping", "stopped", "pending"]
    assert world.processes[0].signals == ["TERM"]


def test_one_that_backs_off_or_was_given_up_starts_at_once_when_it_is_asked_to() -> None:
    async def scenario(world: World) -> None:
        await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
        world.fleet.member("a").ask_to_start_again("an operator")
        await until(lambda: world.fleet.member("a").stage is Stage.BACKING_OFF)
        began = clock()
        world.fleet.member("a").ask_to_start_again("an operator")
        await until(serving(world, "a"))
        assert clock() - began == pytest.approx(READY_S, abs=0.1)

    slow = Restart(max=2, backoff=3000, backoff_max=3000)
    courses = [Course(ends_s=1, code=66), *[Course(ends_s=1, code=75)] * 2, Course()]
    World(restart=slow, a=courses).live(plan("a"), plan("b"), scenario=scenario)


def test_a_name_that_nobody_has_is_told() -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(NoSuchWorkerError) as caught:
            world.fleet.member("z")
        assert (caught.value.message, caught.value.hint) == (
            "z: no such worker",
            "there is: a",
        )

    World().live(plan("a"), scenario=scenario)


def test_what_a_worker_has_ended_with_is_forgiven_when_it_is_restarted() -> None:
    async def scenario(world: World) -> None:
        await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
        world.fleet.restart("a")
        await until(serving(world, "a"))
        world.alive("a")[0].end(-9)
        await until(lambda: len(world.processes) > 6 and serving(world, "a")())

    courses = [*[Course(ends_s=1, code=75)] * 4, Course()]
    assert World(a=courses).live(plan("a"), plan("b"), scenario=scenario) == 0


# --- a socket that is dead


def test_a_worker_whose_socket_was_shut_down_starts_again_to_get_another_one() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.lose_socket(plan("a").address)
        await until(lambda: len(world.processes) == 3)
        await until(serving(world, "a", "b"))

    world = World()
    world.live(plan("a"), plan("b"), scenario=scenario)
    assert world.processes[0].signals == ["TERM"], "it ends what runs"
    assert world.stages("b") == ["starting", "serving", "stopping", "stopped"]


def test_a_worker_that_shuts_its_socket_down_again_and_again_is_given_up() -> None:
    async def scenario(world: World) -> None:
        while "given_up" not in world.stages("a"):
            await until(lambda: serving(world, "a")() or "given_up" in world.stages("a"))
            world.fleet.lose_socket(plan("a").address)
            await until(lambda: not serving(world, "a")())
        assert serving(world, "b")()

    world = World(restart=Restart(max=3))
    world.live(plan("a"), plan("b"), scenario=scenario)
    assert len([process for process in world.processes if process.plan.name == "a"]) == 4
