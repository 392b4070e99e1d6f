"""The other end of sd_notify: where a supervisor hears what its workers tell.

Each worker's process has a socket of its own, so that a flood of one fills no queue but its own. It
is read at a bounded rate: a worker that tells more waits, as its socket is full. What it has told
last always arrives.

A socket has no name: its file is removed as soon as it has been made, and the process inherits a
descriptor of the file, whose path in /proc is the address. So no other user finds it, no one who
tidies up removes it while its worker runs, and a supervisor that is killed later leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import structlog

from ichat_lifecycle.adapters.sd_notify import DATAGRAM_LIMIT
from ichat_lifecycle.errors import NO_DESCRIPTOR
from ichat_lifecycle.fleet.ports import Hearer
from ichat_lifecycle.fleet.told import Message, Told, message_in
from ichat_lifecycle.token_bucket import TokenBucket

log = structlog.get_logger("ichat_lifecycle.fleet")

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7)

# A start tells about ten states and phases, and a fraction now and then; a beat each few seconds.
READS_PER_S, READS_BURST = 50.0, 200.0
NEWS_PER_S, NEWS_BURST = 5.0, 50.0  # each may be a line of the log and an entry of the journal
AT_ONCE = 10  # datagrams of one worker before the others' turn
LAST_READS = 1024  # datagrams that may wait at its end; Linux' own limit is 10 to 512

# Where a socket is made. In memory first: a network's file system may keep a file that is open.
PLACES = ("/dev/shm", None)  # None: the temporary directory
PREFIX = "ichat-fleet-"


class NotifySockets:
    """The sockets of all workers. For one event loop."""

    def __init__(self) -> None:
        self._open: set[Inbox] = set()
        self._warned = False

    def open(self, worker: str) -> Inbox:
        """A socket for one process. Raises OSError."""
        try:
            sock, fd = _nameless()
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise
            self._warn(error)
            sock, fd = _named(), -1
        inbox = Inbox(worker, sock, fd, self._open.discard)
        self._open.add(inbox)
        return inbox

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            hint = "mount /proc, and give this user a directory to write to (/dev/shm, TMPDIR)"
            log.warning("notify_not_private", error=str(error), hint=hint)

    def close(self) -> None:
        for inbox in tuple(self._open):
            inbox.close()


class Inbox:
    """Where one process tells of its life. A message counts only if the kernel names that process.

    Args:
        worker: whose it is, for the log.
        sock: where it tells.
        fd: of the socket's file, by which the process reaches it; -1: by a name.
        on_close: called at its end.

    Attributes:
        address: for $NOTIFY_SOCKET.
        fds: what the process has to inherit for that.
    """

    def __init__(
        self, worker: str, sock: socket.socket, fd: int, on_close: Callable[[Inbox], None]
    ) -> None:
        self._worker = worker
        self._sock = sock
        self.fds: tuple[int, ...] = (fd,) if fd >= 0 else ()
        self.address = _path(fd) if fd >= 0 else sock.getsockname().decode().replace("\0", "@", 1)
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
        for fd in self.fds:
            os.close(fd)
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


def _nameless() -> tuple[socket.socket, int]:
    """A socket that no other user reaches, and a descriptor of its file. Raises OSError."""
    *places, last = PLACES
    for place in places:
        try:
            return _made_in(place)
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise
    return _made_in(last)


def _made_in(place: str | None) -> tuple[socket.socket, int]:
    """Raises OSError."""
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(_unbound())
        fd = _bind(sock, place)
        undo.callback(os.close, fd)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.connect(_path(fd))  # a sandbox's kernel may know no such way
        undo.pop_all()
        return sock, fd


def _bind(sock: socket.socket, place: str | None) -> int:
    """Bind it in a directory of our own, of which nothing is left. Raises OSError."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    file = directory / "notify"
    try:
        at = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.bind(f"{_path(at)}/{file.name}")  # however long the directory's own path is
        finally:
            os.close(at)
        return os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            directory.rmdir()


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _named() -> socket.socket:
    """A socket in Linux' abstract namespace, which anybody reaches. Raises OSError."""
    sock = _unbound()
    try:
        sock.bind(f"\0{PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
    except OSError:
        sock.close()
        raise
    return sock


def _unbound() -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    sock.setblocking(False)
    return sock


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return 0
