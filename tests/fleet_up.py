"""`up` on workers that are fakes: run as `python fleet_up.py FILE`. vLLM is not asked for words."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ichat_lifecycle.errors import LifecycleError, report
from ichat_lifecycle.fleet import up
from ichat_lifecycle.fleet.engine_words import Answer, Question
from ichat_lifecycle.fleet.gateway import RunningGateway
from ichat_lifecycle.fleet.plans import Reading, read_plans

WORKER = (sys.executable, str(Path(__file__).with_name("fleet_worker.py")))


def ask(questions: Sequence[Question]) -> list[Answer]:
    """Each key is a flag with one value."""
    return [Answer(tuple(_words(question)), ()) for question in questions]


def _words(question: Question) -> list[str]:
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in question.keys.items())
    return [word for pair in pairs for word in pair]


def main(file: Path) -> int:
    gateway = RunningGateway()

    def read() -> Reading:
        return read_plans(file, os.environ, ask, gateway=gateway)

    return up.up(file, command=WORKER, read=read)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except LifecycleError as error:
        sys.exit(report(error))
