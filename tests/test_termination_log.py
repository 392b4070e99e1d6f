"""The last words for Kubernetes: short enough, where there is a file for them, never a failure."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ichat_lifecycle import worker
from ichat_lifecycle.adapters import termination_log
from ichat_lifecycle.adapters.termination_log import LIMIT, write, write_text
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import InputMissingError, LifecycleError, StartError

ERROR = StartError("the engine could not start", root_cause="ValueError: no\n  way", hint="less")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As the kubelet leaves it, with what an earlier container said."""
    path = tmp_path / "termination-log"
    path.write_text("earlier and longer words" * 100)
    return path


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ERROR, "the engine could not start\ncause: ValueError: no way\nhint: less"),
        (StartError("alone"), "alone"),
        (StartError("a", hint="b"), "a\nhint: b"),
        (RuntimeError("foreign\nand long"), "RuntimeError: foreign and long"),
    ],
)
def test_the_last_words(file: Path, error: Exception, text: str) -> None:
    """Message, root cause and hint, a line each, in the place of what stood there."""
    write(error, file)
    assert file.read_text() == text


def test_long_words_are_cut_and_the_hint_stays(file: Path) -> None:
    """In bytes, and not in the middle of a character."""
    write(StartError("m" * 9999, root_cause="x" + "\u00e9" * 9999, hint="a hint"), file)
    assert file.stat().st_size <= LIMIT
    said = file.read_text(encoding="utf-8")
    assert said.startswith("mmm") and "\ncause: x\u00e9" in said and said.endswith("\nhint: a hint")
    write_text("x" + "\u00e9" * 9999, file)
    assert file.read_text(encoding="utf-8") == "x" + "\u00e9" * ((LIMIT - 1) // 2)


def test_secrets_are_scrubbed_before_the_cut(file: Path) -> None:
    secret = "sk-secret"
    error = StartError("m" * (LIMIT // 3 - 32 - 4) + secret, root_cause=secret, hint=secret)
    write(error, file, scrub=lambda text: text.replace(secret, "***"))
    assert "sk-" not in file.read_text()


def test_where_there_is_no_file_none_is_made(tmp_path: Path) -> None:
    """Outside Kubernetes nothing is left behind."""
    write(ERROR, tmp_path / "none")
    write(ERROR, tmp_path / "no" / "directory")
    assert list(tmp_path.iterdir()) == []


def test_it_never_fails(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory or a pipe in its place, a file that takes nothing, a scrubber that fails."""

    def fail(*given: object) -> None:
        raise OSError("no space left on device")

    os.mkfifo(tmp_path / "pipe")
    write(ERROR, tmp_path)
    write(ERROR, tmp_path / "pipe")
    write(ERROR, Path("/dev/full"))
    write(ERROR, file, scrub=fail)  # type: ignore[arg-type]
    monkeypatch.setattr(os, "fdopen", fail)
    write(ERROR, file)


# --- who calls it


def test_a_worker_that_fails_writes_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **more: object) -> None:
        raise LifecycleError("no backend", hint="x")

    monkeypatch.setattr("ichat_lifecycle.worker.logs.own_stderr", io.StringIO)
    monkeypatch.setattr(worker, "_options", fail)
    monkeypatch.setattr(termination_log, "DEFAULT_PATH", file)
    assert worker.serve(Namespace(), [], Settings()) == 70
    assert file.read_text() == "no backend\nhint: x"


def test_what_is_found_before_the_worker_is_written_too(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing model is the commonest end of a container, and is told before vLLM is imported."""
    from ichat_lifecycle import cli

    def fail(*given: object) -> None:
        raise InputMissingError("no model")

    monkeypatch.setattr(cli, "_check", fail)
    monkeypatch.setattr(termination_log, "DEFAULT_PATH", file)
    assert cli._serve(Namespace(typed=[], seen=[]), []) == 66
    assert file.read_text() == "no model"


def test_the_last_resort_writes_it(file: Path) -> None:
    script = f"""
import io, threading
from pathlib import Path
from ichat_lifecycle.adapters import termination_log
from ichat_lifecycle.adapters.last_resort import LastResort
termination_log.DEFAULT_PATH = Path({str(file)!r})
LastResort(0.01, lambda: None, io.StringIO()).arm()
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == 124
    assert file.read_text() == "the stop outran its deadline of 0.01 s"
