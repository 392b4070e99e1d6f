"""The guardian, with small stand-ins for an engine's processes, and owners really killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_imports import imports_of

from ichat_lifecycle.adapters import engine_guard, guardian
from ichat_lifecycle.adapters.engine_guard import SOCKETS, EngineGuard, blocked

DEADLINE_S = 20.0  # these machines are busy; the guardian's own bound is 5 s

# An owner with an engine of four: what vLLM starts, and what its processes may start in turn.
OWNER = """
import json, os, signal, socket, subprocess, sys, time
from ichat_lifecycle.adapters.engine_guard import SOCKETS, EngineGuard
from ichat_lifecycle.adapters.engine_output import EngineOutput

# A program that was started in the background has some of them ignored.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

def sleeper(**options):
    return subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, **options).pid

NOWHERE = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
PARENT = ["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $! >$1; wait", "sh", "child.pid"]

told = os.dup(1)
stranger = sleeper(**NOWHERE)
output = EngineOutput(sink=lambda line: None)
guard = EngineGuard(output.read_fd)
with output.redirected(), guard.marking():
    socket.socket(socket.AF_UNIX).bind(os.environ[SOCKETS] + "/s")
    engine = {
        "plain": sleeper(),
        "without a marker, as a title leaves it": sleeper(env={}),
        "elsewhere": sleeper(start_new_session=True, **NOWHERE),
        "parent": subprocess.Popen(PARENT, env={"PATH": os.environ["PATH"]}).pid,
    }
    directory = os.environ[SOCKETS]
while not (os.path.exists("child.pid") and open("child.pid").read().strip()):
    time.sleep(0.01)
engine["a descendant without any mark"] = int(open("child.pid").read())
def tell(**more):
    document = {"engine": engine, "guardian": guard.pid, "stranger": stranger, **more}
    os.write(told, json.dumps(document | {"directory": directory}).encode() + b"\\n")
