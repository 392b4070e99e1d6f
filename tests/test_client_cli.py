"""The commands as a shell runs them: arguments, exit codes, and a terminal that stays clean."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import httpx
import pexpect
import psutil
import pytest
from client_worker import LiveWorker, nobody

from ichat_lifecycle.cli import build_parser, main
from ichat_lifecycle.client import fleet_commands
from ichat_lifecycle.states import State, Trigger

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ("status", "history", "diagram", "wait", "watch")
PROGRAM = [sys.executable, "-m", "ichat_lifecycle"]
DEADLINE_S = 60


def parsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a.choices, dict))
    choices = cast(dict[str, argparse.ArgumentParser], action.choices)
    return {name: choices[name] for name in COMMANDS}


@contextmanager
def worker_aside() -> Iterator[LiveWorker]:
    """A worker whose control plane runs while this thread waits for a program."""
    worker = LiveWorker()
    asyncio.run(worker.__aenter__())
    try:
        yield worker
    finally:
        asyncio.run(worker.stop())


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


# --- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["wait"],
        ["wait", "--for", "BETTER"],
        ["wait", "--for", "READY", "--timeout", "0"],
        ["wait", "--for", "READY", "--timeout", "soon"],
        ["wait", "--for", "READY", "--time", "3"],
        ["history", "http://a", "http://b"],
        ["watch", "--json"],
        ["status", "--all"],
    ],
)
def test_mistakes_in_arguments_end_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ichat-lifecycle" in capsys.readouterr().err


def test_the_defaults_of_a_wait() -> None:
    args = build_parser().parse_args(["wait", "--for", "READY"])
    assert (args.url, args.state, args.timeout) == (None, State.READY, 300.0)


def test_every_command_says_its_exit_codes() -> None:
    for name, parser in parsers().items():
        assert "exit codes: 0 " in " ".join(parser.format_help().split()), name


def test_the_readme_has_every_client_command_and_flag() -> None:
    section = README.partition("## In a terminal")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `ichat-lifecycle ")]
    assert [line.split()[2] for line in table] == list(COMMANDS)
    for line, (name, parser) in zip(table, parsers().items(), strict=True):
        flags = {
            a.option_strings[-1] for a in parser._actions if a.dest != "help" and a.option_strings
        }
        cell = line.split("|")[1]
        assert set(re.findall(r"--[a-z]+", cell)) == flags, name


# --- exit codes


def test_status_and_history_of_a_program() -> None:
    with worker_aside() as worker:
        worker.story.serving()
        done = run("status", worker.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("demo  READY  ")
        assert json.loads(run("status", "--json", worker.url).stdout)[0]["url"] == worker.url
        worker.story.fire(Trigger.DEGRADE)
        assert run("status", worker.url).returncode == 1
        done = run("history", worker.url)
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 6)


@pytest.mark.parametrize("command", ["status", "history", "watch"])
def test_nobody_at_a_url_is_one_line_and_69(command: str) -> None:
    with nobody() as url:
        done = run(command, url)
    assert (done.returncode, done.stdout) == (69, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("ichat-lifecycle: error: nothing listens at http://127.0.0.1:")
    assert "hint: " in line


def test_a_wait_says_what_has_happened() -> None:
    with worker_aside() as worker:
        done = run("wait", worker.url, "--for", "PARSED")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("demo is PARSED")  # on a busy machine: after how long
        done = run("wait", worker.url, "--for", "READY", "--timeout", "0.5")
        assert (done.returncode, done.stdout) == (124, "")
        assert done.stderr.startswith("not READY within ")
        worker.story.fire(Trigger.STOP)
        done = run("wait", worker.url, "--for", "READY")
        assert (done.returncode, done.stdout) == (75, "")
        assert done.stderr == "demo is STOPPING, from where it cannot become READY\n"


@pytest.mark.parametrize(
    ("name", "part"),
    [("千问", "%E5%8D%83%E9%97%AE"), ("../b", "..%2Fb"), ("a\nb", "a%0Ab"), ("\udcff", "%3F")],
)
def test_a_name_is_one_part_of_a_path_whatever_it_is_made_of(name: str, part: str) -> None:
    assert fleet_commands._path(name, "logs") == f"/fleet/{part}/logs"


def test_a_mistaken_url_ends_with_2() -> None:
    done = run("wait", "ftp://x", "--for", "READY")
    assert done.returncode == 2
    assert "is no URL of a worker" in done.stderr


def test_a_locale_without_our_characters_is_no_error() -> None:
    with worker_aside() as worker:
        worker.story.serving()
        done = run("history", worker.url, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "PARSED > BOUND" in done.stdout


@pytest.mark.parametrize("form", ["svg", "mermaid"])
def test_the_diagram_of_a_worker_is_what_its_control_plane_draws(form: str) -> None:
    with worker_aside() as worker:
        worker.story.serving()
        drawn = httpx.get(f"{worker.url}/lifecycle/diagram?format={form}").text
        done = run("diagram", worker.url, "--format", form)
    assert (done.returncode, done.stdout) == (0, drawn + "\n")
    assert "READY" in drawn


# --- signals, and a terminal


def _hear_hang_ups() -> None:
    """As in a terminal, also where these tests were started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def watch_in_terminal(url: str) -> pexpect.spawn[str]:
    return pexpect.spawn(
        PROGRAM[0],
        [*PROGRAM[1:], "watch", url],
        cwd=str(ROOT),
        dimensions=(24, 80),
        timeout=DEADLINE_S,
        encoding="utf-8",
        preexec_fn=_hear_hang_ups,
        codec_errors="replace",  # Ctrl-C may come in the middle of a character
        env={**os.environ, "TERM": "xterm-256color"},
    )


