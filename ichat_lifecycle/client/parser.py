"""The arguments of the commands that ask workers. Imports argparse only, as cli.py does."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from ichat_lifecycle.client.lazily import lazily
from ichat_lifecycle.states import State

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

URL_HELP = (
    "of a control plane, such as http://127.0.0.1:18000 or :18000; default: the workers of this "
    "machine are looked for"
)


def add_commands(commands: Commands) -> None:
    """Adds `status`, `history`, `diagram`, `wait` and `watch`."""
    _add_status(commands)
    _add_diagram(commands)
    _add_history(commands)
    _add_wait(commands)
    watch = commands.add_parser(
        "watch",
        help="show a worker's life as it goes on",
        description="Show a worker's life as it goes on, on the whole screen; where stdout is no "
        "terminal, one line for each event.",
        epilog="exit codes: 0 the worker has stopped, or Ctrl-C; 69 no worker",
        allow_abbrev=False,
    )
    watch.add_argument("url", nargs="?", metavar="URL", help=URL_HELP)
    watch.set_defaults(run=lazily("client.commands", "watch"))


def _add_status(commands: Commands) -> None:
    status = commands.add_parser(
        "status",
        help="say where workers are in their lives",
        description="Say where workers are in their lives, one line for each.",
        epilog="exit codes: 0 all are ready, 1 one is not, 69 none found or no answer",
        allow_abbrev=False,
    )
    status.add_argument("urls", nargs="*", metavar="URL", help=URL_HELP)
    status.add_argument("--json", action="store_true", help="their /lifecycle documents as a list")
    status.add_argument("--watch", action="store_true", help="once a second, until Ctrl-C")
    status.set_defaults(run=lazily("client.commands", "status"))


def _add_history(commands: Commands) -> None:
    history = commands.add_parser(
        "history",
        help="show what has happened in a worker's life",
        description="Show the transitions of a worker's life.",
        epilog="exit codes: 0 shown, 69 no worker found or no answer",
        allow_abbrev=False,
    )
    history.add_argument("url", nargs="?", metavar="URL", help=URL_HELP)
    history.add_argument("--json", action="store_true", help="the /lifecycle/history document")
    history.add_argument(
        "--all", action="store_true", help="phases, stages, recoveries and verdicts, too"
    )
    history.set_defaults(run=lazily("client.commands", "history"))


def _add_diagram(commands: Commands) -> None:
    diagram = commands.add_parser(
        "diagram",
        help="print the state diagram",
        description="Print the state diagram; with a URL, where that worker is and how it came.",
        epilog="exit codes: 0 printed, 69 no answer",
        allow_abbrev=False,
    )
    diagram.add_argument("url", nargs="?", metavar="URL", help="of a control plane")
    diagram.add_argument(
        "--format", choices=("svg", "mermaid"), default="mermaid", help="default: %(default)s"
    )
    diagram.set_defaults(run=lazily("client.commands", "diagram"))


def _add_wait(commands: Commands) -> None:
    wait = commands.add_parser(
        "wait",
        help="return when a worker reaches a state",
        description="Return when a worker is in a state, or passes it.",
        epilog="exit codes: 0 reached, 75 the worker cannot reach it any more, 124 time-out, "
        "69 something else answers",
        allow_abbrev=False,
    )
    wait.add_argument("url", nargs="?", metavar="URL", help=URL_HELP)
    wait.add_argument(
        "--for",
        dest="state",
        type=_state,
        required=True,
        metavar="STATE",
        help=f"one of {', '.join(State)}",
    )
    wait.add_argument(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="for a worker to appear, too; default: %(default)s",
    )
    wait.set_defaults(run=lazily("client.commands", "wait"))


def _state(text: str) -> State:
    if text not in State.__members__:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(State)}")
    return State(text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0 seconds")
    return seconds
