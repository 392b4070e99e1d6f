"""Ends what a former engine would leave in this process: tasks, unanswered requests, ZeroMQ.

vLLM expects its process to end with the engine, and leaves the rest to the garbage collector. Here
the process lives on, and starts another engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

from ichat_lifecycle.adapters.threads import in_thread
from ichat_lifecycle.errors import EngineNotUp

# What each request of a dead engine ends with; its caller has got an error of the gate's.
_DEAD = "EngineDeadError"
PATIENCE_S = 1.0  # for tasks to end once cancelled, and for ZeroMQ's threads
_POLL_S = 0.02


class EngineTasks:
    """vLLM's tasks on the calling loop that began with this engine: its own and its app's.

    Among them are those of requests whose caller was cut off: vLLM runs each handler in a task of
    its own, which outlives a cancellation. Until `close`, an error of such a task that nobody waits
    for any more is not logged: the engine's end is reported elsewhere.
    """

    def __init__(self, package: str = "vllm") -> None:
        self._package = package
        self._older = weakref.WeakSet(self._all())
        self._loop = asyncio.get_running_loop()
        self._handler = self._loop.get_exception_handler()
        self._own_handler = self._on_exception  # one object, to be known again
        self._loop.set_exception_handler(self._own_handler)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        kind = type(context.get("exception"))
        if kind.__name__ == _DEAD and kind.__module__.startswith(self._package):
            return
        if self._handler is not None:
            self._handler(loop, context)
        else:
            loop.default_exception_handler(context)

    def close(self) -> None:
        """Put back the loop's own handler of exceptions, unless somebody has set another."""
        if self._loop.get_exception_handler() is self._own_handler:
            self._loop.set_exception_handler(self._handler)

    async def end(self, timeout_s: float = PATIENCE_S) -> None:
        """Cancel them all and wait for a moment."""
        if tasks := self._now():
            for task in tasks:
                task.add_done_callback(_retrieve)
                task.cancel()
            await asyncio.wait(tasks, timeout=timeout_s)

    def _now(self) -> set[asyncio.Task[Any]]:
        return {task for task in self._all() if task not in self._older}

    def _all(self) -> list[asyncio.Task[Any]]:
        place = getattr(sys.modules.get(self._package), "__file__", None)
        if place is None:
            return []
        folder = str(Path(place).parent)
        return [task for task in asyncio.all_tasks() if _file_of(task).startswith(folder)]


def _file_of(task: asyncio.Task[Any]) -> str:
    code = getattr(task.get_coro(), "cr_code", None)
    return str(getattr(code, "co_filename", ""))


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def refuse_questions(client: Any) -> None:
    """Fail whatever still waits for an answer of EngineCore, which will never come."""
    waiting = getattr(getattr(client, "engine_core", None), "utility_results", None) or {}
    for future in tuple(waiting.values()):
        if isinstance(future, asyncio.Future) and not future.done():
            future.set_exception(EngineNotUp("the engine was ended before it answered"))
            future.exception()  # retrieved, should nobody wait for it any more


async def end_zeromq(client: Any, timeout_s: float = PATIENCE_S) -> None:
    """End the client's ZeroMQ context, with its threads and descriptors; bounded.

    vLLM has its sockets closed on the loop, so this comes after a turn of it. Where that is not
    done in time, ZeroMQ ends with the last reference to it.
    """
    resources = getattr(getattr(client, "engine_core", None), "resources", None)
    context = getattr(resources, "ctx", None)
    if context is None or getattr(context, "closed", True):
        return
    with contextlib.suppress(Exception):
        async with asyncio.timeout(timeout_s):
            while any(not socket.closed for socket in _sockets(resources)):
                await asyncio.sleep(_POLL_S)
            await in_thread(partial(context.destroy, linger=0), "zeromq-end")


def _sockets(resources: Any) -> list[Any]:
    found = [value for name, value in vars(resources).items() if name.endswith("_socket")]
    return [socket for socket in found if socket is not None]


def return_memory() -> None:
    """Have the C library return what is free to the system, where it can (glibc).

    Each load runs in a thread of its own, and what it frees stays with that thread's arena.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
