"""VLLMBackend inside somebody else's program: a drop-in, twice in one process, nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ENGINE_ENVIRONMENT, free_port, living_in, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.untimed]

HERE = Path(__file__).parent


def run(script: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=directory,
        env={**os.environ, **ENGINE_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_an_ichat_worker_works_without_change_and_twice(model: str, tmp_path: Path) -> None:
    done = run(HERE / "ichat_worker.py", tmp_path, model, str(free_port()))
    print(done.stdout[-3000:], done.stderr[-6000:])
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    for life in json.loads(result.removeprefix("RESULT ")):
        assert life["ready"]
        assert life["status"] == 200
        assert life["max_model_len"] == 512
        assert life["cancelled"]
        assert not life["ready_after"]
        assert life["state"] == "STOPPED"
        assert life["tasks"] == []
        assert [name for name in life["threads"] if not name.startswith("Thread-")] == []
    assert done.returncode == 0
    wait_for(lambda: not living_in(tmp_path), "nothing is left", 5)


def test_a_program_without_a_main_guard_gets_a_clear_error(model: str, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import argparse, asyncio, sys\n"
        "from ichat_lifecycle import VLLMBackend\n"
        "framework = argparse.Namespace(port=int(sys.argv[2]), host='127.0.0.1', control_port=0)\n"
        "argv = ['--model', sys.argv[1], '--max-model-len', '512', '--enforce-eager']\n"
        "asyncio.run(VLLMBackend(framework, argv).run())\n"
    )
    done = run(script, tmp_path, model, str(free_port()))
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr
    wait_for(lambda: not living_in(tmp_path), "nothing is left", 5)
