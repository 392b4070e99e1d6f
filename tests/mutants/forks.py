"""Runs pytest in forks of a process that has imported what the tests need, except the project.

To import all that anew took most of a mutant's time. `Forks` talks to such a process; this file run
as a program is one.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# By the clock, for each second of processor time: others may be using the machine.
PATIENCE = 5


class Forks:
    """One such process, in the directory `root`, whose `ichat_lifecycle` its tests import.

    Args:
        imports: modules to be imported before the first fork.
        environment: what differs from our own.
        memory: each fork's address space, in bytes.
    """

    def __init__(
        self, root: Path, imports: Sequence[str], environment: Mapping[str, str], memory: int
    ) -> None:
        self._memory = memory
        self._process = subprocess.Popen(
            [sys.executable, __file__, *imports],
            cwd=root,
            env={**os.environ, **environment, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is run.py's: it ends this one by closing its input
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)  # closes its input, which ends it, and waits

    def passes(self, arguments: Sequence[str], limit_s: float, *, told: bool = False) -> bool:
        """Whether pytest passes within `limit_s` of processor time; prints its words if `told`."""
        order = {"arguments": arguments, "limit_s": limit_s, "memory": self._memory, "told": told}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()) == 0


def _serve() -> None:
    """Answers each order, a line of JSON, with a line: 0 where pytest passed in time."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _test(order)
        print(_end_of(child, order["limit_s"] * PATIENCE), flush=True)


def _end_of(child: int, limit_s: float) -> int:
    """Waits for the child and ends it, with all it has started, when it is late."""
    os.setpgid(child, child)
    ending = os.pidfd_open(child)
    try:
        select.select([ending], [], [], limit_s)
    finally:
        os.close(ending)
        os.killpg(child, signal.SIGKILL)  # what has ended by itself keeps its status
        _, status = os.waitpid(child, 0)
    return status


def _test(order: dict[str, Any]) -> None:
    """In the child: runs pytest and does not come back."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (order["memory"], order["memory"]))
        limit_s = math.ceil(order["limit_s"])
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(2 if order["told"] else null, 1)  # our own output is where the answers go
        if not order["told"]:
            os.dup2(null, 2)
        status = pytest.main(order["arguments"])
        sys.stdout.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
