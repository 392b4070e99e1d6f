"""The traps of `transitions` 0.9.3's AsyncMachine: each shown on the stock class, and not on ours.

Where it can be, one body runs on both, and only what is expected of it differs. The numbers are
those under which the traps were first written down.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from unittest.mock import ANY

import pytest
from transitions.extensions.asyncio import AsyncMachine

from ichat_lifecycle import machine as machine_module
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import LifecycleError, TransitionRefused
from ichat_lifecycle.guards import GUARDS, Facts
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.machine import Machine, _SequentialMachine
from ichat_lifecycle.ports import Fault
from ichat_lifecycle.states import TABLE, State, Trigger
from ichat_lifecycle.testing.fakes import FakeWorld
from ichat_lifecycle.testing.virtual_time import run_virtual

Action = Callable[[], Awaitable[None]]

PROVEN = Facts(arguments_valid=True, socket_open=True)  # BIND and START_ENGINE may pass
REFUSED = TransitionRefused.__name__
DEADLINE_S = 30


class Fires(Protocol):
    """What a body needs of either machine."""

    _model: Any

    @property
    def state(self) -> State: ...
    async def fire(self, trigger: Trigger) -> object: ...


Make = Callable[..., Fires]


class Stock:
    """Our table on the stock class as its manual has it: strings name the model's methods."""

    def __init__(
        self, facts: Facts, actions: dict[str, Action], prefix: str = "do_", **options: Any
    ) -> None:
        self._model: Any = (model := Model())
        for name, guard in GUARDS.items():
            setattr(model, name, partial(guard, facts))
        for name, action in actions.items():
            setattr(model, prefix + name, action)
        states = [state.value for state in State]
        initial = State.PARSED.value
        self.machine = AsyncMachine(model, states=states, initial=initial, **options)
        for row in TABLE:
            self.machine.add_transition(
                row.trigger.value,
                [source.value for source in row.sources],
                row.dest.value,
                conditions=list(row.guards),
                **({row.when.value: prefix + row.action} if row.action else {}),
            )

    @property
    def state(self) -> State:
        return State(self._model.state)

    async def fire(self, trigger: Trigger) -> object:
        return await getattr(self._model, trigger.value)()


class Model:
    """What a machine of `transitions` decorates."""

    state: str
    go: Callable[[], Awaitable[bool]]
    stop: Callable[[], Awaitable[bool]]


async def nothing() -> None:
    pass


ALL_DO_NOTHING: dict[str, Action] = {row.action: nothing for row in TABLE if row.action}


def stock(facts: Facts = PROVEN, /, *, options: Any = None, **actions: Action) -> Stock:
    """The stock class, with these actions and with these of its own options."""
    return Stock(facts, ALL_DO_NOTHING | actions, **(options or {}))


def ours(facts: Facts = PROVEN, /, **actions: Action) -> Machine:
    """Our machine, with these actions."""
    return Machine(lambda: facts, ALL_DO_NOTHING | actions, lambda trigger, source, dest: None)


def expect(of_stock: Any, of_ours: Any, *, made: Any = (stock, ours)) -> pytest.MarkDecorator:
    """One body, twice: what it shows with the stock class, and what with ours."""
    cases = zip(made, (of_stock, of_ours), ("stock", "ours"), strict=True)
    return pytest.mark.parametrize(
        ("make", "expected"), [pytest.param(make, what, id=who) for make, what, who in cases]
    )


def small(machine: type[AsyncMachine], **row: Any) -> Model:
    """For the hooks alone, without the rest of our machine: a → b by `go`, both → c by `stop`."""
    model = Model()
    both = [["stop", ["a", "b"], "c"], {"trigger": "go", "source": "a", "dest": "b", **row}]
    machine(model, states=["a", "b", "c"], transitions=both, initial="a", auto_transitions=False)
    return model


HOOKS = (partial(small, AsyncMachine), partial(small, _SequentialMachine))


async def outcome(work: Awaitable[object]) -> object:
    """What it returns, or the name of what it raises."""
    try:
        return await work
    except BaseException as error:
        return type(error).__name__


async def for_ever() -> None:
    await asyncio.sleep(1e6)


# --- 1 and 2: cancellation


