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

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from transitions.core import MachineError
from transitions.extensions.asyncio import AsyncMachine

from ichat_lifecycle.errors import TransitionRefused
from ichat_lifecycle.guards import GUARDS, Facts, failing
from ichat_lifecycle.states import TABLE, Row, State, Trigger, When, row_for

# The library logs at ERROR what it then raises; the journal says it once, with its cause.
logging.getLogger("transitions").setLevel(logging.CRITICAL)

Action = Callable[[], Awaitable[None]]
Entered = Callable[[Trigger, State, State], None]


class _SequentialMachine(AsyncMachine):  # type: ignore[misc]  # transitions is untyped here
    @staticmethod
    async def await_all(callables: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
        return [await call() for call in callables]

    async def process_context(self, func: Callable[[], Awaitable[Any]], model: object) -> Any:
        return await func()

    async def cancel_running_transitions(self, model: object, msg: str | None = None) -> None:
        return None


class _Model:
    """What `transitions` decorates with `state` and one method per trigger."""

    state: str


class Machine:
    """The state, and `fire`, the only way to change it.

    Args:
        facts: gives the facts the guards look at, at the moment of asking.
        actions: the effects by the names the table uses.
        entered: called in the same step as the change of state; must not block, await or raise.
    """

    def __init__(
        self, facts: Callable[[], Facts], actions: Mapping[str, Action], entered: Entered
    ) -> None:
        self._facts = facts
        self._entered = entered
        self._wanted: object | None = None
        self._model = _Model()
        machine = _SequentialMachine(
            model=self._model,
            states=[state.value for state in State],
            initial=State.PARSED.value,
            auto_transitions=False,
            queued=False,
        )
        for row in TABLE:
            self._add(machine, row, actions)

    def _add(self, machine: AsyncMachine, row: Row, actions: Mapping[str, Action]) -> None:
        action = [actions[row.action]] if row.action else []
        for source in row.sources:

            async def enter(source: State = source) -> None:
                self._entered(row.trigger, source, row.dest)

            machine.add_transition(
                row.trigger.value,
                source.value,
                row.dest.value,
                conditions=[self._condition(name) for name in row.guards],
                before=[*(action if row.when is When.BEFORE else []), self._still_wanted],
                after=[enter, *(action if row.when is When.AFTER else [])],
            )

    def _condition(self, name: str) -> Callable[[], bool]:
        return lambda: GUARDS[name](self._facts()) is True

    async def _still_wanted(self) -> None:
        # Invariant: a transition that was given up never changes the state, however late its
        # action comes back. Nothing suspends between this check and the change.
        if self._wanted is not asyncio.current_task():
            raise TransitionRefused("the transition was given up while its action ran")

    @property
    def state(self) -> State:
        return State(self._model.state)

    @property
    def busy(self) -> bool:
        """Whether a transition is in flight."""
        return self._wanted is not None

    async def fire(self, trigger: Trigger) -> None:
        """Runs one transition to its end, in the caller's task.

        Raises:
            TransitionRefused: no row from this state, a guard does not hold, another transition is
                in flight, or this one was given up. Nothing has changed.
            BaseException: what the row's action raised; the state has not changed.
        """
        source = self.state
        if self._wanted is not None:
            raise TransitionRefused(f"{trigger} from {source}: another transition is in flight")
        self._wanted = token = asyncio.current_task()
        try:
            done = await getattr(self._model, trigger.value)()
        except MachineError as error:
            raise TransitionRefused(f"{trigger} is not allowed from {source}") from error
        finally:
            if self._wanted is token:
                self._wanted = None
        if not done:
            row = row_for(source, trigger)
            missing = failing(row.guards, self._facts()) if row else ()
            raise TransitionRefused(
                f"{trigger} from {source}: guard {', '.join(missing) or 'conditions'} does not hold"
            )

    def give_up(self) -> None:
        """Disowns the transition in flight: its action may still end, the state will not change."""
        self._wanted = None