def end_by(number: int) -> Callable[[pexpect.spawn[str]], None]:
    return lambda child: child.kill(number)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda child: child.sendintr(), 0),
        (end_by(signal.SIGINT), 0),
        (end_by(signal.SIGTERM), 128 + signal.SIGTERM),
        (end_by(signal.SIGHUP), 128 + signal.SIGHUP),
    ],
    ids=["ctrl-c", "SIGINT", "SIGTERM", "SIGHUP"],
)
def test_whatever_ends_a_watch_the_terminal_is_clean(
    end: Callable[[pexpect.spawn[str]], None], code: int
) -> None:
    with worker_aside() as worker:
        child = watch_in_terminal(worker.url)
        child.expect_exact("[PARSED]")
        worker.story.fire(Trigger.BIND)
        child.expect_exact("[BOUND]")
        end(child)
        child.expect(pexpect.EOF)
        rest = child.before or ""
        child.close()
    assert child.exitstatus == code
    assert "\x1b[?1049l" in rest
    assert rest.rindex("\x1b[?25h") > rest.rfind("\x1b[?25l")
    assert "Traceback" not in rest


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again() -> None:
    with worker_aside() as worker:
        child = watch_in_terminal(worker.url)
        child.expect_exact("[PARSED]")
        child.sendcontrol("z")
        child.expect_exact("\x1b[?1049l")
        stopped = psutil.Process(child.pid)
        while stopped.status() != psutil.STATUS_STOPPED:
            threading.Event().wait(0.01)
        child.kill(signal.SIGCONT)
        child.expect_exact("\x1b[?1049h")
        child.expect_exact("[PARSED]")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.close()
    assert child.exitstatus == 0


def test_a_screen_is_drawn_anew_when_its_size_changes() -> None:
    with worker_aside() as worker:
        child = watch_in_terminal(worker.url)
        child.expect_exact("[PARSED]")
        child.setwinsize(24, 120)
        child.expect(r"\x1b\[H[^\n]{110,}\n")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.close()
    assert child.exitstatus == 0


def test_ctrl_c_ends_a_wait_without_a_traceback() -> None:
    with worker_aside() as worker:
        process = subprocess.Popen(
            [*PROGRAM, "wait", worker.url, "--for", "READY"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        while worker.readers == 0:
            assert process.poll() is None
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with worker_aside() as worker:
        for _ in range(3000):
            worker.story.stage("x" * 50, 0.1)
        process = subprocess.Popen(
            [*PROGRAM, "history", "--all", worker.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        process.wait(DEADLINE_S)
