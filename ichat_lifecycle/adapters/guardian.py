"""Ends what an engine's owner leaves behind when it is killed. Run as a script, not imported there.

A tiny process of its own (see engine_guard, which starts it), so the standard library only, and
little of that. It reads a pipe of which only the owner holds the other end: a byte says that all is
released, the end of file that the owner is gone. Then it ends every process of the engine.

Which are those? Whatever the state they are in, and whoever their parent is by now:

- those that carry the marker in their environment, as every program does that they execute;
- those whose standard output or error is the engine's pipe, as every process has it that vLLM
  starts; its titles overwrite the environment that the kernel shows;
- and all descendants of these.

Which shared memory? What multiprocessing has named, was not there before the engine, and is mapped
by such a process. Python's own resource tracker removes it as well, at the owner's end; but SIGKILL
of a whole group or a container ends the tracker too. Hence the names are recorded in a file, from
which the next start removes them (see engine_leftovers).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

VARIABLE = "ICHAT_LIFECYCLE_ENGINE"
LIFE = "life"  # in each directory: a file that is locked while the owner or its guardian lives
SHARED = "/dev/shm"
SEGMENTS = ("psm_", "sem.mp-")  # how multiprocessing names shared memory, and its semaphores
BOUND_S = 5.0  # after that, what is left cannot be killed (it waits for a device, for ever)
_LOOK_AGAIN_S = 0.05
_QUIET_LOOKS = 2  # a process may show neither mark in the instant in which it executes a program
_TELLING_S = 1
_MEMORY_S = 1.0  # between two looks at the shared memory
_MEMORY_LOOKS = 3  # after so many without success a segment is somebody else's
RECORD_LIMIT = 1 << 16  # bytes

# A process: its pid, and when it was started, which tells it from a later one of the same pid.
Process = tuple[int, int]
# The names of shared memory, each with its inode, which tells it from a later one of that name.
Segments = dict[str, int]
_PROC = Path("/proc")


def main(
    life_fd: int,
    output_fd: int,
    owner: int,
    marker: str,
    record_fd: int,
    others: str,
    directories: list[str],
) -> None:
    """Waits for the owner's word or its end.

    Args:
        life_fd: of the pipe that the owner holds.
        output_fd: the engine's pipe.
        owner: the owner's pid.
        marker: what VARIABLE is set to for the engine.
        record_fd: of the file in which the engine's shared memory is recorded; -1 for none.
        others: shared memory that was there before the engine, see names_of().
        directories: of the engine; removed with the sockets in them.
    """
    pipe = os.fstat(output_fd)
    memory = Memory(lambda: marked(marker, pipe, {os.getpid(), owner}), record_fd, others)
    if _word(life_fd, memory):
        return
    spared = {os.getpid()}
    if os.getppid() == owner:
        # It lives, and wants only its engine ended; or is about to end: its files go first.
        spared.add(owner)
    memory.look()
    ended, left = end_all(lambda: marked(marker, pipe, spared))
    remove_memory(memory.found)
    for directory in directories:
        remove_directory(directory)
    _tell("the engine" if os.getppid() == owner else f"process {owner}", ended, left)


def _word(life_fd: int, memory: Memory) -> bytes:
    poll = select.poll()
    poll.register(life_fd, select.POLLIN)
    while not poll.poll(_MEMORY_S * 1000):
        memory.look()
    return os.read(life_fd, 1)


def end_all(
    look: Callable[[], set[Process]], bound_s: float = BOUND_S
) -> tuple[set[Process], set[Process]]:
    """Kills whatever `look` finds, until it finds nothing: those ended, and those left."""
    deadline = time.monotonic() + bound_s
    killed: set[Process] = set()
    quiet, left = 0, set[Process]()
    while quiet < _QUIET_LOOKS and time.monotonic() < deadline:
        found = look()
        for process in found:
            _kill(process)
        killed |= found
        # A process that is about to end shows no mark any more, but still holds its memory.
        left = {process for process in killed if started(process[0]) == process[1]}
        quiet = 0 if left else quiet + 1
        time.sleep(_LOOK_AGAIN_S)
    return killed - left, left


def marked(marker: str, pipe: os.stat_result, spared: set[int]) -> set[Process]:
    """The engine's processes that are alive, but for those spared."""
    parents = {pid: status for pid in _pids() if (status := _status(pid)) is not None}
    environment = f"{VARIABLE}={marker}".encode()
    found = {
        pid
        for pid in parents.keys() - spared
        if prints_into(pid, pipe) or _has_variable(pid, environment)
    }
    grown = True
    while grown:
        more = {p for p, (parent, _) in parents.items() if parent in found} - found - spared
        found |= more
        grown = bool(more)
    return {(pid, parents[pid][1]) for pid in found}


def started(pid: int) -> int | None:
    """When a living process was started, in clock ticks since boot; None where there is none."""
    status = _status(pid)
    return None if status is None else status[1]


