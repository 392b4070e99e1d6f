"""A supervisor that did not run for a while judges nobody by what it has not seen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from running_fleet import TOKEN, RunningFleet
from waiting import until

pytestmark = pytest.mark.fleet

WATCHDOG_S = 10  # a worker's first word takes seconds where others want its core


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "with its workers"])
def test_a_pause_longer_than_the_watchdog_kills_nobody(tmp_path: Path, whole: bool) -> None:
    """It killed all of them within a millisecond, with their beats unread."""
    settings = {"port": 0, "token": TOKEN, "watchdog": WATCHDOG_S}
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}, fleet=settings) as fleet:
        fleet.wait_until_ready()
        pids = [fleet.seen(name)["pid"] for name in "ab"]
        # The supervisor goes on first: it looks before its workers can tell anything.
        with stopped(*pids if whole else ()), stopped(fleet.process.pid):
            over_s = time.monotonic() + WATCHDOG_S * 1.5
            until(lambda: time.monotonic() > over_s)
        assert fleet.get("/fleet").status_code == 200
        assert [fleet.ask(name).json()["pid"] for name in "ab"] == pids
        fleet.wait_until_ready()
        assert [fleet.seen(name)["starts"] for name in "ab"] == [1, 1]
        assert fleet.events("worker_killed") == []
    assert fleet.process.returncode == 0
