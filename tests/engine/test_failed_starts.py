"""Starts that cannot succeed on the real engine: the exit code, and one line with the cause."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from harness import worker

pytestmark = pytest.mark.engine


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


def test_a_taken_port_is_told_in_one_line_before_vllm_is_imported(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with worker("--model-path", model, "--port", port) as started:
            assert started.wait() == 69
            lines = started.log.read_text().splitlines()
    assert len(lines) == 1
    assert port in lines[0]


def test_a_missing_model_is_told_in_one_line_before_vllm_is_imported() -> None:
    with worker("--model-path", "/no/such/model") as started:
        assert started.wait() == 66
        lines = started.log.read_text().splitlines()
    assert len(lines) == 1
    assert "/no/such/model" in lines[0]


def test_not_enough_memory_is_71_with_the_engines_own_cause(model: str) -> None:
    code, line = end_of("--model-path", model, VLLM_CPU_KVCACHE_SPACE="100000")
    assert code == 71
    assert "memory" in line.lower()
    assert "See root cause above" not in line
    assert "hint:" in line


def test_corrupt_weights_are_told_with_their_cause(model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors here")
    code, line = end_of("--model-path", str(broken))
    assert code in (66, 70)
    assert "See root cause above" not in line
    assert "cause:" in line
