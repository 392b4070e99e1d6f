"""Who may look at an engine's process. The kernel's part is a stand-in: not every one has Yama."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ichat_lifecycle.adapters import tracing
from ichat_lifecycle.adapters.engine_guard import EngineGuard

PR_SET_PTRACER = 0x59616D61


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the kernel, which takes it."""
    calls: list[tuple[Any, ...]] = []

    class Libc:
        @staticmethod
        def prctl(option: int, pid: ctypes.c_ulong, *rest: int) -> int:
            calls.append((option, pid.value, *rest))
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    return calls


@pytest.mark.parametrize("generation", [0, 1])
def test_an_ancestor_is_allowed(asked: list[tuple[Any, ...]], generation: int) -> None:
    """EngineCore's parent is the main process, a worker's is EngineCore."""
    ancestors = tracing._ancestors()
    pid = ancestors[min(generation, len(ancestors) - 1)]
    assert tracing.allow_main_process({tracing.VARIABLE: str(pid)})
    assert asked == [(PR_SET_PTRACER, pid, 0, 0, 0)]


@pytest.mark.parametrize("value", ["", "x", "-1", "0", "1", "999999999", "own", "sibling"])
def test_nobody_else_is(asked: list[tuple[Any, ...]], value: str, sibling: int) -> None:
    """The environment is anybody's: -1 would mean everybody."""
    value = {"own": str(os.getpid()), "sibling": str(sibling)}.get(value, value)
    assert not tracing.allow_main_process({tracing.VARIABLE: value})
    assert not tracing.allow_main_process({})
    assert asked == []


@pytest.fixture
def sibling() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid


def test_the_processes_of_an_engine_know_their_main_process() -> None:
    guard = EngineGuard(os.open(os.devnull, os.O_RDONLY))
    try:
        with guard.marking():
            assert os.environ[tracing.VARIABLE] == str(os.getpid())
        assert tracing.VARIABLE not in os.environ
    finally:
        guard.end()


def test_a_process_of_the_engine_asks_the_kernel_and_goes_on() -> None:
    """With Yama or without: what the plugin does first fails for neither."""
    program = "from ichat_lifecycle.adapters.vllm_plugin import prepare; prepare(); print('up')"
    environment = {**os.environ, tracing.VARIABLE: str(os.getpid())}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    assert ended.stdout == "up\n"
