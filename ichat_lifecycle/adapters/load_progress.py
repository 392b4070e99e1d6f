"""Does a load still move? Whatever it does, it prints, computes, or reads and writes.

A pure judge over samples, a sampler that takes them out of /proc, and the loop that joins the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ichat_lifecycle.adapters.threads import in_thread
from ichat_lifecycle.errors import StartError
from ichat_lifecycle.log_line import parse

# Per second since the last move, and at least. What waits idly, by polling too, stayed below this
# where EngineCore or its worker was stopped in the middle of a load; what moves needs more.
CPU_SHARE = 0.02  # of one core
CPU_LEAST_S = 0.05
BYTES_PER_S = 4096
BYTES_LEAST = 65536

_LOOKS = 20  # per stall_timeout
_LONGEST_INTERVAL_S = 5.0
# Between two looks, and as a part of the time between them: after a longer gap we were stopped
# ourselves, with the engine perhaps. A look reads many files, and may take long on a busy machine.
_GAP_S, _GAP_INTERVALS = 2.0, 2

_LINES_KNOWN = 100  # an echo comes soon, or is rare

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Sample:
    """Sums since the load began; none ever shrinks.

    Attributes:
        at_s: the clock's time.
        phase: the load's own name for where it is.
        lines: new lines that the engine's processes printed; one that says again what an earlier
            one said is not new, such as a warning that something is still waited for, with the
            time that it has taken so far.
        cpu_s: seconds of CPU time.
        moved_bytes: read or written, page faults that had to read included.
    """

    at_s: float
    phase: str
    lines: int = 0
    cpu_s: float = 0.0
    moved_bytes: int = 0


class Judge:
    """Tells for how long nothing has moved.

    Args:
        first: where the load is when the watch begins.
        interval_s: seconds between two looks.
    """

    def __init__(self, first: Sample, interval_s: float = _LONGEST_INTERVAL_S) -> None:
        self._mark = self._last = first
        self._gap_s = max(_GAP_S, _GAP_INTERVALS * interval_s)

    def still_for_s(self, now: Sample) -> float:
        """Seconds since the last move; 0 where this sample shows one."""
        gap = now.at_s - self._last.at_s > self._gap_s
        self._last = now
        if gap or self._moved(now):
            self._mark = now
        return now.at_s - self._mark.at_s

    def _moved(self, now: Sample) -> bool:
        mark = self._mark
        elapsed_s = now.at_s - mark.at_s
        return (
            now.phase != mark.phase
            or now.lines != mark.lines
            or now.cpu_s - mark.cpu_s >= max(CPU_LEAST_S, CPU_SHARE * elapsed_s)
            or now.moved_bytes - mark.moved_bytes >= max(BYTES_LEAST, BYTES_PER_S * elapsed_s)
        )


class News:
    """Counts lines that say something new; from any thread."""

    def __init__(self) -> None:
        self.count = 0
        self._seen: deque[str] = deque(maxlen=_LINES_KNOWN)

    def line(self, text: str) -> None:
        said = parse(text).news
        if said not in self._seen:
            self._seen.append(said)
            self.count += 1


@dataclass(slots=True)
class _Used:
    cpu_s: float = 0.0
    moved_bytes: int = 0


@dataclass(slots=True)
class Sampler:
    """Sums over the processes of a load: our descendants and our threads that it has started.

    What was there before it, such as the event loop's thread and other children, does not count.
    """

    _ours: frozenset[Path] = field(default_factory=lambda: frozenset(_own_threads()))
    _others: frozenset[int] = field(default_factory=lambda: frozenset(_descendants(set())))
    _used: dict[tuple[Path, str], _Used] = field(default_factory=dict)
    _total: _Used = field(default_factory=_Used)

    def take(self) -> tuple[float, int]:
        """CPU seconds, and bytes read or written, since the sampler was made."""
        # Looking costs, too: all the files read here would pass for a load that moves.
        us = _PROC / "self" / "task" / str(threading.get_native_id())
        before, self._used = self._used, {}
        for task in (*self._processes(), *(set(_own_threads()) - self._ours - {us})):
            found = _read(task)
            if found is not None:
                start, used = found
                self._used[task, start] = used
                self._add(used, before.get((task, start), _Used()))
        return self._total.cpu_s, self._total.moved_bytes

    def describe(self) -> str:
        """Each process of the load and what it does, for the message of an error."""
        told = (_told(process) for process in self._processes())
        return ", ".join(filter(None, told)) or "no process of the engine is there"

    def _processes(self) -> list[Path]:
        return [_PROC / str(pid) for pid in sorted(_descendants(set(self._others)))]

    def _add(self, used: _Used, before: _Used) -> None:
        # Differences: what has ended keeps its share, so that the sums never shrink.
        self._total.cpu_s += max(0.0, used.cpu_s - before.cpu_s)
        self._total.moved_bytes += max(0, used.moved_bytes - before.moved_bytes)


async def watch(
    stall_timeout_s: float,
    phase: Callable[[], str],
    news: News,
    sampler: Sampler,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Returns never; ends when it is cancelled, or when the load has stalled.

    Args:
        stall_timeout_s: seconds without a move that end the load.

    Raises:
        StartError: with the code `start_stalled`.
    """
    interval_s = min(_LONGEST_INTERVAL_S, stall_timeout_s / _LOOKS)

    def take() -> Sample:
        cpu_s, moved_bytes = sampler.take()
        return Sample(clock(), phase(), news.count, cpu_s, moved_bytes)

    async def sample() -> Sample:
        # The time is that of the look: the way back from the thread may take a while.
        return await in_thread(take, "load-progress")

    judge = Judge(Sample(clock(), phase()), interval_s)
    while True:
        await asyncio.sleep(interval_s)
        with contextlib.suppress(OSError):  # no descriptor is left, say; it is not for us to judge
            still_s = judge.still_for_s(await sample())
            if still_s >= stall_timeout_s:
                raise stalled(phase(), still_s, sampler.describe())


