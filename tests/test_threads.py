"""Work in threads: its outcome reaches the loop, and nobody has to wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ichat_lifecycle.adapters.threads import SWITCH_INTERVAL_S, Threaded, considerate, in_thread

DEADLINE_S = 30


def complaints_of(main: Coroutine[Any, Any, None]) -> list[object]:
    """What the loop's exception handler was told."""
    complaints: list[object] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        runner.run(main)
        gc.collect()  # what nobody retrieved is told of when it is thrown away
    return complaints


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


def test_who_has_the_outcome_finds_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one busy core a thread that had delivered was still there after the end of run()."""

    async def main() -> None:
        loop, looked = asyncio.get_running_loop(), threading.Event()
        tell = loop.call_soon_threadsafe

        def tell_slowly(*call: Any, **more: Any) -> None:
            tell(*call, **more)
            looked.wait(0.2)  # who is not waited for is seen meanwhile

        monkeypatch.setattr(loop, "call_soon_threadsafe", tell_slowly)
        await in_thread(lambda: None, "worker")
        assert "worker" not in [thread.name for thread in threading.enumerate()]
        looked.set()

    asyncio.run(main())


def test_the_loop_goes_on_meanwhile() -> None:
    go = threading.Event()

    async def main() -> None:
        asyncio.get_running_loop().call_soon(go.set)
        assert await in_thread(lambda: go.wait(DEADLINE_S), "worker") is True

    asyncio.run(main())


@pytest.mark.parametrize("function", [lambda: "late", lambda: int("late")], ids=["value", "error"])
@pytest.mark.parametrize("ask_again", [True, False])
def test_cancelling_result_leaves_the_thread_running(
    function: Callable[[], object], ask_again: bool
) -> None:
    """Its outcome can still be had; one that nobody asks for again is no warning."""
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
        if ask_again:
            (outcome,) = await asyncio.gather(threaded.result(), return_exceptions=True)
            assert outcome == "late" or isinstance(outcome, ValueError)
        await asyncio.sleep(0)

    assert complaints_of(main()) == []


def test_an_error_that_nobody_asks_for_is_no_warning() -> None:
    async def main() -> None:
        await Threaded(lambda: int("late"), "worker").ended()
        await asyncio.sleep(0)

    assert complaints_of(main()) == []


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


@pytest.mark.parametrize("error", [None, ImportError("broken")])
@pytest.mark.parametrize("collecting", [True, False])
def test_consideration_for_other_threads_ends(error: Exception | None, collecting: bool) -> None:
    """What it changes is the interpreter's own: it is put back, also after a failed import."""
    interval = sys.getswitchinterval()
    if not collecting:
        gc.disable()
    try:
        with contextlib.suppress(ImportError), considerate():
            assert (gc.isenabled(), sys.getswitchinterval()) == (False, SWITCH_INTERVAL_S)
            if error is not None:
                raise error
        assert (gc.isenabled(), sys.getswitchinterval()) == (collecting, interval)
    finally:
        gc.unfreeze()
        gc.enable()
