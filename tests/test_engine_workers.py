"""The end of a process that is not our own child is told at once, and once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ichat_lifecycle.adapters.engine_workers import DeathWatch, workers_of

# Starts two children, with these titles, prints their pids, and waits.
PARENT = """
import os, subprocess, sys
for title in ("VLLM::Worker_TP0", "cc1plus"):
    code = "import time; time.sleep(60)"
    print(subprocess.Popen([title, "-c", code], executable=sys.executable).pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def family() -> Iterator[tuple[int, int, int]]:
    """Pids of a process and of its two children, a worker and something else."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    try:
        yield parent.pid, pids[0], pids[1]
    finally:
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, 9)
        parent.communicate()


def deaths_of(pids: dict[int, str], kill: int, *, stopped: bool = False) -> list[tuple[int, str]]:
    told: list[tuple[int, str]] = []

    async def main() -> None:
        watch = DeathWatch(lambda pid, name: told.append((pid, name)))
        watch.watch(pids)
        if stopped:
            watch.stop()
        os.kill(kill, 9)
        for _ in range(50):
            await asyncio.sleep(0.02)
            if told:
                break
        watch.stop()

    asyncio.run(main())
    return told


def test_only_workers_are_found() -> None:
    with family() as (parent, worker, _):
        assert workers_of({parent: "EngineCore"}) == {worker: "VLLM::Worker_TP0"}
    assert workers_of({parent: "EngineCore"}) == {}, "a process that is gone has none"


def test_a_grandchilds_death_is_told_once_with_its_name() -> None:
    with family() as (parent, worker, _):
        assert deaths_of(workers_of({parent: "EngineCore"}), worker) == [
            (worker, "VLLM::Worker_TP0")
        ]


def test_after_stop_nothing_is_told_and_nothing_is_left() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with family() as (parent, worker, _):
        assert deaths_of(workers_of({parent: "EngineCore"}), worker, stopped=True) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_one_that_has_ended_already_is_told() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    with family() as (_, worker, __):
        assert deaths_of({gone.pid: "VLLM::Worker"}, worker) == [(gone.pid, "VLLM::Worker")]


def test_without_pidfds_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with family() as (parent, worker, _):
        assert deaths_of(workers_of({parent: "EngineCore"}), worker) == []


def test_of_several_ranks_each_worker_is_named_with_its_own() -> None:
    with family() as (one, worker, _), family() as (two, other, __):
        cores = {one: "EngineCore_DP0", two: "EngineCore_DP1"}
        assert workers_of(cores) == {
            worker: "VLLM::Worker_TP0 of EngineCore_DP0",
            other: "VLLM::Worker_TP0 of EngineCore_DP1",
        }
