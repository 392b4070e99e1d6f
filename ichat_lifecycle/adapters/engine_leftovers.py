"""Removes what an engine has left whose owner and guardian were killed together.

SIGKILL of a process group, a container's end, or a guardian that was killed before its owner leave
nobody who could clean up. So each start of an engine does it for those before: it ends orphans,
which may hold a device's memory, and removes directories and shared memory.

Whether an owner lives is told by a lock (see run_directory), what is its own by a random marker and
by what its guardian has recorded. What is another user's, or in use, is never touched.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from ichat_lifecycle.adapters import guardian
from ichat_lifecycle.adapters.run_directory import DeadDirectory, dead_directories

log = structlog.get_logger("ichat_lifecycle.engine")

SHORT = ("/tmp", "/var/tmp", guardian.SHARED)  # where TMPDIR is too long a path for sockets
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Note:
    """What the next start has to know of an engine: its marker, and the pipe that it prints into.

    `boot` is the kernel's: after another boot, the pipe's numbers mean nothing.
    """

    boot: str
    marker: str
    device: int
    inode: int

    @classmethod
    def of(cls, marker: str, output_fd: int) -> Note:
        pipe = os.fstat(output_fd)
        return cls(_boot(), marker, pipe.st_dev, pipe.st_ino)

    @classmethod
    def read(cls, text: str) -> Note | None:
        """That of a record; None where it has none, such as one of a full disk."""
        words = text.partition("\n")[0].split(" ")
        with contextlib.suppress(ValueError):
            boot, marker, device, inode = words
            if marker:
                return cls(boot, marker, int(device), int(inode))
        return None

    def __str__(self) -> str:
        return f"{self.boot} {self.marker} {self.device} {self.inode}\n"

    def processes(self) -> set[guardian.Process]:
        """The living ones of the engine."""
        if self.boot != _boot() or self.marker == os.environ.get(guardian.VARIABLE):
            return set()
        pipe = os.stat_result((0, self.inode, self.device, 0, 0, 0, 0, 0, 0, 0))
        return guardian.marked(self.marker, pipe, {os.getpid()})


def places() -> Iterable[str]:
    """Where engines have their directories."""
    with contextlib.suppress(OSError):
        yield tempfile.gettempdir()
    yield from SHORT


def remove_leftovers() -> None:
    """Ends and removes what dead owners of this user have left; some milliseconds without any.

    Up to `guardian.BOUND_S` where there are processes to end. Two starts at once share the work.
    """
    dead = [one for place in dict.fromkeys(places()) for one in dead_directories(place)]
    try:
        if dead:
            _remove(dead)
    finally:
        for one in dead:
            one.close()


def _remove(dead: list[DeadDirectory]) -> None:
    notes = {note for one in dead if (note := Note.read(one.text)) is not None}

    def orphans() -> set[guardian.Process]:
        return {process for note in notes for process in note.processes()}

    ended: set[guardian.Process] = set()
    left: set[guardian.Process] = set()
    if orphans():
        ended, left = guardian.end_all(orphans)
    recorded: guardian.Segments = {}
    for one in dead:
        recorded |= guardian.recorded(one.text)
    memory = guardian.remove_memory(recorded)
    if not left:  # else another start has to know of them
        for one in dead:
            one.remove()
    log.warning(
        "leftovers_removed",
        directories=len(dead),
        memory=memory,
        ended=len(ended),
        left=sorted(pid for pid, _ in left),
    )


def _boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip() or "-"
    except OSError:
        return "-"
