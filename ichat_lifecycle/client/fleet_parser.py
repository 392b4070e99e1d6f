"""The commands to a fleet that runs, and their arguments. Light on imports."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ichat_lifecycle.client.lazily import lazily

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

FLEET_HELP = "URL of the fleet's supervisor; default: the one on this machine"


def add_commands(commands: Commands) -> None:
    """Adds `reload`, `stop`, `restart` and `logs`."""
    _add_command(commands, "reload", "have the fleet's file read again, and what changed done")
    stop = _add_command(commands, "stop", "stop one worker of the fleet, or with --all the fleet")
    stop.add_argument("name", nargs="?", metavar="NAME")
    stop.add_argument("--all", action="store_true", help="all workers and the supervisor")
    stop.add_argument("--now", action="store_true", help="without a drain")
    restart = _add_command(commands, "restart", "stop one worker of the fleet and start it again")
    restart.add_argument("name", metavar="NAME")
    logs = _add_command(commands, "logs", "print what one worker of the fleet has printed")
    logs.add_argument("name", metavar="NAME")
    logs.add_argument("-f", "--follow", action="store_true", help="and what it will print")
    logs.add_argument(
        "-n", "--lines", type=int, default=100, metavar="COUNT", help="default: %(default)s"
    )


def _add_command(commands: Commands, name: str, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        epilog="exit codes: 0 done, 2 the supervisor has refused, 69 none answers",
        allow_abbrev=False,
    )
    parser.add_argument("--fleet", metavar="URL", help=FLEET_HELP)
    parser.add_argument("--token", help="default: ICHAT_LIFECYCLE_FLEET_TOKEN, or the fleet's own")
    parser.set_defaults(run=lazily("client.fleet_commands", name))
    return parser
