"""Work in threads: its outcome reaches the loop, and nobody has to wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from ichat_lifecycle.adapters.threads import Threaded, in_thread

DEADLINE_S = 30


def test_the_value_comes_back_from_another_thread() -> None:
    async def main() -> None:
        name = await in_thread(lambda: threading.current_thread().name, "worker")
        assert name == "worker" != threading.current_thread().name

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_comes_back_as_it_is(error: BaseException) -> None:
    """An exit in a library (argparse's, uvicorn's) does not end the thread in silence."""

    def fail() -> None:
        raise error

    async def main() -> BaseException:
        try:
            await in_thread(fail, "worker")
        except BaseException as caught:
            return caught
        raise AssertionError

    assert asyncio.run(main()) is error


def test_the_loop_goes_on_meanwhile() -> None:
    go = threading.Event()

    async def main() -> None:
        asyncio.get_running_loop().call_soon(go.set)
        assert await in_thread(lambda: go.wait(DEADLINE_S), "worker") is True

    asyncio.run(main())


@pytest.mark.parametrize("function", [lambda: "late", lambda: int("late")], ids=["value", "error"])
def test_cancelling_result_leaves_the_thread_running(function: Callable[[], object]) -> None:
    """Its outcome can still be had, and one that nobody asks for is no warning."""
    go = threading.Event()

    def work() -> object:
        go.wait(DEADLINE_S)
        return function()

    async def main() -> None:
        threaded = Threaded(work, "worker")
        waiting = asyncio.create_task(threaded.result())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert threaded.running
        go.set()
        async with asyncio.timeout(DEADLINE_S):
            await threaded.ended()
        assert not threaded.running
        await asyncio.sleep(0)

    complaints: list[object] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        runner.run(main())
    assert complaints == []


def test_ended_waits_for_the_thread_itself() -> None:
    go = threading.Event()

    async def main() -> None:
        threaded = Threaded(lambda: go.wait(DEADLINE_S), "worker")
        ending = asyncio.create_task(threaded.ended(poll_s=0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert threaded.running and not ending.done()
        go.set()
        async with asyncio.timeout(DEADLINE_S):
            await ending
        assert not threaded.running

    asyncio.run(main())


def test_a_loop_that_is_gone_harms_no_thread() -> None:
    """And as a daemon, a stuck one does not keep the process from ending."""
    go = threading.Event()
    found: list[threading.Thread] = []

    async def main() -> None:
        Threaded(lambda: go.wait(DEADLINE_S), "orphan")
        found.extend(t for t in threading.enumerate() if t.name == "orphan")

    asyncio.run(main())
    (thread,) = found
    assert thread.daemon
    go.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