def remove_directory(directory: str) -> None:
    """Removes a directory of ours with its sockets; with whatever else is in it, it stays."""
    with contextlib.suppress(OSError):
        for entry in Path(directory).iterdir():
            if stat.S_ISSOCK(entry.lstat().st_mode):
                entry.unlink()
        # The last one: while there is one, the next start knows whose the rest is.
        (Path(directory) / LIFE).unlink(missing_ok=True)
        Path(directory).rmdir()


class Memory:
    """The shared memory of an engine, found while there are processes that map it.

    Args:
        processes: gives the engine's.
        record_fd: where it is recorded; -1 for nowhere.
        others: what was there before the engine. The owner has looked: an engine may be faster than
            the guardian's start.
    """

    def __init__(
        self, processes: Callable[[], set[Process]], record_fd: int, others: str = ""
    ) -> None:
        self._processes = processes
        self._record_fd = record_fd
        self._others = set(others.split("/"))
        self._looks: dict[str, int] = {}
        self.found: Segments = {}

    def look(self) -> None:
        """Costs little where nothing is new."""
        new = {k: v for k, v in segments().items() if k not in self._others | self.found.keys()}
        if not new:
            return
        mapped = _mapped_by(pid for pid, _ in self._processes())
        for name, inode in new.items():
            if inode in mapped:
                self._take(name, inode)
            else:
                self._looks[name] = self._looks.get(name, 0) + 1
                if self._looks[name] >= _MEMORY_LOOKS:
                    self._others.add(name)

    def _take(self, name: str, inode: int) -> None:
        self.found[name] = inode
        if self._record_fd >= 0:
            with contextlib.suppress(OSError):  # a full disk
                os.write(self._record_fd, f"{name} {inode}\n".encode())


def segments() -> Segments:
    """The segments that multiprocessing has named, and that are this user's."""
    found: Segments = {}
    with contextlib.suppress(OSError), os.scandir(SHARED) as entries:
        for entry in entries:
            if entry.name.startswith(SEGMENTS):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                        found[entry.name] = status.st_ino
    return found


def names_of(found: Segments) -> str:
    """As one word of a command line; the kernel takes 128 KiB in one."""
    return "/".join(found)[:RECORD_LIMIT]


def remove_memory(found: Segments) -> int:
    """Removes what is still there and nobody uses: how many segments."""
    there = {k: v for k, v in segments().items() if found.get(k) == v}
    if not there:
        return 0
    used = _mapped_by(_pids())
    removed = 0
    for name, inode in there.items():
        if inode not in used:
            with contextlib.suppress(OSError):
                (Path(SHARED) / name).unlink()
                removed += 1
    return removed


def recorded(text: str) -> Segments:
    """What is in a record; what is no name of a segment in it is passed over."""
    found: Segments = {}
    for line in text.splitlines():
        name, _, inode = line.partition(" ")
        if name.startswith(SEGMENTS) and "/" not in name and inode.isdecimal():
            found[name] = int(inode)
    return found


def _mapped_by(pids: Iterable[int]) -> set[int]:
    """The inodes of the segments in the memory of processes.

    Not their names: the C library makes a semaphore under another one, which is what is shown.
    """
    prefix = f"{SHARED}/".encode()
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # gone, or another user's
            text = (_PROC / str(pid) / "maps").read_bytes()
            if prefix in text:
                lines = (line.partition(prefix) for line in text.splitlines())
                found |= {int(numbers.split()[-1]) for numbers, at, _ in lines if at}
    return found


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _status(pid: int) -> tuple[int, int] | None:
    """Parent and start of a process; None where it has ended, also if nobody has reaped it yet."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return None if fields[0] in (b"Z", b"X") else (int(fields[1]), int(fields[19]))


def _has_variable(pid: int, variable: bytes) -> bool:
    try:
        return variable in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False  # gone, or another user's


def prints_into(pid: int, pipe: os.stat_result) -> bool:
    """Whether the standard output or error of a process is this pipe."""
    for fd in ("1", "2"):
        with contextlib.suppress(OSError):
            if os.path.samestat((_PROC / str(pid) / "fd" / fd).stat(), pipe):
                return True
    return False


def _kill(process: Process) -> None:
    """SIGKILL, and never to a later process that got the same pid."""
    pid, start = process
    with contextlib.suppress(OSError):
        try:
            handle = os.pidfd_open(pid)
        except OSError:  # gone, or a kernel before 5.3
            if started(pid) == start:
                os.kill(pid, signal.SIGKILL)
            return
        try:
            if started(pid) == start:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _tell(gone: str, ended: set[Process], left: set[Process]) -> None:
    if not ended and not left:
        return
    text = f"ichat-lifecycle: {gone} is gone; ended {len(ended)} processes that the engine had left"
    if left:
        text += f", but not {', '.join(str(pid) for pid, _ in sorted(left))}"
    signal.alarm(_TELLING_S)  # ends this process if nobody reads
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


if __name__ == "__main__":
    _life, _output, _owner, _marker, _record, _others, *_directories = sys.argv[1:]
    main(int(_life), int(_output), int(_owner), _marker, int(_record), _others, _directories)
