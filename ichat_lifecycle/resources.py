"""What has been acquired, in order; released once each, in reverse, each under its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ichat_lifecycle.bounds import Abandoned, Interrupted, Latch, error_of, race
from ichat_lifecycle.ports import Release


@dataclass(frozen=True, slots=True)
class Held:
    """One resource. `deadline_s` bounds its release."""

    name: str
    release: Release
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Released:
    """How one release went; `error` is None when it went well."""

    name: str
    took_s: float
    error: BaseException | None


class ResourceStack:
    """Acquisitions are pushed BEFORE they start: one that fails half way is released too.

    `abandoned` holds releases that outran their deadline and were cancelled.
    """

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._lost: list[str] = []
        self.abandoned = Abandoned()

    def push(self, name: str, release: Release, deadline_s: float) -> None:
        self._held.append(Held(name, release, deadline_s))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(held.name for held in self._held)

    @property
    def unreleased(self) -> int:
        """Resources still held, and those whose release failed or outran its deadline."""
        return len(self._held) + len(self._lost)

    @property
    def lost(self) -> tuple[str, ...]:
        """Resources whose release failed or outran its deadline."""
        return tuple(self._lost)

    async def release_above(
        self,
        name: str | None,
        on_released: Callable[[Released], None],
        interrupt: Latch | None = None,
    ) -> None:
        """Releases what was acquired after `name` (None: everything), newest first.

        Each outcome goes to `on_released`.

        Raises:
            Interrupted: `interrupt` was set; the rest is still held.
            asyncio.CancelledError: the same, when the caller is cancelled.
        """
        while self._held and self._held[-1].name != name:
            held = self._held.pop()  # before its release: a second caller cannot release it again
            on_released(await self._release(held, interrupt))

    async def _release(self, held: Held, interrupt: Latch | None) -> Released:
        loop = asyncio.get_running_loop()
        began = loop.time()
        task = loop.create_task(_call(held.release), name=f"release-{held.name}")
        try:
            ended = await race(task, held.deadline_s, interrupt)
            if not ended and interrupt is not None and interrupt.is_set():
                raise Interrupted
        except (asyncio.CancelledError, Interrupted):
            # It goes on: whoever releases next waits for it, instead of taking it for done.
            self.push(held.name, lambda: task, held.deadline_s)
            raise
        error: BaseException | None
        if ended:
            error = error_of(task)
        else:
            task.cancel()
            self.abandoned.add(task)
            error = TimeoutError(f"{held.name}: not released within {held.deadline_s:g} s")
        if error is not None:
            self._lost.append(held.name)
        return Released(held.name, loop.time() - began, error)


async def _call(release: Release) -> None:
    await release()
