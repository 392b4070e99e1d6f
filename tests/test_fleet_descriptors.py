"""A supervisor without file descriptors: what cannot be had is told, and nothing is half there."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from descriptors import no_descriptor_left
from fleet_world import plan
from on_loop import open_files, run
from running_fleet import LOOPBACK, PROGRAM, TOKEN, RunningFleet, free_ports
from waiting import until

from ichat_lifecycle.errors import OPEN_FILES_HINT, AddressError
from ichat_lifecycle.fleet.up import Supervisor

SPARE = range(6)  # descriptors; what a held socket needs is among them


def supervisor() -> Supervisor:
    def read() -> Any:
        raise NotImplementedError

    return Supervisor(Path("configs.yaml"), read, io.StringIO())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_socket_that_cannot_be_opened_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """Whichever descriptor it is that is missing."""
    (port,) = free_ports(1)
    path = tmp_path / "uds"
    wanted = plan("a", host=LOOPBACK, port=port, uds=str(path) if kind == "unix" else None)

    async def attempt(spare: int) -> bool:
        try:
            with no_descriptor_left(spare):
                held = supervisor()._open(wanted)
        except AddressError as error:
            assert "Too many open files" in error.message
            assert error.hint == OPEN_FILES_HINT
            return False
        await held.close()
        return True

    async def scenario() -> None:
        assert await attempt(max(SPARE)), "and what is imported late is imported"
        before, outcomes = open_files(), []
        for spare in SPARE:
            outcomes.append(await attempt(spare))
            assert open_files() == before
            assert not path.exists()
            with socket.create_server((LOOPBACK, port)):  # nobody listens there
                pass
        assert outcomes == sorted(outcomes)
        assert {*outcomes} == {False, True}

    run(scenario())


@pytest.mark.fleet
def test_a_fleet_for_which_there_are_too_few_starts_nobody(tmp_path: Path) -> None:
    """Some of its sockets are open by then."""
    workers = [{"model_name": f"w{number}"} for number in range(40)]
    fleet = RunningFleet(tmp_path, *workers)
    fleet.write()
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, str(PROGRAM), fleet.file],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 69, done.stderr
    assert "Too many open files" in last
    assert last.endswith(f"hint: {OPEN_FILES_HINT}")
    assert '"trigger": "start"' not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fleet
def test_a_lack_at_run_time_spends_no_budget_and_ends_by_itself(tmp_path: Path) -> None:
    settings = {"port": 0, "token": TOKEN, "restart": {"max": 1}}
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}, fleet=settings) as fleet:
        fleet.wait_until_ready()
        process = psutil.Process(fleet.process.pid)
        _, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        # Nothing more can be opened; what is open stays.
        process.rlimit(psutil.RLIMIT_NOFILE, (3, hard))
        os.kill(fleet.pids[0], signal.SIGKILL)
        (waits,) = until(lambda: fleet.events("worker_waits"))
        assert waits["hint"] == OPEN_FILES_HINT
        process.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
        fleet.wait_until_ready()
        assert {fleet.seen(name)["starts"] for name in "ab"} == {1, 2}
        assert len(fleet.events("worker_waits")) == 1
        backed = [line for line in fleet.events("worker") if line.get("dest") == "backing_off"]
        assert len(backed) == 1, "for its end; the lack is none"
        assert fleet.events("supervision_failed") + fleet.events("task_failed") == []
    assert fleet.process.returncode == 0
