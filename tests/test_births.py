"""Who counts as a process of the engine: what the kernel confirms, and nobody else."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from waiting import until

from ichat_lifecycle.adapters import births as module
from ichat_lifecycle.adapters import guardian
from ichat_lifecycle.adapters.births import Birth, Births, confirmed

DEADLINE_S = 30
SLEEPS = [sys.executable, "-c", "import sys; sys.stdin.read()"]
# Starts a child in its own group, says the child's pid, and ends: the child is nobody's of ours.
ORPHANS = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(60)"], process_group=0,
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
"""
# Leads a group, starts a member of it, says that one's pid, and ends when it is told to.
LEADS = """
import subprocess, sys
member = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(member.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def births() -> Iterator[Births]:
    made = Births(lambda pid: True)
    yield made
    made.close()
    made.close()


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEPS, stdin=subprocess.PIPE, process_group=0) as process:
        yield process
        process.kill()


def report(births: Births, *pids: int) -> None:
    os.write(births.write_fd, b"".join(struct.pack("=i", pid) for pid in pids))
    births.read()


def test_a_descendant_that_leads_its_group_is_known_and_ended(
    births: Births, leader: subprocess.Popen[bytes]
) -> None:
    report(births, leader.pid)
    assert births.pids == {leader.pid}
    births.kill()
    assert leader.wait(DEADLINE_S) == -signal.SIGKILL


@pytest.mark.parametrize("pid", [0, 1, -1, -(2**31), 2**31 - 1])
def test_no_pid_but_a_processs_is_taken(births: Births, pid: int) -> None:
    """killpg(0) is our own group, killpg(1) all of a container: both would be ours to kill."""
    report(births, pid)
    assert not births.pids


def test_we_our_parent_and_our_own_group_are_not_taken(births: Births) -> None:
    """Also a child that has stayed in our group: that number is ours, too."""
    with subprocess.Popen(SLEEPS, stdin=subprocess.PIPE) as child:
        report(births, os.getpid(), os.getppid(), os.getpgid(0), child.pid)
        assert not births.pids


def test_a_stranger_is_not_taken(births: Births) -> None:
    """A group leader in our session, but no descendant: whoever else runs on this machine."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS], capture_output=True, text=True, check=True, timeout=60
    )
    stranger = int(done.stdout)
    try:
        report(births, stranger)
        assert not births.pids
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_a_child_with_a_session_of_its_own_is_not_taken(births: Births) -> None:
    """The guardian is one: it has to outlive the engine."""
    with subprocess.Popen(SLEEPS, stdin=subprocess.PIPE, start_new_session=True) as child:
        report(births, child.pid)
        assert not births.pids


def test_after_the_load_nobody_is_heard(leader: subprocess.Popen[bytes]) -> None:
    births = Births(lambda pid: True)
    spare = os.dup(births.write_fd)
    births.close()
    with pytest.raises(BrokenPipeError):
        os.write(spare, struct.pack("=i", leader.pid))
    os.close(spare)
    births.read()
    assert not births.pids
    assert (births.read_fd, births.write_fd) == (-1, -1)


def test_what_was_reported_just_before_the_end_of_the_load_counts(
    births: Births, leader: subprocess.Popen[bytes]
) -> None:
    os.write(births.write_fd, struct.pack("=i", leader.pid))
    births.close()
    assert births.pids == {leader.pid}


def test_a_later_process_of_the_same_number_is_spared(
    births: Births, leader: subprocess.Popen[bytes]
) -> None:
    """Start times differ, whoever has the pid by now."""
    report(births, leader.pid)
    births._born[leader.pid] = Birth(leader.pid, births._born[leader.pid].started - 1)
    births.kill()
    assert leader.poll() is None


@pytest.mark.parametrize("marked", [True, False])
def test_of_a_group_whose_leader_is_gone_only_the_engines_own_is_ended(marked: bool) -> None:
    """Workers that EngineCore has left behind; but the number may be another group's by now."""
    births = Births(lambda pid: marked)
    program, pipe = [sys.executable, "-c", LEADS], subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, process_group=0) as leader:
        assert leader.stdout is not None
        member = int(leader.stdout.readline())
        report(births, leader.pid)
        leader.kill()
    births.kill()
    if marked:
        until(lambda: guardian.started(member) is None)
    else:
        os.kill(member, signal.SIGKILL)  # fails if it were gone
    births.close()


def test_the_number_of_births_is_bounded(
    births: Births, leader: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BIRTHS_MAX", 1)
    monkeypatch.setattr(module, "confirmed", lambda pid: Birth(pid, 1))
    report(births, 100)
    report(births, 101)
    assert births.pids == {100}


def test_what_is_confirmed_carries_the_start_time(leader: subprocess.Popen[bytes]) -> None:
    seen = confirmed(leader.pid)
    assert seen is not None
    assert seen.started > 0
