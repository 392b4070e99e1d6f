"""The end of what an engine's client leaves in the process; vLLM is a package made for the test."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ichat_lifecycle.adapters.engine_remains import (
    EngineTasks,
    end_zeromq,
    refuse_questions,
    return_memory,
)
from ichat_lifecycle.errors import EngineNotUp

SOURCE = """
import asyncio

async def wait():
    await asyncio.Event().wait()

class EngineDeadError(Exception):
    pass

async def fail(error):
    raise error

async def stay():
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await asyncio.Event().wait()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "likevllm"
    folder.mkdir()
    (folder / "__init__.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("likevllm")
    sys.modules.pop("likevllm", None)


def test_tasks_that_began_with_the_engine_end_with_it_and_no_others(package: ModuleType) -> None:
    async def script() -> None:
        before = asyncio.create_task(package.wait())  # as the refresher of certificates
        ours = asyncio.create_task(asyncio.Event().wait())
        await asyncio.sleep(0)
        tasks = EngineTasks("likevllm")
        theirs = asyncio.create_task(package.wait())
        await asyncio.sleep(0)
        await tasks.end()
        assert theirs.cancelled()
        assert not before.done()
        assert not ours.done()
        before.cancel()
        ours.cancel()
        await asyncio.wait({before, ours})

    asyncio.run(script())


@pytest.mark.parametrize("embedded", [True, False], ids=["their handler", "no handler"])
def test_a_handler_that_fails_because_its_engine_is_gone_is_no_complaint(
    package: ModuleType, caplog: pytest.LogCaptureFixture, embedded: bool
) -> None:
    """It may have ended before its caller was cut off, so that nobody has looked at its error."""
    complaints: list[BaseException] = []

    def theirs(loop: asyncio.AbstractEventLoop, told: dict[str, Any]) -> None:
        complaints.append(told["exception"])

    async def script() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(theirs if embedded else None)
        tasks = EngineTasks("likevllm")
        for error in (package.EngineDeadError(), ValueError("another")):
            cut_off = asyncio.create_task(package.fail(error))  # nobody awaits it
            await asyncio.wait({cut_off})
            del cut_off
        await tasks.end()
        tasks.close()
        assert loop.get_exception_handler() is (theirs if embedded else None)

    asyncio.run(script())
    if embedded:
        assert [str(error) for error in complaints] == ["another"]
    else:
        assert caplog.text.count("never retrieved") == 1


def test_a_task_that_ignores_its_cancellation_holds_nobody_up(package: ModuleType) -> None:
    async def script() -> None:
        tasks = EngineTasks("likevllm")
        stubborn: asyncio.Task[None] = asyncio.create_task(package.stay())
        await asyncio.sleep(0)
        await tasks.end(timeout_s=0.05)
        assert not stubborn.done()
        stubborn.cancel()
        await asyncio.wait({stubborn})

    asyncio.run(script())


def test_questions_of_an_engine_that_is_ended_are_answered() -> None:
    async def script() -> None:
        future = asyncio.get_running_loop().create_future()
        answered = asyncio.get_running_loop().create_future()
        answered.set_result(1)
        core = SimpleNamespace(utility_results={1: future, 2: answered})
        refuse_questions(SimpleNamespace(engine_core=core))
        with pytest.raises(EngineNotUp):
            await future
        refuse_questions(SimpleNamespace())  # a client of another shape

    asyncio.run(script())


class Context:
    def __init__(self) -> None:
        self.closed = False

    def destroy(self, linger: int) -> None:
        assert linger == 0
        self.closed = True


def client_with(context: Context, **sockets: Any) -> Any:
    resources = SimpleNamespace(ctx=context, **sockets)
    return SimpleNamespace(engine_core=SimpleNamespace(resources=resources))


def test_the_context_ends_once_its_sockets_are_closed() -> None:
    async def script() -> None:
        context, socket = Context(), SimpleNamespace(closed=False)
        client = client_with(context, output_socket=socket, input_socket=None)
        ending = asyncio.create_task(end_zeromq(client))
        await asyncio.sleep(0)
        assert not context.closed
        socket.closed = True
        await ending
        assert context.closed
        await end_zeromq(client)  # again
        await end_zeromq(SimpleNamespace())

        context, still = Context(), SimpleNamespace(closed=False)
        await end_zeromq(client_with(context, output_socket=still), timeout_s=0.05)
        assert not context.closed, "it would end under a socket that is in use"

    asyncio.run(script())


@pytest.mark.parametrize("there", [True, False], ids=["glibc", "another"])
def test_memory_is_returned_where_the_library_can(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    asked: list[int] = []
    library = SimpleNamespace(malloc_trim=asked.append) if there else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return_memory()
    assert asked == [0] * there
