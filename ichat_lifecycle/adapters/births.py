"""Which process groups an engine has, reported by its own processes on a pipe of their own.

What the engine prints is not trusted, because a client's request can end up in it. A process
therefore reports its birth not in the lines, but through a pipe that is made for one load, whose
writing end only a process forked within that load has (see engine_fork) and closes before it does
anything else, and it is believed only where the kernel confirms it: a descendant of ours that leads
its own group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MESSAGE = struct.Struct("=i")  # a pid; shorter than PIPE_BUF, so that the kernel never splits one
BIRTHS_MAX = 1024  # of one load: more ranks than a machine has devices
_ANCESTORS_MAX = 64
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Birth:
    """A process that led its own group when it was born.

    `started` (clock ticks since boot) distinguishes it from a later process with the same pid.
    """

    pid: int
    started: int


class Births:
    """The births of one load. Read by one thread at a time; `close` ends the listening.

    Args:
        belongs: whether a process carries the engine's mark; asked of a group without its leader.
    """

    def __init__(self, belongs: Callable[[int], bool]) -> None:
        self._belongs = belongs
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._born: dict[int, Birth] = {}

    @property
    def read_fd(self) -> int:
        """Becomes readable with a birth; -1 once closed."""
        return self._read_fd

    @property
    def write_fd(self) -> int:
        """For the processes that are forked within the load; -1 once closed."""
        return self._write_fd

    def read(self) -> None:
        """Take in what has been reported. Never blocks."""
        if self._read_fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._read_fd, _MESSAGE.size * BIRTHS_MAX):
                for (pid,) in _MESSAGE.iter_unpack(
                    chunk[: len(chunk) // _MESSAGE.size * _MESSAGE.size]
                ):
                    self._take(pid)

    def _take(self, pid: int) -> None:
        birth = confirmed(pid)
        if birth is not None and len(self._born) < BIRTHS_MAX:
            self._born[pid] = birth

    def close(self) -> None:
        """The load is over: what has been reported is read, and nothing after it. Idempotent."""
        self.read()
        for fd in {self._read_fd, self._write_fd} - {-1}:
            os.close(fd)
        self._read_fd = self._write_fd = -1

    @property
    def pids(self) -> frozenset[int]:
        """The leaders of the engine's groups, alive or not."""
        return frozenset(self._born)

    def kill(self) -> None:
        """Send SIGKILL to each group that is still the engine's."""
        self.read()
        for birth in tuple(self._born.values()):
            if self._is_still_ours(birth):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(birth.pid, signal.SIGKILL)

    def _is_still_ours(self, birth: Birth) -> bool:
        """Whether the group is the one that was born.

        While a group has members, the kernel gives its number to no new process. A group that is
        new under the same number has a leader of another start time, or, with that gone, members
        without the engine's mark. Without a mark orphans are left to the guardian.
        """
        leader = _Status.of(birth.pid)
        if leader is not None:
            return leader.started == birth.started
        return all(self._belongs(pid) for pid in _members(birth.pid))


def report(write_fd: int) -> None:
    """Report the calling process, which leads its own group, and give the pipe up."""
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(write_fd, _MESSAGE.pack(os.getpid()))
    with contextlib.suppress(OSError):
        os.close(write_fd)


def confirmed(pid: int) -> Birth | None:
    """The birth of this pid as the kernel sees it.

    None unless it is a living descendant of the calling process that leads a process group of its
    own, in our session.
    """
    if pid <= 1 or pid == os.getpid():
        return None
    seen = _Status.of(pid)
    if seen is None or seen.group != pid or seen.session != os.getsid(0):
        return None
    return Birth(pid, seen.started) if _descends_from_us(seen) else None


def _descends_from_us(process: _Status) -> bool:
    parent: _Status | None = process
    for _ in range(_ANCESTORS_MAX):
        if parent is None or parent.parent <= 0:
            return False
        if parent.parent == os.getpid():
            return True
        parent = _Status.of(parent.parent)
    return False


def _members(group: int) -> Iterator[int]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            seen = _Status.of(int(entry.name))
            if seen is not None and seen.group == group:
                yield int(entry.name)


@dataclass(frozen=True, slots=True)
class _Status:
    parent: int
    group: int
    session: int
    started: int

    @classmethod
    def of(cls, pid: int) -> _Status | None:
        """What /proc has of a process that exists, a zombie too; else None."""
        try:
            text = (_PROC / str(pid) / "stat").read_bytes()
        except OSError:
            return None
        fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
        return cls(int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
