"""Job control in a real terminal, under a real shell and a real make."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest
from waiting import until

DEADLINE_S = 60

# A server as far as a terminal is concerned.
PROGRAM = """
import os, signal, sys, time

def say(text):
    os.write(1, f"{text}\\n".encode())  # in one piece, whoever else writes

def end(number, frame):
    say(f"heard {signal.Signals(number).name}")
    sys.exit(int(sys.argv[1]))

signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGCONT, lambda *_: say("continued"))
say(f"program {os.getpid()}")
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    launcher = f"exec {sys.executable} -m ichat_lifecycle.adapters.foreground"
    path = tmp_path / "Makefile"
    path.write_text(
        f"CODE ?= 0\nrun:\n\t@{launcher} {sys.executable} {program} $(CODE)\n"
        f"none:\n\t@{launcher} {tmp_path}/no-such-program\n",
        encoding="utf-8",
    )
    return path


class Terminal:
    """An interactive shell in a terminal of its own, and the program that make runs in it."""

    def __init__(self, makefile: Path) -> None:
        self._make = f"make -f {makefile}"
        environment = {**os.environ, "PS1": "ready> ", "ENV": "", "TERM": "dumb"}
        self.screen: pexpect.spawn[str] = pexpect.spawn(
            "/bin/sh", ["-i"], env=environment, encoding="utf-8", timeout=DEADLINE_S
        )
        self.screen.expect_exact("ready> ")

    def run(self, target: str = "run") -> psutil.Process:
        self.screen.sendline(f"{self._make} {target}")
        self.screen.expect(r"program (\d+)\r\n")
        return psutil.Process(self._number())

    def tell(self, command: str) -> None:
        self.screen.expect_exact("ready> ")
        self.screen.sendline(command)

    def expect(self, text: str) -> None:
        self.screen.expect_exact(text)

    def code(self) -> int:
        """What the last command ended with."""
        self.tell('echo "code=$?="')
        self.screen.expect(r"code=(\d+)=")
        return self._number()

    def _number(self) -> int:
        assert isinstance(self.screen.match, re.Match)
        return int(self.screen.match.group(1))


@pytest.fixture
def terminal(makefile: Path) -> Iterator[Terminal]:
    terminal = Terminal(makefile)
    shell = psutil.Process(terminal.screen.pid)
    try:
        yield terminal
    finally:
        for process in [*shell.children(recursive=True), shell]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        terminal.screen.close(force=True)


@pytest.mark.parametrize("code", [0, 75])
def test_make_ends_with_the_programs_code_after_ctrl_c(terminal: Terminal, code: int) -> None:
    terminal.run(f"run CODE={code}")
    terminal.screen.sendintr()
    terminal.expect("heard SIGINT")
    assert terminal.code() == (2 if code else 0)  # make's own code for a recipe that failed


def test_the_terminal_comes_back(terminal: Terminal) -> None:
    """A script that runs make reads from the terminal after it."""
    terminal.run("run; read answer; echo got $answer")
    terminal.screen.sendintr()
    terminal.expect("heard SIGINT")
    terminal.screen.sendline("something")
    terminal.expect("got something")


def test_ctrl_z_fg_and_bg(terminal: Terminal) -> None:
    program = terminal.run()
    terminal.screen.sendcontrol("z")
    terminal.tell("fg")
    terminal.expect("continued")
    terminal.screen.sendcontrol("z")
    terminal.tell("bg")
    terminal.expect("continued")
    terminal.screen.sendline("echo the shell has $((1 + 1))")
    terminal.expect("the shell has 2")
    assert program.status() != psutil.STATUS_STOPPED
    terminal.tell("fg")
    until(lambda: os.tcgetpgrp(terminal.screen.child_fd) == program.pid)
    terminal.screen.sendintr()
    terminal.expect("heard SIGINT")
    assert terminal.code() == 0


def test_sigterm_to_make_reaches_the_program(terminal: Terminal) -> None:
    program = terminal.run()
    launcher = program.parent()
    assert launcher is not None
    make = launcher.parent()
    assert make is not None
    make.terminate()
    terminal.expect("heard SIGTERM")
    assert terminal.code() == 128 + signal.SIGTERM


def test_the_program_is_not_left_when_its_launcher_is_killed(terminal: Terminal) -> None:
    launcher = terminal.run().parent()
    assert launcher is not None
    launcher.kill()
    terminal.expect("heard SIGTERM")


def test_a_program_that_is_not_there(terminal: Terminal, makefile: Path) -> None:
    terminal.screen.sendline(f"make -f {makefile} none")
    terminal.expect("no-such-program: No such file or directory")
    assert terminal.code() == 2


def test_without_a_terminal_the_program_takes_its_place(makefile: Path) -> None:
    process = subprocess.Popen(
        ["make", "-f", makefile, "run"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        program = psutil.Process(int(process.stdout.readline().removeprefix("program ")))
        assert program.ppid() == process.pid
        program.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
