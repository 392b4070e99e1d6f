"""A hostile worker and a flood of strangers, at once, beside an honest worker: nobody else notices.

What each trick alone comes to is tested with what it is aimed at.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from running_fleet import TOKEN, RunningFleet, free_ports
from waiting import until

from ichat_lifecycle.adapters.last_resort import MARGIN_S, TELLING_S
from ichat_lifecycle.config import Settings
from ichat_lifecycle.fleet.ports import KILL_MARGIN_S
from ichat_lifecycle.testing.hostile_worker import LIFE_VARIABLE, VARIABLE
from ichat_lifecycle.testing.strangers import Flood, Target

pytestmark = pytest.mark.fleet

SECONDS = float(os.environ.get("HOSTILE_S", "60"))
MOST_MEMORY = 150 * 2**20
# A fifth is what it should have, and what it had is told. Machines that are shared are noisy: this
# finds a flood that costs what it likes.
MOST_OF_A_CORE = 0.3
EACH = 10  # looks of the operator's: a restart, a reload
BUSY_S = 20.0  # beyond a bound, on a busy machine
HONEST = "/fleet/honest/lifecycle"
OFTEN = {"max": 1000, "backoff": 0.2, "backoff_max": 1}
# Its stop is killed soon, so that there are many lives.
STAGES = ("drain", "cancel", "cut", "watchdog", "app", "engine", "server", "socket", "companion")
QUICK = {"stop": dict.fromkeys(STAGES, 0.2)}
# The hostile worker is killed then.
STOP_S = Settings.model_validate(QUICK).stop_bound + MARGIN_S + TELLING_S + KILL_MARGIN_S


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@contextlib.contextmanager
def flooded(*targets: Target) -> Iterator[Flood]:
    """While it lasts, strangers do what they can to each of these ports."""
    flood = Flood(targets, at_once=25, pause_s=0.2)
    enough = threading.Event()

    async def run() -> None:
        task = asyncio.create_task(flood.run())
        while not enough.is_set() and not task.done():
            await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield flood
    finally:
        enough.set()
        thread.join()


class Watched:
    """What a process has used since then."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._began_s, self._cpu_s = time.monotonic(), self._used_s()
        self.most_memory = 0

    def _used_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def look(self) -> None:
        self.most_memory = max(self.most_memory, self._process.memory_info().rss)

    @property
    def of_a_core(self) -> float:
        return (self._used_s() - self._cpu_s) / (time.monotonic() - self._began_s)


def in_shared_memory() -> set[Path]:
    """Ours alone: all other tests are there, too."""
    return set(Path("/dev/shm").glob("ichat-*"))


def processes_with(temporary: Path) -> list[psutil.Process]:
    """Those that have this TMPDIR, whoever their parents are."""

    def has_it(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.pid != os.getpid() and process.environ().get("TMPDIR") == str(temporary)
        return False

    return list(filter(has_it, psutil.process_iter()))


def command_all_the_time(fleet: RunningFleet, watched: Watched, seconds: float) -> None:
    """What an operator does meanwhile, each of it with success."""
    end_s = time.monotonic() + seconds
    for number in itertools.count():
        watched.look()
        if time.monotonic() > end_s:
            return
        if number % EACH == 0:
            assert fleet.post("/fleet/hostile/restart").status_code == 202
            assert fleet.post("/fleet/reload").status_code == 202
            assert fleet.post(HONEST + "/engine/reset-prefix-cache").status_code == 200
        assert fleet.seen("honest")["stage"] == "serving"
        assert fleet.get(HONEST).json()["state"] == "READY"
        time.sleep(0.5)


def test_an_honest_worker_serves_beside_a_hostile_one_in_a_flood_of_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))  # by which its processes are known, too
    shared = in_shared_memory()
    (control_port,) = free_ports(1)
    hostile = {
        "model_name": "hostile",
        "control_port": control_port,
        "env": {VARIABLE: "", LIFE_VARIABLE: "2"},
        "lifecycle": QUICK,
    }
    settings = {"port": 0, "token": TOKEN, "restart": OFTEN, "watchdog": 30}
    with RunningFleet(tmp_path, {"model_name": "honest"}, hostile, fleet=settings) as fleet:
        until(lambda: fleet.serving("honest"))
        honest = fleet.seen("honest")
        targets = (
            Target(port_of(fleet.url), "/fleet/hostile/lifecycle"),
            Target(port_of(honest["control_url"]), "/lifecycle"),
            Target(fleet.port("honest"), "/v1/completions"),
            Target(fleet.port("hostile"), "/v1/completions"),
            Target(control_port, "/lifecycle"),
        )
        watched = Watched(fleet.process.pid)
        with flooded(*targets) as flood, fleet.asked_all_the_time("honest", 0.05) as asked:
            command_all_the_time(fleet, watched, SECONDS)
            of_a_core = watched.of_a_core
        ends = [line for line in fleet.events("worker") if line.get("code") is not None]
        began_s = time.monotonic()
        fleet.process.send_signal(signal.SIGINT)
        fleet.process.wait(STOP_S + BUSY_S)
        record_property(
            "told",
            f"hostile: {sum(flood.counts.values())} tricks of strangers, {len(ends)} ends of the "
            f"hostile worker, {asked.counts['200']} requests served by the honest one; the "
            f"supervisor had {watched.most_memory / 2**20:.0f} MiB and {of_a_core:.0%} of a core, "
            f"and ended {time.monotonic() - began_s:.1f} s after Ctrl-C",
        )
        assert fleet.process.returncode in (0, 124)  # 124: the hostile worker was killed
        assert set(asked.counts) == {"200"}, asked.counts
        starts = [line for line in fleet.events("worker") if line.get("trigger") == "start"]
        assert [line["worker"] for line in starts].count("honest") == 1
        assert len(ends) >= SECONDS / 20
        assert watched.most_memory < MOST_MEMORY
        assert of_a_core < MOST_OF_A_CORE
    assert not list(temporary.iterdir())
    until(lambda: in_shared_memory() <= shared)  # other fleets are there for a moment
    until(lambda: not processes_with(temporary))  # an orphan ends where nobody reads it
