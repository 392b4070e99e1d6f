"""The machine: `transitions`' AsyncMachine, built from the table, with its traps closed.

The only module that imports `transitions`. What is changed, and why (version 0.9.3):

- `process_context`: the stock one turns every CancelledError into `return False` and cancels other
  callers' tasks. Ours runs the trigger in the caller's own task; arbitration is the lifecycle's.
- `await_all`: the stock one runs callbacks of one slot concurrently and goes on after one fails.
  Ours runs them in order and stops at the first failure.
- `cancel_running_transitions`: nothing to cancel, as there is one writer.
- `auto_transitions=False`: `to_STATE` would skip the guards.
- A trigger that is refused raises, and has changed nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from transitions.core import EventData, MachineError
from transitions.extensions.asyncio import AsyncMachine

from ichat_lifecycle.errors import TransitionRefused
from ichat_lifecycle.guards import Facts, failing
from ichat_lifecycle.states import TABLE, Row, State, Trigger, When, row_for

# The library logs at ERROR what it then raises; the journal says it once, with its cause.
logging.getLogger("transitions").setLevel(logging.CRITICAL)

Action = Callable[[], Awaitable[None]]
Entered = Callable[[Trigger, State, State], None]


class _SequentialMachine(AsyncMachine):  # type: ignore[misc]  # transitions is untyped here
    @staticmethod
    async def await_all(callables: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
        return [await call() for call in callables]

    async def callbacks(self, funcs: list[Any], event_data: EventData) -> None:
        for func in funcs:  # the stock one makes a list of partial functions, also of nothing
            await self.callback(func, event_data)

    async def process_context(self, func: Callable[[], Awaitable[Any]], model: object) -> Any:
        return await func()

    def __getattr__(self, name: str) -> Any:
        # The stock one makes up `on_enter_STATE` and its like, which add callbacks for every life.
        raise AttributeError(name)

    async def cancel_running_transitions(self, model: object, msg: str | None = None) -> None:
        return None


def _build() -> AsyncMachine:
    """The table as the library wants it. One serves every life: what differs is the model's.

    Raises:
        KeyError: a row names a guard that does not exist.
    """
    machine = _SequentialMachine(
        model=None,
        states=[state.value for state in State],
        initial=State.PARSED.value,
        auto_transitions=False,
        queued=False,
        send_event=True,
        model_attribute="value",
    )
    for row in TABLE:
        failing(row.guards, Facts())
        for source in row.sources:
            _add(machine, row, source)
    return machine


def _add(machine: AsyncMachine, row: Row, source: State) -> None:
    def hold(event: EventData) -> bool:
        return not failing(row.guards, event.model.facts())

    async def act(event: EventData) -> None:
        if row.action is not None:
            await event.model.actions[row.action]()

    async def enter(event: EventData) -> None:
        event.model.entered(row.trigger, source, row.dest)

    machine.add_transition(
        row.trigger.value,
        source.value,
        row.dest.value,
        conditions=[hold],
        before=[act] if row.when is When.BEFORE else [],
        after=[enter] if row.when is When.BEFORE else [enter, act],
    )


class _Model:
    """One life's own part: what the callbacks of the table's rows find in their event."""

    def __init__(
        self, facts: Callable[[], Facts], actions: Mapping[str, Action], entered: Entered
    ) -> None:
        self.value = State.PARSED.value
        self.facts = facts
        self.actions = {row.action: actions[row.action] for row in TABLE if row.action}
        self.entered = entered
        self.busy = False


class Machine:
    """The state, and `fire`, the only way to change it.

    Args:
        facts: gives the facts the guards look at, at the moment of asking.
        actions: the effects by the names the table uses.
        entered: called in the same step as the change of state; must not block, await or raise.

    Raises:
        KeyError: a row names an action that `actions` has not.
    """

    def __init__(
        self, facts: Callable[[], Facts], actions: Mapping[str, Action], entered: Entered
    ) -> None:
        self._model = _Model(facts, actions, entered)

    @property
    def state(self) -> State:
        return State(self._model.value)

    @property
    def busy(self) -> bool:
        """Whether a transition is in flight."""
        return self._model.busy

    async def fire(self, trigger: Trigger) -> None:
        """Runs one transition to its end, in the caller's task.

        Raises:
            TransitionRefused: no row from this state, a guard does not hold, another transition is
                in flight. Nothing has changed.
            BaseException: what the row's action raised; the state has not changed.
        """
        source, model = self.state, self._model
        if model.busy:
            raise TransitionRefused(f"{trigger} from {source}: another transition is in flight")
        model.busy = True
        try:
            done = await _TABLE.events[trigger.value].trigger(model)
        except MachineError as error:
            raise TransitionRefused(f"{trigger} is not allowed from {source}") from error
        finally:
            model.busy = False
        if not done:
            row = row_for(source, trigger)
            missing = failing(row.guards, model.facts()) if row else ()
            raise TransitionRefused(
                f"{trigger} from {source}: guard {', '.join(missing)} does not hold"
            )


_TABLE = _build()