@expect("False", "CancelledError")
def test_trap_1_cancellation_is_swallowed(make: Make, expected: str) -> None:
    """Stock: a cancelled caller reads False, as if a guard had not held, and goes on."""

    async def main() -> str:
        firing = asyncio.ensure_future(outcome(make(bind=for_ever).fire(Trigger.BIND)))
        await asyncio.sleep(1)
        firing.cancel()
        return str(await firing)

    assert run_virtual(main()) == expected


@expect("False", "TimeoutError")
def test_trap_1_a_time_out_never_fires(make: Make, expected: str) -> None:
    """Stock: it does cancel the trigger, but then nobody hears of it."""

    async def bounded() -> object:
        async with asyncio.timeout(1):
            return await make(bind=for_ever).fire(Trigger.BIND)

    async def main() -> str:
        return str(await outcome(bounded()))

    assert run_virtual(main()) == expected


@expect(["stopped", "cleaned up"], ["stopped", "worked"], made=HOOKS)
def test_trap_2_another_callers_task_is_cancelled(
    make: Callable[..., Model], expected: list[str]
) -> None:
    """Stock: a second trigger cancels the first caller's task, whose clean-up it does not await.
    Our hooks leave it alone; whether both may run is for the machine above them to say."""

    async def main() -> list[str]:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(1)
                seen.append("worked")
            except asyncio.CancelledError:
                await asyncio.sleep(1)
                seen.append("cleaned up")
                raise

        model = make(before=work)
        first = asyncio.ensure_future(model.go())
        await asyncio.sleep(0.1)
        await model.stop()
        seen.append("stopped")
        await asyncio.wait({first})
        return seen

    assert run_virtual(main()) == expected


@expect((True, State.STOPPING, False), (REFUSED, State.PARSED, None))
def test_trap_2_the_second_caller_wins(make: Make, expected: object) -> None:
    """Stock: over the first one's head. Ours leaves arbitration to one writer: who comes second is
    told so, and harms nobody."""

    async def main() -> object:
        machine = make(bind=lambda: asyncio.sleep(1))
        first = asyncio.ensure_future(machine.fire(Trigger.BIND))
        await asyncio.sleep(0.1)
        second, state = await outcome(machine.fire(Trigger.STOP)), machine.state
        return second, state, await first

    assert run_virtual(main()) == expected


# --- 3: the queue

QUEUED = partial(stock, options={"queued": True})


@expect((True, State.PARSED), (REFUSED, State.PARSED), made=(QUEUED, ours))
def test_trap_3_a_queued_trigger_returns_true_before_it_ran(make: Make, expected: object) -> None:
    """Stock: the one who asks for a stop is told that it happened. Ours says that it did not."""

    async def main() -> object:
        machine = make(bind=lambda: asyncio.sleep(1))
        first = asyncio.ensure_future(machine.fire(Trigger.BIND))
        await asyncio.sleep(0.1)
        told = await outcome(machine.fire(Trigger.STOP)), machine.state
        await first
        return told

    assert run_virtual(main()) == expected