"""
LIVES_ON = "tell()\ntime.sleep(600)\n"


def alive(pid: int) -> bool:
    return guardian.started(pid) is not None


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Owner:
    """The script above, and what it told."""

    def __init__(self, process: subprocess.Popen[bytes], told: dict[str, Any]) -> None:
        self.process = process
        self.engine: dict[str, int] = told["engine"]
        self.guardian: int = told["guardian"]
        self.stranger: int = told["stranger"]
        self.directory = Path(told["directory"])
        self.told = told

    def living(self) -> set[str]:
        return {name for name, pid in self.engine.items() if alive(pid)}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def all_gone(self) -> bool:
        return eventually(lambda: not self.living() and not alive(self.guardian))


@contextmanager
def owner(directory: Path, body: str = LIVES_ON) -> Iterator[Owner]:
    with (directory / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER + body],
            cwd=tempfile.mkdtemp(dir=directory),
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    pids: list[int] = []
    guardians: list[int] = []
    try:
        line = process.stdout.readline()
        assert line, (directory / "stderr").read_text()
        started = Owner(process, json.loads(line))
        guardians = [started.guardian]
        pids = [*started.engine.values(), started.stranger, *started.told.get("others", [])]
        yield started
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        # First the guardian: it has a directory to remove.
        assert eventually(lambda: not any(map(alive, guardians)))
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_kill_9_of_the_owner_ends_all_of_its_engine_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with owner(tmp_path) as one, owner(tmp_path / "other") as other:
        assert len(one.living()) == 5
        assert (one.directory / "s").is_socket()
        one.kill()
        assert one.all_gone()
        assert eventually(lambda: not one.directory.exists())
        assert alive(one.stranger), "a child that the owner started before its engine"
        assert len(other.living()) == 5, "another owner's engine"
        assert alive(other.guardian)
    assert f"process {one.process.pid} is gone; ended" in (tmp_path / "stderr").read_text()


def test_processes_that_are_stopped_are_ended_too(tmp_path: Path) -> None:
    """They could not read a pipe themselves."""
    with owner(tmp_path) as one:
        for pid in one.engine.values():
            os.kill(pid, signal.SIGSTOP)
        one.kill()
        assert one.all_gone()


def test_a_fork_of_the_owner_does_not_hide_its_end(tmp_path: Path) -> None:
    """It would hold our end of the pipe: a forked EngineCore, or an embedder's own."""
    body = (
        "fork = os.fork()\nif not fork:\n    time.sleep(600)\ntell(others=[fork])\ntime.sleep(600)"
    )
    with owner(tmp_path, body) as one:
        one.kill()
        assert one.all_gone()
        assert alive(one.told["others"][0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_guardian_is_not_ended_by_what_ends_its_owner(
    tmp_path: Path, number: signal.Signals
) -> None:
    with owner(tmp_path) as one:
        assert os.getsid(one.guardian) != os.getsid(one.process.pid), "out of Ctrl-C's reach"
        os.kill(one.guardian, number)
        one.process.send_signal(number)
        assert one.process.wait(DEADLINE_S) == -number
        assert one.all_gone()


def test_a_sweep_ends_the_engine_but_not_its_owner(tmp_path: Path) -> None:
    """Not even while the owner itself prints into the engine's pipe."""
    body = "with output.redirected():\n    tell()\n    guard.sweep()\n    time.sleep(600)"
    with owner(tmp_path, body) as one:
        # Not reaped by their parent, so zombies: those are not alive.
        assert one.all_gone()
        assert one.process.poll() is None


def test_at_a_normal_end_nothing_is_killed_and_no_guardian_is_left(tmp_path: Path) -> None:
    body = "guard.end()\ntell(left=os.path.exists(directory), others=[guard.pid])\n"
    with owner(tmp_path, body) as one:
        assert not alive(one.guardian)
        assert not one.told["left"], "the directory of the sockets"
        assert one.process.wait() == 0
        time.sleep(0.2)
        assert len(one.living()) == 5
    assert (tmp_path / "stderr").read_text() == ""


def test_a_guardian_that_was_killed_harms_nothing(tmp_path: Path) -> None:
    body = "os.kill(guard.pid, 9)\ntime.sleep(0.1)\nguard.end()\ntell()\n"
    with owner(tmp_path, body) as one:
        assert one.process.wait() == 0
        assert not alive(one.guardian)
        assert not one.directory.exists()
        assert len(one.living()) == 5


@pytest.fixture
def pipe() -> Iterator[int]:
    read_fd, write_fd = os.pipe()
    yield read_fd
    os.close(read_fd)
    os.close(write_fd)


def test_without_a_guardian_the_engine_is_started_all_the_same(
    pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    guard = EngineGuard(pipe)
    with guard.marking():
        assert guard.pid is None
        assert guardian.VARIABLE in os.environ
    guard.end()
    guard.end()
    assert engine_guard._life_fds == set()


def test_the_environment_is_put_back_and_the_users_own_choice_left_alone(
    pipe: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(SOCKETS, str(tmp_path))
    guard = EngineGuard(pipe)
    with pytest.raises(RuntimeError), guard.marking():
        assert os.environ[SOCKETS] == str(tmp_path)
        raise RuntimeError
    guard.end()
    assert guardian.VARIABLE not in os.environ
    assert os.environ[SOCKETS] == str(tmp_path)
    assert tmp_path.exists()


def test_a_directory_whose_sockets_would_have_too_long_a_name_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM would end with "ipc path is longer than 107 characters"."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.delenv(SOCKETS, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    directory = engine_guard._socket_directory("")
    assert directory is not None
    assert str(Path(directory.path).parent) == "/tmp"
    directory.remove()
    assert list(long.iterdir()) == []
    monkeypatch.setattr(engine_guard, "SHORT", ("/nonexistent",))
    assert engine_guard._socket_directory("") is None
    assert list(long.iterdir()) == []


def test_only_sockets_are_removed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
    (tmp_path / "somebody's").touch()
    guardian.remove_directory(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's"]


def test_a_later_process_of_the_same_pid_is_not_killed() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        start = guardian.started(process.pid)
        assert start is not None
        guardian._kill((process.pid, start - 1))
        time.sleep(0.1)
        assert process.poll() is None
        guardian._kill((process.pid, start))
        assert process.wait() == -signal.SIGKILL


def test_what_cannot_be_killed_is_left_after_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardian, "_kill", lambda process: None)
    start = guardian.started(os.getpid())
    assert start is not None
    us = {(os.getpid(), start)}
    before = time.monotonic()
    assert guardian.end_all(lambda: us, bound_s=0.3) == (set(), us)
    assert time.monotonic() - before < 5


def test_blocked_signals_stay_blocked_in_what_is_executed() -> None:
    """So that Ctrl-C does not reach an engine that shares our process group."""
    with blocked({signal.SIGINT}):
        child = subprocess.Popen(["sleep", "600"])
    with child:
        child.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert child.poll() is None
        child.terminate()
        assert child.wait() == -signal.SIGTERM
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_the_guardian_is_light() -> None:
    """It is a process for the whole life of an engine: the standard library, and little of that."""
    names = {name.partition(".")[0] for name in imports_of("adapters/guardian.py")}
    assert names <= {*sys.stdlib_module_names, "__future__"}
    assert names & {"asyncio", "subprocess", "threading", "typing", "dataclasses"} == set()
