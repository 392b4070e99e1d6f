"""What the command line calls: runs one client command and turns its end into an exit code."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from rich.console import Console

from ichat_lifecycle.client.look import console_for
from ichat_lifecycle.errors import LifecycleError, report
from ichat_lifecycle.redact import scrub_unknown

INTERRUPTED = 128 + signal.SIGINT


def status(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.status import status_command

    command = status_command(args.urls, _console(), as_json=args.json, watch=args.watch)
    return _run(command, interrupted=0 if args.watch else INTERRUPTED)


def history(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.history import history_command

    return _run(history_command(args.url, _console(), as_json=args.json, everything=args.all))


def diagram(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.diagram import diagram_command

    return _run(diagram_command(args.url, _console(), args.format))


def wait(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.wait import REACHED, wait_command

    async def waited() -> int:
        outcome = await wait_command(args.url, args.state, args.timeout)
        stream = sys.stdout if outcome.code == REACHED else sys.stderr
        console_for(stream).print(outcome.line, soft_wrap=True)
        return outcome.code

    return _run(waited())


def watch(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.watch import watch_command

    console = _console()
    # Not rich's `is_terminal`: FORCE_COLOR makes that true for a file as well.
    whole_screen = sys.stdout.isatty() and not console.is_dumb_terminal
    return _run(watch_command(args.url, console, whole_screen=whole_screen), interrupted=0)


def _console() -> Console:
    return console_for(sys.stdout)


def _run(command: Coroutine[Any, Any, int], interrupted: int = INTERRUPTED) -> int:
    return in_order(lambda: asyncio.run(command), interrupted)


def in_order(command: Callable[[], int], interrupted: int = INTERRUPTED) -> int:
    """A command's exit code, whatever ends it; `interrupted` is the one after Ctrl-C."""
    try:
        with _terminated_in_order():
            code = command()
        sys.stdout.flush()
    except LifecycleError as error:
        return report(error, scrub=scrub_unknown)  # a URL may have a password
    except KeyboardInterrupt:
        return interrupted
    except BrokenPipeError:
        # Whoever read it has seen enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


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
