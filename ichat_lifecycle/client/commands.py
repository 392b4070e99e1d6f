"""What the command line calls for the commands to workers."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from ichat_lifecycle.client.look import console_for
from ichat_lifecycle.client.run import INTERRUPTED, run_command


def status(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.status import status_command

    command = status_command(args.urls, _console(), as_json=args.json, watch=args.watch)
    return run_command(command, interrupted=0 if args.watch else INTERRUPTED)


def history(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.history import history_command

    return run_command(
        history_command(args.url, _console(), as_json=args.json, everything=args.all)
    )


def diagram(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.diagram import diagram_command

    return run_command(diagram_command(args.url, _console(), args.format))


def wait(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.wait import REACHED, wait_command

    async def waited() -> int:
        outcome = await wait_command(args.url, args.state, args.timeout)
        stream = sys.stdout if outcome.code == REACHED else sys.stderr
        console_for(stream).print(outcome.line, soft_wrap=True)
        return outcome.code

    return run_command(waited())


def watch(args: argparse.Namespace) -> int:
    from ichat_lifecycle.client.watch import watch_command

    console = _console()
    # Not rich's `is_terminal`: FORCE_COLOR makes that true for a file as well.
    whole_screen = sys.stdout.isatty() and not console.is_dumb_terminal
    return run_command(watch_command(args.url, console, whole_screen=whole_screen), interrupted=0)


def _console() -> Console:
    return console_for(sys.stdout)
