"""The commands around a configs.yaml: what each does with its arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from ichat_lifecycle.errors import LifecycleError, report
from ichat_lifecycle.fleet.engine_words import NoEngineError
from ichat_lifecycle.fleet.gateway import RunningGateway
from ichat_lifecycle.fleet.plans import read_plans
from ichat_lifecycle.fleet.schema import file_schema
from ichat_lifecycle.printable import one_line
from ichat_lifecycle.redact import Secrets

LINE_MAX = 10_000  # characters
Command = Callable[[argparse.Namespace], int]


def _reported(command: Command) -> Command:
    """What a user can meet is told on stderr, and is the exit code."""

    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except LifecycleError as error:
            return report(error, scrub=_scrub())

    return run


def _scrub() -> Callable[[str], str]:
    """Takes secrets of the environment out of a text, and what looks like one."""
    secrets = Secrets()
    secrets.collect_environment(os.environ)
    return secrets.scrub


@_reported
def up(args: argparse.Namespace) -> int:
    from ichat_lifecycle.fleet.up import up as run

    return run(args.file)


@_reported
def check(args: argparse.Namespace) -> int:
    try:
        found = read_plans(args.file, os.environ, here=False, gateway=RunningGateway())
    except NoEngineError as error:
        unchecked = "the rest is fine, but vLLM's arguments are not checked"
        print(one_line(f"{args.file}: {unchecked}: {error}"))
        return 0
    for doubt in found.doubts:
        print(one_line(_scrub()(doubt.told(args.file))), file=sys.stderr)
    for plan in found.plans:
        gpus = "" if plan.gpu_ids is None else f", GPU {', '.join(map(str, plan.gpu_ids))}"
        where = found.as_written(plan.address) if plan.uds else plan.address
        print(one_line(f"{plan.name}: {plan.model} on {where}{gpus}", LINE_MAX))
    return 0


def schema(args: argparse.Namespace) -> int:
    print(json.dumps(file_schema(), indent=2))
    return 0
