"""Finds the workers of this machine: by the name of a thread, their sockets, and what they answer.

A process of this user's with a thread named `ichat-control` is asked on each TCP port that it
listens on; the one that answers with its own address as `control_url` is the control plane. Others'
are not asked, by root neither: anybody can name a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ichat_lifecycle.beacon import CONTROL_THREAD
from ichat_lifecycle.client.documents import Status
from ichat_lifecycle.client.errors import UnreachableError
from ichat_lifecycle.client.owners import uid_of
from ichat_lifecycle.client.transport import ControlClient
from ichat_lifecycle.errors import LifecycleError

PROC = Path("/proc")
ASK_TIMEOUT_S = 2.0
SHOWN = 5  # of those that are not asked, in a line; their number is anybody's choice
OTHERS_HINT = "give the URL of its control plane, or run this as its user"
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True, slots=True)
class Worker:
    """One that answers: the base URL of its control plane, and what it says."""

    url: str
    status: Status


@dataclass(frozen=True, slots=True)
class Skipped:
    """A worker's process that could not be asked, and why not."""

    pid: int
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """The workers in the order of their URLs, and the processes that could not be asked."""

    workers: tuple[Worker, ...]
    skipped: tuple[Skipped, ...]

    def nothing(self) -> UnreachableError:
        """The error of a command that has found no worker."""
        if not self.skipped:
            return UnreachableError(
                "no worker runs on this machine, as far as this user can see",
                code="no_worker_found",
                hint="give the URL of a control plane, such as http://HOST:18000",
            )
        return UnreachableError(
            f"no worker could be asked; there is {self.others()}",
            code="no_worker_found",
            hint=OTHERS_HINT,
        )

    def others(self) -> str:
        """Those that could not be asked, in words; "" where there are none."""
        shown = [f"pid {one.pid} ({one.why})" for one in self.skipped[:SHOWN]]
        more = len(self.skipped) - len(shown)
        return ", ".join([*shown, f"and {more} more"] if more else shown)


async def find_workers(proc: Path | None = None) -> Found:
    """Looks through the processes and asks those that may be workers, all at once.

    Args:
        proc: where processes are listed; default: PROC.
    """
    proc = proc or PROC
    urls: set[str] = set()
    skipped: dict[int, str] = {}
    for pid in processes_with(CONTROL_THREAD, proc):
        try:
            if (uid := uid_of(pid)) != os.geteuid():
                skipped[pid] = f"another user's, uid {uid}"
            else:
                urls.update(listening_urls(pid, proc))
        except psutil.AccessDenied:
            skipped[pid] = "another user's, which may not be looked into"
        except ElsewhereError:
            skipped[pid] = "in a network of its own, such as a container's"
        except psutil.Error:
            continue  # it has ended
    answers = await asyncio.gather(*(_ask(url) for url in sorted(urls)))
    workers = tuple(worker for worker in answers if worker is not None)
    return Found(workers, tuple(Skipped(pid, why) for pid, why in skipped.items()))


def processes_with(name: str, proc: Path) -> Iterator[int]:
    """The processes with a thread of this name."""
    for pid in _numbers(proc):
        if any(_name(proc, pid, thread) == name for thread in _numbers(proc, pid)):
            yield pid


def _numbers(proc: Path, pid: int | None = None) -> list[int]:
    directory = proc if pid is None else proc / str(pid) / "task"
    try:
        with os.scandir(directory) as entries:
            return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())
    except OSError:
        return []  # it has ended


def _name(proc: Path, pid: int, thread: int) -> str:
    with contextlib.suppress(OSError):
        return (proc / f"{pid}/task/{thread}/comm").read_text(errors="replace").strip()
    return ""


class ElsewhereError(Exception):
    """The process has another network: its addresses mean something else here."""


def listening_urls(pid: int, proc: Path) -> Iterable[str]:
    """Where a process listens, as URLs that a client here would ask.

    Raises:
        psutil.Error: it has ended, or may not be looked into.
    """
    try:
        here, there = ((proc / f"{who}/ns/net").stat().st_ino for who in ("self", pid))
    except PermissionError:
        raise psutil.AccessDenied(pid) from None
    except OSError:
        raise psutil.NoSuchProcess(pid) from None
    if here != there:
        raise ElsewhereError
    sockets = psutil.Process(pid).net_connections("tcp")
    return {_url(*s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN}


def _url(host: str, port: int) -> str:
    host = LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _ask(url: str) -> Worker | None:
    """None where that is no control plane: the main port says the same of another address."""
    try:
        async with ControlClient(url, ASK_TIMEOUT_S, own_only=True) as client:
            status = await client.status()
    except LifecycleError:
        return None
    return Worker(url, status) if status.control_url == url else None
