"""Runs a program as the terminal's foreground job, as a shell does: what `make serve` runs.

Ctrl-C goes to every process of the foreground group. GNU make, when it is one of them, ends by that
signal, whatever the program that it has started ends with. Here the program has a group of its own:
it alone hears the terminal, and make ends with its exit code.

    python -m ichat_lifecycle.adapters.foreground PROGRAM [ARGUMENT…]

What a shell's job control does holds as well: Ctrl-Z stops this job with all of make's, `fg` and
`bg` continue both; signals to this process go on to the program; the terminal goes back at the end.
Without a terminal, or in the background, the program simply takes this process's place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from ichat_lifecycle.adapters.parent import follow

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SIGNALLED = 128  # a shell's exit code for an end by a signal, less its number


def main(argv: list[str]) -> int:
    """Returns what the program ended with; 128 + number where that was a signal."""
    terminal = _terminal()
    if terminal is None:
        os.execvp(argv[0], argv)
    # A group in the background is stopped when it gives the terminal to somebody, unless so.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    owner = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(argv, terminal, owner)
    return _Job(pid, terminal).wait()


def _terminal() -> int | None:
    """The controlling terminal, if this process's group is in its foreground."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
        return terminal if os.tcgetpgrp(terminal) == os.getpgrp() else None
    except OSError:
        return None


def _become(argv: list[str], terminal: int, owner: int) -> NoReturn:
    """The child: a group of its own, in the foreground, that is told when its parent is killed."""
    try:
        if not follow(owner):
            os._exit(_SIGNALLED + signal.SIGKILL)
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpid())
        for number in (signal.SIGTTOU, signal.SIGPIPE):  # Python ignores the latter
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
    os._exit(os.EX_UNAVAILABLE)


class _Job:
    """The program's process group, and who has the terminal."""

    def __init__(self, pid: int, terminal: int) -> None:
        self._pid = pid
        self._terminal = terminal
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: self._kill(number))
        signal.signal(signal.SIGCONT, lambda *_: self._resume())

    def wait(self) -> int:
        while True:
            _, status = os.waitpid(self._pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                self._stop_with_it()
                continue
            self._hand_over(self._pid, os.getpgrp())
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else _SIGNALLED - code

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _stop_with_it(self) -> None:
        self._hand_over(self._pid, os.getpgrp())
        with _blocked(signal.SIGCONT):
            os.killpg(0, signal.SIGTSTP)  # ignored where nobody could continue it
            signal.sigtimedwait([signal.SIGCONT], 0)  # seen: what continued it counts once
        self._resume()

    def _resume(self) -> None:
        self._hand_over(os.getpgrp(), self._pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGCONT)

    def _hand_over(self, have: int, get: int) -> None:
        """Whoever else has the terminal keeps it: a shell, after `bg`."""
        with contextlib.suppress(OSError):  # it was closed
            if os.tcgetpgrp(self._terminal) == have:
                os.tcsetpgrp(self._terminal, get)


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
