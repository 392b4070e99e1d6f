"""The other end of sd_notify: where a supervisor hears what its workers tell.

Each worker's process has a socket of its own, so that a flood of one fills no queue but its own. It
is read at a bounded rate: a worker that tells more waits, as its socket is full. What it has told
last always arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import structlog

from ichat_lifecycle.adapters.sd_notify import DATAGRAM_LIMIT
from ichat_lifecycle.adapters.socket_directory import SocketDirectory
from ichat_lifecycle.fleet.ports import Hearer
from ichat_lifecycle.fleet.told import Message, Told, message_in
from ichat_lifecycle.token_bucket import TokenBucket

log = structlog.get_logger("ichat_lifecycle.fleet")

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7)

# A start tells about ten states and phases, and a fraction now and then; a beat each few seconds.
READS_PER_S, READS_BURST = 50.0, 200.0
NEWS_PER_S, NEWS_BURST = 5.0, 50.0  # each may be a line of the log and an entry of the journal
LOOK_S = 5.0  # how often the sockets' files are looked at
AT_ONCE = 10  # datagrams of one worker before the others' turn
LAST_READS = 1024  # datagrams that may wait at its end; Linux' own limit is 10 to 512


class NotifySockets:
    """The sockets of all workers, in a directory of our own. For one event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._open: set[Inbox] = set()
        self._directory: SocketDirectory | None = None
        try:
            self._directory = SocketDirectory()
        except OSError as error:
            hint = "set TMPDIR to a directory with a short path that this user can write"
            log.warning("notify_not_private", error=str(error), hint=hint)
        self._loop = asyncio.get_running_loop()
        self._look = self._loop.call_later(LOOK_S, self._look_after)

    def open(self, worker: str) -> Inbox:
        """A socket for one process. Raises OSError."""
        self._count += 1
        if self._directory is None:
            address = f"\0ichat-fleet-{os.getpid()}-{secrets.token_hex(8)}"
        else:
            self._restore(self._directory)
            address = str(self._directory.path / str(self._count))
        inbox = Inbox(worker, address, self._open.discard)
        self._open.add(inbox)
        return inbox

    def close(self) -> None:
        self._look.cancel()
        for inbox in tuple(self._open):
            inbox.close()
        if self._directory is not None:
            self._directory.close()

    def _look_after(self) -> None:
        """A worker that cannot reach its socket is silent, and would be killed for that."""
        if self._directory is not None:
            with contextlib.suppress(OSError):
                self._restore(self._directory)
            for inbox in self._open:
                inbox.restore()
        self._look = self._loop.call_later(LOOK_S, self._look_after)

    def _restore(self, directory: SocketDirectory) -> None:
        before = directory.path
        if directory.restore():
            log.warning("notify_restored", path=str(before))


class Inbox:
    """Where one process tells of its life. A message counts only if the kernel names that process.

    Args:
        worker: whose it is, for the log.
        address: a path, or a name of Linux' abstract namespace, which begins with NUL.
        on_close: called at its end.
    """

    def __init__(self, worker: str, address: str, on_close: Callable[[Inbox], None]) -> None:
        self._worker = worker
        self._path = None if address.startswith("\0") else Path(address)
        self._on_close = on_close
        self._pid = 0
        self._hearer: Hearer = _nobody
        self._reads = TokenBucket(READS_PER_S, READS_BURST)
        self._news = TokenBucket(NEWS_PER_S, NEWS_BURST)
        self._waiting: Told | None = None  # the newest that the hearer has not got
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._nonsense = 0
        self._hearer_failed = False
        self._loop = asyncio.get_running_loop()
        self.address = address.replace("\0", "@", 1)
        self._sock = _bound(address)

    def restore(self) -> None:
        """Listen again where somebody has removed the socket's file."""
        if self._path is None or self._path.exists():
            return
        with contextlib.suppress(OSError):  # its directory has another name by now
            sock = _bound(str(self._path))
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = sock
            if "read" not in self._timers:
                self._read_on()

    def hear(self, pid: int, hearer: Hearer) -> None:
        """From now on `hearer` gets what this process tells of its life."""
        self._pid, self._hearer = pid, hearer
        self._loop.add_reader(self._sock.fileno(), self._read)

    def close(self) -> None:
        """Its process has ended. What that has told before comes before this returns."""
        self._loop.remove_reader(self._sock.fileno())
        for _ in range(LAST_READS):
            if not self._take_one():
                break
        for timer in self._timers.values():
            timer.cancel()
        if self._waiting is not None:
            self._give(self._waiting)
        self._hearer = _nobody
        if self._nonsense > 1:
            log.warning("worker_told_nonsense", worker=self._worker, count=self._nonsense)
        self._sock.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._on_close(self)

    def _read(self) -> None:
        for _ in range(AT_ONCE):
            if not self._reads.take(self._loop.time()):
                self._loop.remove_reader(self._sock.fileno())
                self._later("read", self._reads.wait_s(), self._read_on)
                return
            if not self._take_one():
                return

    def _read_on(self) -> None:
        self._timers.pop("read", None)
        self._loop.add_reader(self._sock.fileno(), self._read)

    def _later(self, what: str, seconds: float, do: Callable[[], None]) -> None:
        self._timers[what] = self._loop.call_later(seconds, do)

    def _take_one(self) -> bool:
        """Whether there was a datagram."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                DATAGRAM_LIMIT, socket.CMSG_SPACE(_CREDENTIALS.size)
            )
        except OSError:
            return False
        if self._pid and _sender(ancillary) == self._pid:
            self._take(data, whole=not flags & socket.MSG_TRUNC)
        return True

    def _take(self, data: bytes, *, whole: bool) -> None:
        message = message_in(data) if whole else Message(problem=f"more than {len(data)} bytes")
        if message.problem:
            self._note_nonsense(message.problem)
        if message.told is not None:
            self._waiting = message.told
        if message.alive:
            self._give(None)
        self._give_waiting()

    def _give_waiting(self) -> None:
        """The newest; those before it that came too fast are left out."""
        if self._waiting is None or "give" in self._timers:
            return
        if self._news.take(self._loop.time()):
            told, self._waiting = self._waiting, None
            self._give(told)
        else:
            self._later("give", self._news.wait_s(), self._give_on)

    def _give_on(self) -> None:
        del self._timers["give"]
        self._give_waiting()

    def _give(self, told: Told | None) -> None:
        try:
            self._hearer(told)
        except Exception:
            if not self._hearer_failed:
                log.exception("hearer_failed", worker=self._worker)
            self._hearer_failed = True

    def _note_nonsense(self, problem: str) -> None:
        self._nonsense += 1
        if self._nonsense == 1:
            log.warning("worker_told_nonsense", worker=self._worker, error=problem)


def _nobody(_: Told | None) -> None:
    """Nobody hears any more, or yet."""


def _bound(address: str) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.setblocking(False)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return 0
