"""The supervisor of a fleet, under virtual time, on processes and sockets that are fakes."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import pytest
from fleet_world import READY_S, STOP_S, Course, World, plan, serving, until

from ichat_lifecycle.config import Restart
from ichat_lifecycle.errors import AddressError, LifecycleError
from ichat_lifecycle.fleet.fleet import NoSuchWorkerError
from ichat_lifecycle.fleet.journal import FleetKind
from ichat_lifecycle.fleet.ports import KILL_MARGIN_S, Listener
from ichat_lifecycle.fleet.states import RESTING, TABLE, Event, Stage, row_for


def clock() -> float:
    return asyncio.get_running_loop().time()


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
        world.unlaunchable = False
        await until(serving(world, "a"))

    world = World()
    world.unlaunchable = True
    assert world.live(plan("a"), scenario=scenario) == 0
    cause = world.records("a")[1]["cause"]
    assert cause.startswith("ended with 71: no process could be started: [Errno 11]")


def test_one_that_never_becomes_ready_is_waited_for() -> None:
    """Its own deadlines end it."""

    async def scenario(world: World) -> None:
        await asyncio.sleep(10_000)
        assert world.fleet.member("a").stage is Stage.STARTING

    World(a=[Course(ready_s=None)]).live(plan("a"), scenario=scenario)


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


# --- changes


def test_a_change_touches_only_what_differs() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "same", "other", "old"))
        done = world.fleet.change([plan("same"), plan("other", argv=("--x",)), plan("new")])
        assert (done.started, done.replaced, done.removed) == (("new",), ("other",), ("old",))
        await until(lambda: len(world.processes) == 5)
        await until(serving(world, "same", "other", "new"))
        assert [m.name for m in world.fleet.members] == ["same", "other", "new"]

    world = World()
    assert world.live(plan("same"), plan("other"), plan("old"), scenario=scenario) == 0
    assert world.stages("same") == ["starting", "serving", "stopping", "stopped"]
    assert world.stages("old") == ["starting", "serving", "stopping", "stopped"]
    assert [s.address for s in world.sockets].count("other:1") == 1, "it is kept"


def test_what_is_changed_is_replaced_one_at_a_time() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, *"abc"))
        world.fleet.change([plan(name, env={"A": "1"}) for name in "abc"])
        least = 3
        while len(world.processes) < 6 or not serving(world, *"abc")():
            least = min(least, sum(m.serving for m in world.fleet.members))
            await asyncio.sleep(0.05)
        assert least == 2

    World().live(*map(plan, "abc"), scenario=scenario)


def test_a_replacement_that_fails_stops_the_change() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, *"ab"))
        world.fleet.change([plan(name, env={"A": "1"}) for name in "ab"])
        await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
        await asyncio.sleep(100)
        assert world.fleet.member("b").plan == plan("b")
        assert world.fleet.member("b").serving

    World(a=[Course(), Course(ends_s=1, code=2)]).live(*map(plan, "ab"), scenario=scenario)


def test_before_has_the_new_one_ready_before_the_old_one_stops() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        (socket,) = world.sockets
        world.fleet.change([plan("a", env={"A": "1"}, replace="before")])
        while len(world.alive()) < 2 or world.alive()[0].signals == []:
            assert socket.owners, "somebody serves all the time"
            await asyncio.sleep(0.05)
        assert len(socket.owners) == 1
        await until(lambda: len(world.alive()) == 1)
        assert world.fleet.member("a").plan.env == {"A": "1"}
        assert len(world.fleet.members) == 1

    world = World()
    assert world.live(plan("a"), scenario=scenario) == 0
    assert len(world.processes) == 2
    assert world.sockets[0].most_owners == 2


def test_before_keeps_the_old_one_where_the_new_one_does_not_start() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        changed = plan("a", env={"A": "1"}, replace="before")
        world.fleet.change([changed])
        await until(lambda: len(world.processes) == 2)
        await until(lambda: len(world.fleet.members) == 1)
        assert world.fleet.member("a").plan == plan("a")
        assert world.processes[0].alive
        assert world.processes[0].signals == []

    world = World(a=[Course(), Course(ends_s=3, code=2)])
    assert world.live(plan("a"), scenario=scenario) == 0


def test_another_address_gets_a_socket_of_its_own_and_the_old_one_is_closed() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        moved = [plan(name, port=2) for name in "ab"]
        world.fleet.change(moved)
        await until(lambda: len(world.processes) == 4)
        await until(serving(world, "a", "b"))
        await asyncio.sleep(1)
        assert [s.closed for s in world.sockets] == [True, True, False, False]

    assert World().live(plan("a"), plan("b"), scenario=scenario) == 0


def test_a_change_whose_address_is_taken_changes_nothing() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.taken.add("c:1")
        with pytest.raises(AddressError):
            world.fleet.change([plan("b"), plan("c")])
        assert [m.name for m in world.fleet.members] == ["a"]
        assert [s.closed for s in world.sockets] == [False, True]
        assert world.journal.records(FleetKind.RELOAD) == ()

    World().live(plan("a"), scenario=scenario)


@pytest.mark.parametrize("how", ["after", "before"])
def test_a_change_takes_the_place_of_one_under_way(how: str) -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.change([plan("a", replace=how, argv=("--wrong",))])
        await until(lambda: len(world.processes) > 3)  # it does not start, again and again
        world.fleet.change([plan("a", replace=how, argv=("--right",))])
        await until(lambda: serving(world, "a")() and len(world.alive()) == 1)
        assert world.alive()[0].plan.argv == ("--right",)

    courses = [Course(), *[Course(ends_s=1, code=75)] * 3, Course()]
    assert World(a=courses).live(plan("a"), scenario=scenario) == 0


def test_what_was_asked_to_go_comes_again_once_it_has_gone() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.change([plan("b")])
        await asyncio.sleep(1)
        world.fleet.change([plan("a"), plan("b")])
        await asyncio.sleep(0.5)
        assert len(world.alive("a")) == 1
        await until(serving(world, "a", "b"))

    world = World(a=[Course(stop_s=10)])
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 0
    assert world.sockets[0].most_owners == 1


def test_two_that_change_places_wait_for_each_other() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.change([plan("a", host="b"), plan("b", host="a")])
        await until(lambda: len(world.processes) == 4)
        await until(serving(world, "a", "b"))

    world = World()
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 0
    assert [socket.most_owners for socket in world.sockets] == [1, 1]


def test_a_new_one_waits_for_the_control_port_of_one_that_leaves() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.change([plan("b", control=Listener("c", 2)), plan("c")])
        await asyncio.sleep(1)
        assert world.alive("c")
        assert not world.alive("b")
        await until(serving(world, "b", "c"))

    courses = [Course(stop_s=10)]
    assert World(a=courses).live(plan("a", control=Listener("c", 2)), scenario=scenario) == 0


def test_a_fleet_that_has_come_to_rest_is_changed_no_more() -> None:
    world = World(a=[Course(ends_s=1, code=2)])
    assert world.live(plan("a")) == 2
    with pytest.raises(LifecycleError, match="the fleet stops"):
        world.fleet.change([plan("b")])


def test_a_successor_that_starts_again_has_its_socket_to_itself() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.change([plan("a", replace="before", env={"A": "1"})])
        await until(lambda: len(world.alive()) == 1 and len(world.processes) == 2)
        world.alive()[0].end(-9)
        await until(lambda: len(world.processes) == 3 and serving(world, "a")())

    world = World()
    assert world.live(plan("a"), scenario=scenario) == 0
    assert [process.accept_from for process in world.processes] == ["bound", "ready", "bound"]


@pytest.mark.parametrize("seconds", [0.0, 1.0, 3.0, 8.0, 11.0, 13.0, 15.0])
@pytest.mark.parametrize("how", ["after", "before"])
def test_a_stop_in_the_middle_of_a_change_leaves_nothing(seconds: float, how: str) -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.change([plan("a", replace=how, env={"A": "1"}), plan("c")])
        await asyncio.sleep(seconds)

    World().live(plan("a"), plan("b"), scenario=scenario)


def test_what_is_at_rest_is_replaced_too() -> None:
    async def scenario(world: World) -> None:
        await until(lambda: world.fleet.member("a").stage in RESTING)
        world.fleet.change([plan("a", argv=("--right",)), plan("b")])
        await until(serving(world, "a"))

    courses = [Course(ends_s=1, code=2), Course()]
    assert World(a=courses).live(plan("a"), plan("b"), scenario=scenario) == 0


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


def test_a_stop_at_once_does_not_wait_for_a_word_of_the_worker() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.member("a").ask_to_stop("an operator", now=True)
        await asyncio.sleep(0.1)
        assert world.processes[0].signals == ["TERM", "INT"]

    assert World(a=[Course(silent_s=11)]).live(plan("a"), scenario=scenario) == 0


def test_a_second_change_replaces_one_at_a_time_too() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        changed = [plan(name, env={"A": "1"}) for name in "ab"]
        world.fleet.change(changed)
        await asyncio.sleep(5)
        world.fleet.change(changed)
        await until(lambda: len(world.processes) == 4)
        assert world.fleet.member("a").serving
        await until(serving(world, "a", "b"))

    assert World().live(plan("a"), plan("b"), scenario=scenario) == 0


def test_successors_that_are_superseded_come_one_after_the_other() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        for number in range(3):
            world.fleet.change([plan("a", replace="before", env={"A": str(number)})])
            await asyncio.sleep(2)
            assert len(world.alive()) <= 2
        await until(lambda: len(world.processes) == 3 and len(world.alive()) == 1)

    courses = [Course(), Course(stop_s=20), Course()]
    assert World(a=courses).live(plan("a"), scenario=scenario) == 0


def test_a_successor_that_dies_waits_for_the_one_before_to_leave() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        world.fleet.change([plan("a", replace="before", env={"A": "1"})])
        await until(serving(world, "a"))
        await until(lambda: world.processes[0].signals == ["TERM"])
        world.processes[1].end(-9)
        await asyncio.sleep(10)
        assert len(world.processes) == 2
        await until(lambda: len(world.processes) == 3 and serving(world, "a")())

    courses = [Course(stop_s=20), Course()]
    assert World(a=courses).live(plan("a"), scenario=scenario) == 0


def test_a_host_that_overlaps_with_one_that_is_held_is_refused_in_words() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a"))
        with pytest.raises(AddressError, match="cannot be had while a has 127"):
            world.fleet.change([plan("a", host="0.0.0.0")])

    assert World().live(plan("a", host="127.0.0.1"), scenario=scenario) == 0


@pytest.mark.parametrize(
    ("one", "other", "collide"),
    [
        (Listener("127.0.0.1", 1), Listener("127.0.0.1", 1), True),
        (Listener("127.0.0.1", 1), Listener("127.0.0.1", 2), False),
        (Listener("127.0.0.1", 1), Listener("127.0.0.2", 1), False),
        (Listener("127.0.0.1", 0), Listener("127.0.0.1", 0), False),
        (Listener("localhost", 1), Listener("127.0.0.1", 1), True),
        (Listener("0.0.0.0", 1), Listener("127.0.0.1", 1), True),
        (Listener("", 1), Listener("127.0.0.1", 1), True),
        (Listener("::", 1), Listener("127.0.0.1", 1), True),
        (Listener("0.0.0.0", 1), Listener("::1", 1), False),
        (Listener(uds="/a"), Listener(uds="/a"), True),
        (Listener(uds="/a"), Listener(uds="/b"), False),
        (Listener("", 1), Listener(uds="/b"), False),
    ],
)
def test_who_cannot_listen_at_the_same_time(one: Listener, other: Listener, collide: bool) -> None:
    assert one.collides(other) is other.collides(one) is collide


def test_what_a_worker_has_ended_with_is_forgiven_when_it_is_restarted() -> None:
    async def scenario(world: World) -> None:
        await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
        world.fleet.restart("a")
        await until(serving(world, "a"))
        world.alive("a")[0].end(-9)
        await until(lambda: len(world.processes) > 6 and serving(world, "a")())

    courses = [*[Course(ends_s=1, code=75)] * 4, Course()]
    assert World(a=courses).live(plan("a"), plan("b"), scenario=scenario) == 0


def test_a_reload_does_not_wait_for_a_worker_that_an_earlier_one_has_replaced() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.change([plan("a", env={"A": "1"}), plan("b")])
        await until(lambda: len(world.processes) == 3 and serving(world, "a", "b")())
        world.alive("a")[0].end(-9)
        await asyncio.sleep(1)
        world.fleet.change([plan("a", env={"A": "1"}), plan("b", env={"A": "1"})])
        await until(lambda: world.fleet.member("b").plan.env == {"A": "1"})
        assert not world.fleet.member("a").serving

    assert World().live(plan("a"), plan("b"), scenario=scenario) == 0


def test_one_that_made_room_for_a_successor_that_failed_has_what_the_file_says() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.change([plan("a", host="b"), plan("b", host="a")])
        await until(lambda: world.fleet.member("a").stage is Stage.GIVEN_UP)
        await until(serving(world, "b"))

    world = World(a=[Course(), Course(ends_s=1, code=66)])
    assert world.live(plan("a"), plan("b"), scenario=scenario) == 66


def test_one_that_makes_room_is_not_restarted() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        world.fleet.change([plan("a", host="b"), plan("b", host="a")])
        await until(lambda: world.fleet.member("b").gone)
        with pytest.raises(LifecycleError, match="b is about to be changed"):
            world.fleet.restart("b")
        await until(serving(world, "a", "b"))

    assert World().live(plan("a"), plan("b"), scenario=scenario) == 0


def test_an_address_that_was_left_can_be_had_by_another_control_plane() -> None:
    async def scenario(world: World) -> None:
        await until(serving(world, "b", "a"))
        moved = plan("b", control=Listener("a", 1)), plan("a", host="z")
        world.fleet.change(moved)
        await until(lambda: len(world.alive("b")) == 1 and len(world.processes) == 3)
        assert world.sockets[1].closed
        await until(serving(world, "a", "b"))

    assert World().live(plan("b"), plan("a"), scenario=scenario) == 0