@pytest.mark.parametrize("fails", [True, False])
def test_trap_3_a_pending_stop_is_lost_or_waits(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock: an error clears the queue, and without one a stop waits behind a slow start. Ours has
    no queue: a stop is a latch of the lifecycle, which ends the start at once."""

    async def slow() -> None:
        await asyncio.sleep(5)
        if fails:
            raise OSError("in use")

    async def on_stock() -> list[State]:
        machine = QUEUED(bind=slow)
        first = asyncio.ensure_future(outcome(machine.fire(Trigger.BIND)))
        await asyncio.sleep(1)
        assert await machine.fire(Trigger.STOP) is True
        await asyncio.sleep(1)
        before = machine.state
        await first
        return [before, machine.state]

    async def on_ours() -> list[State]:
        ports = FakeWorld().ports()
        monkeypatch.setattr(ports.binder, "bind", slow)
        lifecycle = Lifecycle(ports, Settings())
        life = asyncio.ensure_future(lifecycle.run())
        await asyncio.sleep(1)
        assert lifecycle.state is State.PARSED
        lifecycle.ask_to_stop("a test")
        await asyncio.sleep(1)
        before = lifecycle.state
        await life
        return [before, lifecycle.state]

    assert run_virtual(on_stock()) == [State.PARSED, State.PARSED if fails else State.STOPPING]
    assert run_virtual(on_ours()) == [State.STOPPED, State.STOPPED]


# --- 4: the context variable


@pytest.mark.parametrize(
    ("make", "inherits", "expected"),
    [
        pytest.param(stock, True, (True, True, True, State.ENGINE_UP), id="stock"),
        pytest.param(stock, False, (True, False, False, State.STOPPING), id="stock, other context"),
        pytest.param(ours, True, (REFUSED, False, None, State.ENGINE_UP), id="ours"),
    ],
)
def test_trap_4_a_task_of_a_callback_fires_a_stale_transition(
    make: Make, inherits: bool, expected: object
) -> None:
    """Stock: a task that a callback spawned inherits the mark of the running transition, so that
    nothing cancels what it fires later: long after a stop, it moves STOPPING back. Ours lets
    nothing overtake a transition in flight; the lifecycle ends its action first."""

    async def main() -> object:
        spawned: list[asyncio.Task[tuple[bool, object]]] = []

        async def go_on() -> tuple[bool, object]:
            marked = AsyncMachine.current_context.get() is not None
            await asyncio.sleep(1)  # by then, the transition that spawned this has ended
            return marked, await outcome(machine.fire(Trigger.START_ENGINE))

        async def bind() -> None:
            context = None if inherits else contextvars.Context()
            spawned.append(asyncio.create_task(go_on(), context=context))

        machine = make(bind=bind, start_engine=lambda: asyncio.sleep(10))
        await machine.fire(Trigger.BIND)
        await asyncio.sleep(5)
        stopped = await outcome(machine.fire(Trigger.STOP))
        assert (machine.state is State.STOPPING) == (stopped is True)
        return stopped, *await spawned[0], machine.state

    assert run_virtual(main()) == expected


# --- 5: several callbacks


@expect(["second begins", "first fails", "second ends"], ["first fails"], made=HOOKS)
def test_trap_5_callbacks_of_one_slot_run_at_once(
    make: Callable[..., Model], expected: list[str]
) -> None:
    """Stock: the second begins before the first has ended, and goes on after the first failed."""

    async def main() -> list[str]:
        seen: list[str] = []

        async def first() -> None:
            await asyncio.sleep(1)
            seen.append("first fails")
            raise RuntimeError

        async def second() -> None:
            seen.append("second begins")
            await asyncio.sleep(2)
            seen.append("second ends")

        with pytest.raises(RuntimeError):
            await make(before=[first, second]).go()
        await asyncio.sleep(10)
        return seen

    assert run_virtual(main()) == expected


# --- 6: conditions


@expect(State.BOUND, State.PARSED)
@pytest.mark.parametrize("said", [1, 1.0, ANY], ids=repr)
def test_trap_6_a_guard_that_does_not_say_true_passes(
    make: Make, expected: State, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock: what equals True passes. Ours: only True does.

    The other half of this trap stays open, as it does no harm here: all guards of a row run, also
    after one that does not hold. Ours are pure, and a refusal names each that does not hold.
    """
    monkeypatch.setitem(GUARDS, "arguments_valid", lambda facts: said)

    async def main() -> State:
        machine = make()
        await outcome(machine.fire(Trigger.BIND))
        return machine.state

    assert asyncio.run(main()) is expected


@expect(False, REFUSED)
@pytest.mark.parametrize("said", ["yes", [True], 2, None], ids=repr)
def test_trap_6_a_guard_that_is_merely_truthy_does_not_pass(
    make: Make, expected: object, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock: a "yes" is no, and the caller reads False without a reason. Ours raises."""
    monkeypatch.setitem(GUARDS, "arguments_valid", lambda facts: said)

    async def main() -> None:
        machine = make()
        assert await outcome(machine.fire(Trigger.BIND)) == expected
        assert machine.state is State.PARSED

    asyncio.run(main())


# --- 7 and 8: errors


def stock_on_enter(bind: Action) -> Stock:
    machine = stock()
    machine.machine.on_enter_BOUND(bind)
    return machine


@expect(
    ["OSError", State.BOUND, "MachineError"],
    ["OSError", State.PARSED, None],
    made=(stock_on_enter, ours),
)
def test_trap_7_the_state_is_set_before_the_work_that_fails(make: Make, expected: object) -> None:
    """Stock: with `on_enter`, BOUND is no proof that anything is bound, and there is no second try.
    Ours does what may fail before the change; `stop` comes after it, and must not fail."""
    errors = [OSError("in use")]

    async def bind() -> None:
        if errors:
            raise errors.pop()

    async def main() -> list[object]:
        machine = make(bind=bind)
        first, state = await outcome(machine.fire(Trigger.BIND)), machine.state
        return [first, state, await outcome(machine.fire(Trigger.BIND))]

    assert asyncio.run(main()) == expected


def stock_that_hears(hear: Action, bind: Action) -> Stock:
    return stock(bind=bind, options={"on_exception": hear})


def ours_that_hears_nothing(hear: Action, bind: Action) -> Machine:
    return ours(bind=bind)


@expect(True, False, made=(stock_that_hears, ours_that_hears_nothing))
@pytest.mark.parametrize("error", [RuntimeError("full"), asyncio.CancelledError()], ids=type)
def test_trap_8_on_exception_swallows_everything(
    make: Make, expected: bool, error: BaseException
) -> None:
    """Stock: whoever wants to hear of errors hides them, cancellation too. Ours has no such
    callback: an action's own error reaches the caller."""
    swallowed, heard = expected, list[str]()

    async def hear() -> None:
        heard.append("an error")

    async def fail() -> None:
        raise error

    async def main() -> object:
        return await outcome(make(hear, fail).fire(Trigger.BIND)), heard

    name = type(error).__name__
    assert asyncio.run(main()) == ((False, ["an error"]) if swallowed else (name, []))


async def broken(*told: object) -> None:
    raise RuntimeError("full")


def stock_told_at_the_end() -> Stock:
    return stock(options={"finalize_event": broken})


def ours_told_of_entering() -> Machine:
    def entered(*told: object) -> None:
        raise RuntimeError("full")

    return Machine(lambda: PROVEN, ALL_DO_NOTHING, entered)


@expect(True, "RuntimeError", made=(stock_told_at_the_end, ours_told_of_entering))
def test_trap_8_finalize_event_hides_errors(make: Make, expected: object) -> None:
    """Stock: all seems well. Ours tells of a change in its `after`, from where errors come out."""

    async def main() -> None:
        machine = make()
        assert await outcome(machine.fire(Trigger.BIND)) == expected
        assert machine.state is State.BOUND

    asyncio.run(main())


# --- 9: transitions that nobody wrote down


@expect((len(State), State.READY), (0, State.PARSED))
def test_trap_9_automatic_triggers_skip_the_guards(make: Make, expected: object) -> None:
    """Stock: `to_READY` leads there from anywhere, unproven. Ours has the table's triggers only."""

    async def main() -> object:
        made = make(Facts())
        events = getattr(made, "machine", machine_module._TABLE).events
        to_states = [name for name in events if name.startswith("to_")]
        if to_states:
            await events["to_READY"].trigger(made._model)
        return len(to_states), made.state

    assert asyncio.run(main()) == expected


def stock_with_wildcard(**actions: Action) -> Stock:
    machine = stock(**actions)
    machine.machine.add_transition("stop", "*", State.STOPPING.value, after="do_stop")
    return machine


@expect(
    ([True, True, True, True], 3, State.STOPPING),
    ([None, REFUSED, None, REFUSED], 1, State.STOPPED),
    made=(stock_with_wildcard, ours),
)
def test_trap_9_a_wildcard_includes_the_target(make: Make, expected: object) -> None:
    """Stock: a "*" meant for the live states stops what is stopping, and what has stopped. Ours
    writes every source down."""
    stops: list[str] = []

    async def stop() -> None:
        stops.append("stop")

    async def main() -> object:
        machine = make(stop=stop)
        triggers = [Trigger.STOP, Trigger.STOP, Trigger.FINISH, Trigger.STOP]
        outcomes = [await outcome(machine.fire(trigger)) for trigger in triggers]
        return outcomes, len(stops), machine.state

    assert asyncio.run(main()) == expected


# --- 10: names


def test_trap_10_may_is_always_true() -> None:
    """Stock: `may_…()` is a coroutine. Ours has nothing of the kind: `fire` is how to ask."""

    async def main() -> None:
        may = stock(Facts())._model.may_bind()
        assert may, "`if model.may_bind():` passes…"
        assert await may is False, "…although the guard does not hold"

        machine = ours(Facts())
        public = [name for name in dir(machine) if not name.startswith("_")]
        assert public == ["busy", "fire", "state"]
        assert await outcome(machine.fire(Trigger.BIND)) == REFUSED

    asyncio.run(main())


@expect(
    (State.PARSED, True), (State.BOUND, False), made=(partial(stock, options={"prefix": ""}), ours)
)
def test_trap_10_a_trigger_whose_name_is_taken_is_skipped(
    make: Make,
    expected: object,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stock: where the model has a method `bind`, `model.bind()` stays that: the action runs, the
    transition does not. Ours puts the actions elsewhere, as they are called like the triggers."""
    done: list[str] = []
    # Whoever configures logging from a dictionary disables the loggers that are there already.
    monkeypatch.setattr(logging.getLogger("transitions.core"), "disabled", False)

    async def bind() -> None:
        done.append("bind")

    async def main() -> object:
        with caplog.at_level("WARNING", logger="transitions"):
            machine = make(bind=bind)
        await machine.fire(Trigger.BIND)
        return machine.state, "Skip binding" in caplog.text

    assert asyncio.run(main()) == expected
    assert done == ["bind"]


def ours_built_anew(**actions: Action) -> Machine:
    machine_module._build()
    return ours(**actions)


@expect(["made", "AttributeError"], ["KeyError"], made=(stock, ours_built_anew))
@pytest.mark.parametrize("typo", [{"action": "bimd"}, {"guards": ("arguments_vaild",)}], ids=list)
def test_trap_10_a_typo_shows_only_when_it_is_called(
    make: Make, expected: object, typo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock: at the first try of that transition, which may be a stop. Ours cannot be made."""
    misspelt = (replace(TABLE[0], **typo), *TABLE[1:])
    for module in (vars(machine_module), globals()):
        monkeypatch.setitem(module, "TABLE", misspelt)

    async def main() -> list[object]:
        try:
            machine = make()
        except Exception as error:
            return [type(error).__name__]
        return ["made", await outcome(machine.fire(Trigger.BIND))]

    assert asyncio.run(main()) == expected


# --- 11: threads


def in_another_thread(call: Callable[[], object]) -> None:
    """Blocks this thread's loop meanwhile, so that what has changed then was changed over there."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_trap_11_a_trigger_runs_in_whatever_thread_fires_it() -> None:
    """Stock: the state changes under the loop that owns it."""
    threads: list[int] = []

    async def stop() -> None:
        threads.append(threading.get_ident())

    async def main() -> None:
        machine = stock(stop=stop)
        in_another_thread(lambda: asyncio.run(machine.fire(Trigger.STOP)))
        assert machine.state is State.STOPPING
        assert len(threads) == 1 and threads != [threading.get_ident()]

    asyncio.run(main())


@pytest.mark.parametrize(
    "ask",
    [
        lambda life: life.ask_to_stop("a test"),
        lambda life: life.post_fault(Fault("engine_died", "a test")),
        lambda life: life.fail(LifecycleError("a test")),
    ],
    ids=["ask_to_stop", "post_fault", "fail"],
)
def test_trap_11_other_threads_only_ask(ask: Callable[[Lifecycle], None]) -> None:
    """Ours: nothing has changed when the ask returns; the loop's own thread does all the rest."""
    threads: set[int] = set()

    async def main() -> None:
        ready = asyncio.Event()
        settings = Settings.model_validate({"restart": {"max": 0}})
        lifecycle = Lifecycle(FakeWorld().ports(), settings, ready)
        lifecycle.listeners.append(lambda snapshot: threads.add(threading.get_ident()))
        life = asyncio.ensure_future(outcome(lifecycle.run()))
        await ready.wait()
        before = lifecycle.snapshot
        in_another_thread(lambda: ask(lifecycle))
        assert lifecycle.snapshot is before
        assert lifecycle.fault_error() is None
        await life
        assert lifecycle.state is State.STOPPED

    run_virtual(main())
    assert threads == {threading.get_ident()}
