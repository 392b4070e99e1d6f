"""An engine that compiles: real processes, their names, and their stacks as py-spy reads them."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.adapters.compile_watch import CompileWatch, compiler_in

# Beside other tests py-spy may wait for its turn.
LIMIT_S = 60.0

# As torch names the function in which all of torch.compile happens, and a caller of it.
COMPILER = "def compile_inner(wait):\n    wait()\n"
CALLER = """
import sys
from torch._dynamo.convert_frame import compile_inner
def wait():
    print("up", flush=True)
    sys.stdin.read()
compile_inner(wait) if sys.argv[1] == "compiles" else wait()
"""

Start = Callable[[str], subprocess.Popen[str]]


def stop(process: subprocess.Popen[Any]) -> None:
    """The signal is on its way when send_signal() returns: on a busy machine it takes a while."""
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + LIMIT_S
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a Python process that `compiles`, or that `waits`."""
    module = tmp_path / "torch" / "_dynamo" / "convert_frame.py"
    module.parent.mkdir(parents=True)
    module.write_text(COMPILER)
    for package in (module.parent, module.parent.parent):
        (package / "__init__.py").touch()  # else the real torch comes before it
    with ExitStack() as stack:

        def started(what: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", CALLER, what],
                cwd=tmp_path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            return process

        yield started


def compiling(*pids: int, limit_s: float = LIMIT_S, py_spy: str | None = None) -> str:
    return asyncio.run(CompileWatch(lambda: pids, limit_s, py_spy).compiling())


def test_a_process_that_compiles(start: Start) -> None:
    assert compiling(start("waits").pid, start("compiles").pid) == "torch.compile"


def test_one_that_does_not(start: Start) -> None:
    assert compiling(start("waits").pid) == ""


@pytest.mark.parametrize("stopped", ["compiles", "waits"])
def test_where_one_is_stopped_nothing_is_compiled(start: Start, stopped: str) -> None:
    """The other may wait for it, or it for the other."""
    pids = {what: start(what) for what in ("compiles", "waits")}
    stop(pids[stopped])
    assert compiling(*(process.pid for process in pids.values())) == ""


def test_other_programs_are_not_looked_at(start: Start) -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            stop(other)
            assert compiling(other.pid, start("compiles").pid) == "torch.compile"
        finally:
            other.kill()


def test_a_compiler_that_an_engine_has_started_is_enough(start: Start, tmp_path: Path) -> None:
    """Where stacks may not be read."""
    compiler = tmp_path / "cc1plus"
    shutil.copy("/bin/sleep", compiler)
    waits = start("waits")
    with subprocess.Popen([compiler, "1000"]) as compiles:
        try:
            assert compiling(waits.pid, compiles.pid, py_spy="/nowhere/py-spy") == "cc1plus"
            stop(waits)
            assert compiling(waits.pid, compiles.pid, py_spy="/nowhere/py-spy") == ""
        finally:
            compiles.kill()


def test_one_that_is_gone(start: Start) -> None:
    gone = start("waits")
    gone.kill()
    gone.wait()
    assert compiling(gone.pid, start("compiles").pid) == "torch.compile"
    assert compiling() == ""


def test_what_cannot_be_seen_in_time_is_not_seen(start: Start, tmp_path: Path) -> None:
    slow = tmp_path / "py-spy"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    began = time.monotonic()
    assert compiling(start("compiles").pid, limit_s=0.5, py_spy=str(slow)) == ""
    assert time.monotonic() - began < LIMIT_S
    assert compiling(start("compiles").pid, py_spy="/nowhere/py-spy") == ""


def test_that_nobody_may_look_is_logged_once(start: Start, tmp_path: Path) -> None:
    refused, said = tmp_path / "py-spy", "Error: Permission Denied: Try running again"
    refused.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    refused.chmod(0o755)
    pids = [start("waits").pid, start("compiles").pid]
    watch = CompileWatch(lambda: pids, LIMIT_S, str(refused))
    with capture_logs() as logs:
        assert [asyncio.run(watch.compiling()) for _ in range(2)] == ["", ""]
    (line,) = [line for line in logs if line["event"] == "stacks_unreadable"]
    assert line["error"] == said
    assert "ptrace_scope" in line["hint"]


def test_that_one_of_several_has_gone_is_not_logged(start: Start) -> None:
    pids = [start("waits").pid, start("compiles").pid]
    with capture_logs() as logs:
        asyncio.run(CompileWatch(lambda: pids, LIMIT_S).compiling())
    assert logs == []


@pytest.mark.parametrize(
    ("line", "compiler"),
    [
        ("    _load_adapter (vllm/lora/worker_manager.py:113)", "the load of a LoRA adapter"),
        ("    __call__ (torch/_dynamo/convert_frame.py:1411)", "torch.compile"),
        ("    compile (triton/compiler/compiler.py:320)", "Triton"),
        ("    build_and_load (flashinfer/jit/core.py:279)", "FlashInfer"),
        # What runs each time compiled code does.
        ("    compile_wrapper (torch/_dynamo/eval_frame.py:745)", ""),
        ("    __call__ (torch/_inductor/output_code.py:613)", ""),
        ("    run (triton/runtime/jit.py:756)", ""),
        ("    _init_handles (triton/compiler/compiler.py:470)", ""),
        ("    __call__ (triton/backends/nvidia/driver.py:708)", ""),
        ("    synchronize (torch/cuda/streams.py:108)", ""),
    ],
)
def test_a_compiler_is_told_from_the_code_that_it_made(line: str, compiler: str) -> None:
    head = 'Thread 1619 (idle): "MainThread"\n    communicate (subprocess.py:1196)\n'
    assert compiler_in(f"{head}{line}\n    step (vllm/v1/engine/core.py:401)\n") == compiler
