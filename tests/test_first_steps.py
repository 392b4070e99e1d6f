"""What `serve` and `up` do before anything else, as processes: it takes no vLLM to see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NOTHING = "/nonexistent"
SERVE = ("serve", "--model-path", NOTHING)
UP = ("up", NOTHING)
BOTH = pytest.mark.parametrize("words", [SERVE, UP], ids=["serve", "up"])
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # fits any machine
MODULE = ("-m", "ichat_lifecycle")
NOBODY = ("setpriv", "--reuid=12345", "--clear-groups")  # a user without an entry in /etc/passwd

# The whole way to the backend, which tells what it finds in place of running. As PID 1, so to say.
WORKER = """
import json, os, sys, threading
from ichat_lifecycle.adapters import reaper
from ichat_lifecycle.backend import VLLMBackend
from ichat_lifecycle.cli import main

async def run(self):
    found = {
        "stdout": os.readlink("/proc/self/fd/1"),
        "waits": os.get_blocking(1) or os.get_blocking(2),
        "reaps": any(thread.name == "reaper" for thread in threading.enumerate()),
    }
    os.write(2, (json.dumps({"event": "run", **found}) + "\\n").encode())

reaper.INIT = os.getpid()
VLLMBackend.run = run
main()
"""
RUNS = ("-c", WORKER, "serve", "--model-path", "org/name", "--port", "0")


def run(
    words: Sequence[str], redirection: str = "", prefix: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """A new interpreter, with these variables alone; no error of ours is a traceback."""
    environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **SMALL, **variables}
    command = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *prefix, sys.executable, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd="/", env=environ
    )
    assert "Traceback" not in done.stderr
    return done


def events(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return {line["event"]: line for line in lines}


@pytest.fixture
def nobodys() -> Iterator[dict[str, str]]:
    """The variables of a user who has no home; skips where nobody can become that user."""
    if os.geteuid() or not shutil.which(NOBODY[0]):
        pytest.skip("another user takes root, and setpriv of util-linux")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        variables = {"TMPDIR": directory}
        command = [*NOBODY, sys.executable, "-c", "import ichat_lifecycle.cli"]
        if subprocess.run(command, capture_output=True, check=False, env=variables).returncode:
            pytest.skip("this interpreter is where another user may not read it")
        yield variables


def test_a_variable_that_kubernetes_has_set_is_named_before_the_model_is_looked_for() -> None:
    done = run([*MODULE, *SERVE], VLLM_PORT="tcp://10.96.0.1:8000")
    assert done.returncode == 2
    assert "VLLM_PORT=tcp://10.96.0.1:8000: a link to a Service" in done.stderr


@BOTH
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(words: Sequence[str]) -> None:
    done = run([*MODULE, *words], VLLM_API_KEY="schlüssel")
    assert done.returncode == 2
    assert done.stderr.startswith("ichat-lifecycle: error: VLLM_API_KEY cannot be sent")
    assert "schl" not in done.stderr


@BOTH
def test_what_is_missing_is_told_without_a_stdout(words: Sequence[str]) -> None:
    done = run([*MODULE, *words], ">&-")
    assert done.returncode == 66
    assert "/nonexistent: no such file" in done.stderr.lower()


def test_a_user_without_a_home_is_told_what_is_missing(nobodys: dict[str, str]) -> None:
    done = run([*MODULE, *SERVE], prefix=NOBODY, **nobodys)
    assert done.returncode == 66
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "code"), [(RUNS, 0), ((*MODULE, *UP), 66)], ids=["serve", "up"])
def test_a_home_that_is_not_there_is_warned_of(
    words: Sequence[str], code: int, nobodys: dict[str, str]
) -> None:
    """Once there is a log, and what took its place is named."""
    done = run(words, prefix=NOBODY, **nobodys)
    assert done.returncode == code, done.stderr
    assert events(done)["no_home"]["instead"] == f"{nobodys['TMPDIR']}/ichat-lifecycle-12345"


@pytest.mark.parametrize(("redirection", "stdout"), [("", "pipe:"), (">&-", "/dev/null")])
def test_a_worker_runs_when_all_is_prepared(redirection: str, stdout: str, tmp_path: Path) -> None:
    """It waits for no reader, adopts as PID 1 does, and has looked at where it runs."""
    variables = {"HOME": str(tmp_path), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    done = run(RUNS, redirection, **variables)
    assert done.returncode == 0, done.stderr
    found = events(done)
    assert found["run"]["stdout"].startswith(stdout)
    assert found["run"]["reaps"]
    assert found["run"]["waits"] is (stdout == "/dev/null")  # which never does
    assert "--control-host" in found["kubernetes"]["hint"]
