"""What each process of an engine does first, in processes of their own."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from ichat_lifecycle.adapters.vllm_plugin import prepare
from ichat_lifecycle.causes import death

ENDS = """
import os, sys
from ichat_lifecycle.adapters.vllm_plugin import prepare
prepare()
prepare()
os.kill(os.getpid(), int(sys.argv[1]))
"""
# Features that the kernel gives to who asks, and those that this process has asked for.
TILES = """
import ctypes
from ichat_lifecycle.adapters.vllm_plugin import allow_amx_tiles

def has_tiles(operation):
    features = ctypes.c_ulong()
    ctypes.CDLL(None).syscall(158, operation, ctypes.byref(features))
    return bool(features.value >> 18 & 1)

before = has_tiles(0x1022)
print(has_tiles(0x1021), before, allow_amx_tiles(), has_tiles(0x1022))
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_vllm_finds_it() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if "ichat" in e.name]
    assert found.load() is prepare


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGILL, "Fatal Python error: Illegal instruction"),
        (signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
    ],
)
def test_what_a_signal_ends_says_which(number: signal.Signals, cause: str) -> None:
    ended = run(ENDS, str(number.value))
    assert ended.returncode == -number
    told = death(None, ended.stderr.splitlines())
    assert told.root_cause == cause
    assert "compiled kernels failed" in told.hint


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is a part of x86")
def test_who_has_amx_may_use_it() -> None:
    """A new process may not; where the CPU has none, nothing is given."""
    has, before, allowed, after = run(TILES).stdout.split()
    assert (before, allowed, after) == ("False", has, has)
