"""Runs one command of a client and turns its end into an exit code, whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from ichat_lifecycle.errors import LifecycleError, report
from ichat_lifecycle.redact import scrub_unknown

INTERRUPTED = 128 + signal.SIGINT

P = ParamSpec("P")
T = TypeVar("T")


def run_command(command: Coroutine[Any, Any, int], interrupted: int = INTERRUPTED) -> int:
    """A command's exit code; `interrupted` is the one after Ctrl-C, which ends it at once."""
    try:
        with _terminated_in_order(), asyncio.Runner(loop_factory=_new_loop) as runner:
            code = runner.run(command)
        sys.stdout.flush()
    except LifecycleError as error:
        return report(error, scrub=scrub_unknown)  # a URL may have a password
    except KeyboardInterrupt:
        _let_go_of_stdout()
        return interrupted
    except BrokenPipeError:
        _let_go_of_stdout()  # whoever read it has seen enough
        return 0
    return code


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While it lasts, Ctrl-C ends a write that nobody reads; else it waits for the event loop."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _let_go_of_stdout() -> None:
    """Python would complain at its end, or wait there for a reader that reads no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind: a terminal that was taken is given back."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup's wish
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_Unawaited())
    return loop


class _Unawaited(ThreadPoolExecutor):
    """Threads that no end waits for: a look-up of a name may take minutes."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the threads end with the process."""
