"""What a supervisor costs: many workers, all started, half of them killed, all stopped.

The workers are real but for their engines (tests/fleet_worker.py). Run it alone on a machine with
100 MB of memory for each worker:

    python benchmarks/fleet.py --workers 200
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from running_fleet import RunningFleet, until

PATIENCE_S = 1800.0
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--parallel", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--idle", type=float, default=30, help="seconds; default: %(default)s")
    args = parser.parse_args()
    names = [f"w{number:03}" for number in range(args.workers)]
    with tempfile.TemporaryDirectory() as directory:
        fleet = RunningFleet(
            Path(directory),
            *({"model_name": name} for name in names),
            fleet={"port": 0, "token": "t", "max_parallel_starts": args.parallel},
        )
        with fleet:
            supervisor = psutil.Process(fleet.process.pid)
            empty = supervisor.memory_info().rss
            took("all READY", lambda: until(fleet.ready, PATIENCE_S))
            grown = (supervisor.memory_info().rss - empty) / MIB
            print(f"supervisor's memory: {empty / MIB:.0f} MiB before the first worker, and")
            print(f"  {1024 * grown / args.workers:.0f} KiB for each of {args.workers}")
            print(f"idle: {100 * busy(supervisor, args.idle):.2f} % of one core")
            victims = [fleet.seen(name)["pid"] for name in names[::2]]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            took(f"{len(victims)} killed, all READY again", lambda: recovered(fleet, len(victims)))
            fleet.process.send_signal(signal.SIGTERM)
            took("all stopped", lambda: fleet.process.wait(PATIENCE_S))
            print(f"exit code {fleet.process.returncode}")
    return fleet.process.returncode


def recovered(fleet: RunningFleet, count: int) -> None:
    def again() -> bool:
        workers = fleet.get("/fleet").json()["workers"]
        return sum(worker["starts"] > 1 for worker in workers) == count and fleet.ready()

    until(again, PATIENCE_S)


def took(what: str, action: Callable[[], object]) -> None:
    began = time.monotonic()
    action()
    print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)


def busy(process: psutil.Process, seconds: float) -> float:
    """The part of one core that it takes while nothing happens."""
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return float(sum(process.cpu_times()[:2]) - before) / seconds


if __name__ == "__main__":
    sys.exit(main())
