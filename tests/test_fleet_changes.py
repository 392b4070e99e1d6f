"""Changes of a running fleet: what differs is replaced, added or left, and nobody is refused."""

from __future__ import annotations

import asyncio

import pytest
from fleet_world import Course, World, plan, serving, until

from ichat_lifecycle.errors import AddressError, LifecycleError
from ichat_lifecycle.fleet.journal import FleetKind
from ichat_lifecycle.fleet.ports import Listener, Plan
from ichat_lifecycle.fleet.states import RESTING, Stage


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


def test_a_new_certificate_is_renewed_in_place() -> None:
    """No engine is loaded again for it. One that has told nothing yet has not read the old one."""

    def with_certificate(name: str, digest: str) -> Plan:
        return plan(name, certificate=("a.pem", None), certificate_digest=digest)

    async def scenario(world: World) -> None:
        await until(serving(world, "a", "b"))
        done = world.fleet.change([with_certificate("a", "2"), with_certificate("b", "1")])
        assert (done.renewed, done.replaced, done.started) == (("a",), (), ())
        assert done.as_dict()["renewed"] == ["a"]
        assert [process.renewals for process in world.processes] == [1, 0]
        assert [socket.digest for socket in world.sockets] == ["2", "1"]
        again = world.fleet.change([with_certificate("a", "2"), with_certificate("b", "1")])
        assert again.renewed == ()
        world.fleet.restart("a")
        await until(lambda: len(world.processes) == 3)
        world.fleet.change([with_certificate("a", "3"), with_certificate("b", "1")])
        assert world.processes[2].renewals == 0

    silent = Course(silent_s=0)
    World(a=[Course(), silent]).live(
        with_certificate("a", "1"), with_certificate("b", "1"), scenario=scenario
    )


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
