"""What a worker adopts as PID 1 of a container does not stay a zombie."""

from __future__ import annotations

import subprocess
import sys

ADOPTS = """
import ctypes, multiprocessing, os, subprocess, sys, time
from ichat_lifecycle.adapters import reaper

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: adopts orphans, as PID 1 does

def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, list(reaper._zombies())
        time.sleep(0.01)

if __name__ == "__main__":
    orphan = int(subprocess.run(
        ["sh", "-c", "sh -c 'read x' <&3 >/dev/null & echo $!"],
        stdout=subprocess.PIPE, text=True, pass_fds=[3], check=True).stdout)
    child = multiprocessing.get_context("fork").Process(target=lambda: None)
    child.start()
    os.close(int(sys.argv[1]))  # the orphan reads its end of file, and ends
    until(lambda: set(reaper._zombies()) == {orphan, child.pid})
    rounds = reaper.Reaper()
    rounds.round()
    assert orphan in reaper._zombies(), "one round is left to whoever else waits"
    rounds.round()
    assert set(reaper._zombies()) == {child.pid}
    child.join(30)
    assert child.exitcode == 0, "multiprocessing's own children are left to it"
    reaper.reap_as_init()
    print("done")
"""


def test_orphans_are_reaped_and_multiprocessings_children_left_alone() -> None:
    script = (
        "import os, sys\n"
        "reading, writing = os.pipe()\n"
        "os.dup2(reading, 3)\n"
        "sys.argv[1:] = [str(writing)]\n" + ADOPTS
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "done\n", done.stderr
