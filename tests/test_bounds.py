"""race() and error_of(), under virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from ichat_lifecycle.bounds import Latch, error_of, race, watched
from ichat_lifecycle.testing.virtual_time import run_virtual


async def works(seconds: float, error: BaseException | None = None) -> str:
    await asyncio.sleep(seconds)
    if error is not None:
        raise error
    return "done"


async def ignores_cancellation(seconds: float) -> None:
    while (left := seconds - asyncio.get_running_loop().time()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            continue


def raced(
    work: Coroutine[Any, Any, Any], timeout_s: float | None, interrupt_after_s: float | None = None
) -> tuple[bool, float, bool]:
    """What race() said, after how long, and whether the task had ended by then."""

    async def main() -> tuple[bool, float, bool]:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        interrupt = Latch()
        if interrupt_after_s is not None:
            loop.call_later(interrupt_after_s, interrupt.set)
        ended = await race(task, timeout_s, interrupt if interrupt_after_s is not None else None)
        took = loop.time()
        outcome = ended, took, task.done()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() <= {asyncio.current_task(), task}, "nothing of its own is left"
        assert task.cancelling() == 0, "cancelling is the caller's"
        task.cancel()
        await asyncio.wait({task})
        return outcome

    return run_virtual(main())


@pytest.mark.parametrize(
    ("work_s", "timeout_s", "interrupt_s", "expected"),
    [
        (1, None, None, (True, 1, True)),
        (1, 2, None, (True, 1, True)),
        (2, 1, None, (False, 1, False)),
        (2, 0, None, (False, 0, False)),
        (2, None, 1, (False, 1, False)),
        (1, None, 2, (True, 1, True)),
        (3, 1, 2, (False, 1, False)),
        (3, 2, 1, (False, 1, False)),
        (2, None, 0, (False, 0, False)),
    ],
)
def test_whichever_comes_first(
    work_s: float,
    timeout_s: float | None,
    interrupt_s: float | None,
    expected: tuple[bool, float, bool],
) -> None:
    assert raced(works(work_s), timeout_s, interrupt_s) == expected


def test_it_does_not_wait_for_what_ignores_its_cancellation() -> None:
    """The point of it: asyncio.timeout would wait for the hour that this takes to end."""
    assert raced(ignores_cancellation(3600), 1) == (False, 1, False)


@pytest.mark.parametrize("error", [RuntimeError("no"), asyncio.CancelledError()])
def test_the_tasks_own_error_is_not_raised(error: BaseException) -> None:
    """It has ended; what with is for error_of() to say."""
    assert raced(works(1, error), 2) == (True, 1, True)


def test_cancelling_the_caller_leaves_the_task_running() -> None:
    async def main() -> None:
        task = asyncio.ensure_future(works(2))
        racing = asyncio.ensure_future(race(task, 10, Latch()))
        await asyncio.sleep(1)
        racing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await racing
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task(), task}, "its waiter is gone"
        assert await task == "done"

    run_virtual(main())


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, None), (RuntimeError("no"), RuntimeError), (asyncio.CancelledError(), None)],
)
def test_error_of(error: BaseException | None, expected: type[BaseException] | None) -> None:
    """A cancellation counts as a failure."""

    async def main() -> BaseException | None:
        task = asyncio.ensure_future(works(0, error))
        await asyncio.wait({task})
        return error_of(task)

    found = run_virtual(main())
    if isinstance(error, asyncio.CancelledError):
        assert isinstance(found, asyncio.CancelledError)
    else:
        assert found is error
        assert expected is None or isinstance(found, expected)


@pytest.mark.parametrize("error", [None, ValueError("x"), asyncio.CancelledError()])
def test_watched_work_ends_as_it_would_alone(error: BaseException | None) -> None:
    async def main() -> str:
        return await watched(works(1, error), works(5, KeyError("watch")))

    if error is None:
        assert run_virtual(main()) == "done"
    else:
        with pytest.raises(type(error)):
            run_virtual(main())


def test_what_a_watch_raises_ends_the_work() -> None:
    ended_at: list[float] = []

    async def work() -> str:
        try:
            return await works(60)
        finally:
            ended_at.append(asyncio.get_running_loop().time())

    async def main() -> None:
        began = asyncio.get_running_loop().time()
        with pytest.raises(KeyError, match="watch"):
            await watched(work(), works(2, KeyError("watch")))
        assert ended_at == [began + 2]

    run_virtual(main())


def test_a_cancellation_ends_work_and_watch() -> None:
    async def main() -> None:
        task = asyncio.create_task(watched(works(60), works(60)))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())
