"""The last resort, in processes that it ends."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import pytest

from ichat_lifecycle.adapters.last_resort import LastResort
from ichat_lifecycle.errors import ExitCode

PREFIX = """
import os, sys, time
from ichat_lifecycle.adapters.last_resort import LastResort

def kill():
    print("engine killed", flush=True)

stream = sys.stderr
"""
SUFFIX = """
resort = LastResort(0.2, kill, stream)
resort.arm()
def block_for_ever():
    while True:
        time.sleep(60)
block_for_ever()
"""
SETUPS = {
    "blocked": "",
    "kill fails": "def kill(): raise RuntimeError('no kill')",
    "stream closed": "stream = open('/dev/null', 'w'); stream.close()",
    "stream full": "stream = open('/dev/full', 'w')",
    "stream blocked": """
_, pipe = os.pipe()
os.set_blocking(pipe, False)
try:
    while os.write(pipe, b"x" * 65536): pass
except BlockingIOError:
    os.set_blocking(pipe, True)
stream = os.fdopen(pipe, "w")
""",
}


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("setup", SETUPS)
def test_a_blocked_process_is_ended(setup: str) -> None:
    """Whatever else fails meanwhile: exit code 124, the engine killed, the stacks shown."""
    done = run(PREFIX + SETUPS[setup] + SUFFIX)
    assert done.returncode == ExitCode.STOP_OUTRAN_DEADLINE.value
    if setup != "kill fails":
        assert done.stdout == "engine killed\n"
    if not setup.startswith("stream"):
        assert "outran its deadline of 0.2 s" in done.stderr
        assert "Thread MainThread:" in done.stderr
        assert "in block_for_ever" in done.stderr, "the stack of what blocked"


def test_disarmed_in_time_it_does_nothing() -> None:
    """The process ends as it would have, and says nothing."""
    done = run(PREFIX + "resort = LastResort(60, kill, stream); resort.arm(); resort.disarm()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_counts_from_the_first_arming() -> None:
    """A second signal does not buy more time."""
    script = PREFIX + (
        "resort = LastResort(0.5, kill, stream)\n"
        "for _ in range(600):\n    resort.arm()\n    time.sleep(0.1)\n"
    )
    began = time.monotonic()
    assert run(script).returncode == ExitCode.STOP_OUTRAN_DEADLINE.value
    assert time.monotonic() - began < 30


def test_disarming_leaves_no_thread() -> None:
    resort = LastResort(60, lambda: None, io.StringIO())
    resort.disarm()
    resort = LastResort(60, lambda: None, io.StringIO())
    resort.arm()
    resort.arm()
    assert [t.name for t in threading.enumerate()].count("last-resort") == 1
    resort.disarm()
    resort.disarm()
    assert "last-resort" not in [t.name for t in threading.enumerate()]


class Frozen:
    """An event whose second wait takes an hour, as of a process that was stopped meanwhile."""

    def __init__(self, cpu_s: float) -> None:
        self.now_s, self.cpu_s, self._used_s = 0.0, 0.0, cpu_s
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        froze_s = 3600.0 if len(self.waits) == 2 else 0.0
        self.now_s += seconds + froze_s
        self.cpu_s += self._used_s if froze_s else 0.0
        return False


@pytest.mark.parametrize(("cpu_s", "waited_s"), [(0.01, 3.0), (3599.0, 1.0)])
def test_time_in_which_the_process_was_stopped_does_not_count(
    cpu_s: float, waited_s: float
) -> None:
    """And time in which something held the interpreter's lock, and computed, does."""
    event = Frozen(cpu_s)
    resort = LastResort(
        3.0, lambda: None, io.StringIO(), clock=lambda: event.now_s, cpu_clock=lambda: event.cpu_s
    )
    resort._disarmed = event  # type: ignore[assignment]
    assert not resort._disarmed_in_time()
    assert sum(event.waits) == pytest.approx(waited_s)