def stalled(phase: str, still_s: float, processes: str) -> StartError:
    """The error that ends a load which has stalled."""
    return StartError(
        f"the load has stalled in the phase {phase}: nothing moved for {still_s:.0f} s "
        "(no new line, no CPU time, nothing read or written)",
        code="start_stalled",
        root_cause=processes,
        hint="look at what the phase waits for (a disk, a download and its lock, another node, a "
        "device); if such a pause is normal here, raise start.stall_timeout",
    )


def _own_threads() -> list[Path]:
    return list((_PROC / "self" / "task").iterdir())


def _descendants(without: set[int]) -> set[int]:
    """Our descendants, but for some children and theirs."""
    parents = {
        int(entry.name): int(fields[1])
        for entry in _PROC.iterdir()
        if entry.name.isdigit() and (fields := _stat(entry)) is not None
    }
    found, new = set[int](), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - without - found
        found |= new
    return found


def _stat(task: Path) -> list[str] | None:
    """/proc/…/stat from the state on; None where the process has ended."""
    try:
        text = (task / "stat").read_text(errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def _read(task: Path) -> tuple[str, _Used] | None:
    """When a process or thread was started, and what it has used."""
    fields = _stat(task)
    if fields is None:
        return None
    major_faults, user, system, start = (fields[n] for n in (9, 11, 12, 19))
    moved = int(major_faults) * _PAGE
    try:
        io = dict(line.split(": ") for line in (task / "io").read_text().splitlines())
        moved += max(int(io["rchar"]), int(io["read_bytes"]))
        moved += max(int(io["wchar"]), int(io["write_bytes"]))
    except (OSError, ValueError, KeyError):
        pass  # a kernel without these counts
    return start, _Used((int(user) + int(system)) / _TICKS_PER_S, moved)


# Ours, and idle by design.
_HELPERS = (b"multiprocessing.resource_tracker", b"guardian.py")
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended",
}


def _told(process: Path) -> str | None:
    fields = _stat(process)
    if fields is None:
        return None
    try:
        command = (process / "cmdline").read_bytes()
    except OSError:
        command = b""
    if any(helper in command for helper in _HELPERS):
        return None
    name = Path(command.split(b"\0")[0].decode(errors="replace").strip()).name or "process"
    return f"{name} (pid {process.name}) {_STATES.get(fields[0], fields[0])}"
