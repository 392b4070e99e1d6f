"""Commands whose output nobody reads any more: `… | head -1`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FLEET = """
managed_workers:
- {model_name: a, model_path: org/name, port: 8001}
"""
COMMANDS = [
    "schema",
    "--help",
    "serve --help",
    "--version",
    "diagram",
    "diagram --format svg",
    "status --json",
    "status",
    "check FILE",
    "simulate PLAN",
]


def run(words: str, tmp_path: Path, stdout: int) -> subprocess.CompletedProcess[str]:
    (tmp_path / "fleet.yaml").write_text(FLEET, encoding="utf-8")
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    # `check` would import all of vLLM for its parser, which has no part in how output ends.
    (tmp_path / "vllm.py").write_text("raise ImportError('not here')", encoding="utf-8")
    (tmp_path / "torch.py").write_text("", encoding="utf-8")
    words = words.replace("FILE", "fleet.yaml").replace("PLAN", "plan.json")
    return subprocess.run(
        [sys.executable, "-m", "ichat_lifecycle", *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("words", COMMANDS)
def test_a_closed_pipe_is_a_quiet_end(words: str, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = run(words, tmp_path, write_end)
    finally:
        os.close(write_end)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    # What `status` finds on this machine is in its code.
    assert done.returncode in ((0, 1, 69) if words.startswith("status") else (0,))


def test_a_full_disk_is_an_error_in_one_line(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = run("schema", tmp_path, full)
    finally:
        os.close(full)
    line = "ichat-lifecycle: error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (71, line)
