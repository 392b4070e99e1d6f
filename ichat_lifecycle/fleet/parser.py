"""The commands around a configs.yaml, and their arguments. Light on imports, as all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ichat_lifecycle.client.lazily import lazily

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_commands(commands: Commands) -> None:
    """Adds `up`, `check` and `schema`."""
    _add_up(commands)
    _add_check(commands)
    schema = commands.add_parser(
        "schema", help="print the JSON Schema of configs.yaml", allow_abbrev=False
    )
    schema.set_defaults(run=lazily("fleet.commands", "schema"))


def _add_up(commands: Commands) -> None:
    up = commands.add_parser(
        "up",
        help="run all workers of a configs.yaml",
        description="Run all workers of a configs.yaml, each as a process of its own, until they "
        "have been stopped. SIGTERM or Ctrl-C stops all at the same time, a second one without a "
        "drain; SIGHUP reads the file again (in a terminal it is a stop).",
        epilog="exit codes: 0 every worker stopped clean; else the first one's that did not; "
        "2 the file is wrong, 66 it or a model is not there, 69 an address is taken",
        allow_abbrev=False,
    )
    up.add_argument("file", type=Path, metavar="FILE")
    up.set_defaults(run=lazily("fleet.commands", "up"))


def _add_check(commands: Commands) -> None:
    check = commands.add_parser(
        "check",
        help="check a configs.yaml without starting anything",
        description="Tell all that is wrong with a configs.yaml, each with file, line and column.",
        epilog="exit codes: 0 nothing is wrong, 2 something is, 66 the file cannot be read",
        allow_abbrev=False,
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=lazily("fleet.commands", "check"))
