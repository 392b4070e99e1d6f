"""Starts that cannot succeed on the real engine: the exit code, and one line with the cause."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import worker

pytestmark = [pytest.mark.engine, pytest.mark.untimed]


def end_of(*arguments: str, **environment: str) -> tuple[int, str]:
    with worker(*arguments, **environment) as started:
        code = started.wait(240)
        return code, started.log.read_text().splitlines()[-1]


def test_an_unknown_flag_names_the_nearest_one(model: str) -> None:
    code, line = end_of("--model-path", model, "--max-modle-len", "5")
    assert code == 2
    assert "--max-modle-len" in line
    assert "--max-model-len" in line


def test_a_conflict_names_both_flags(model: str) -> None:
    code, line = end_of("--model", model, "--model-path", model + "-other")
    assert code in (2, 66)  # the missing one may be noticed first
    other = Path(model).parent / "copy"
    shutil.copytree(model, other, dirs_exist_ok=True)
    code, line = end_of("--model", model, "--model-path", str(other))
    assert code == 2
    assert "--model " in line
    assert "--model-path" in line


def test_what_vllms_own_validation_refuses_is_a_bad_argument(model: str) -> None:
    code, line = end_of("--model-path", model, "--enable-auto-tool-choice")
    assert code == 2
    assert "--tool-call-parser" in line
