"""No orphans: a guardian process that ends the engine when whatever kills us has killed us.

A spawned EngineCore cannot be given a pipe of ours, and a process that is stopped cannot read one;
so a third process watches (see guardian, which it runs). Not PR_SET_PDEATHSIG, which follows the
parent's thread and is lost by a grandchild; not PR_SET_CHILD_SUBREAPER, for which the guardian
would have to be our ancestor; not a plugin of vLLM's, which runs only after seconds of imports.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog

from ichat_lifecycle.adapters import guardian, tracing
from ichat_lifecycle.adapters.engine_leftovers import SHORT, Note, remove_leftovers
from ichat_lifecycle.adapters.run_directory import RunDirectory

log = structlog.get_logger("ichat_lifecycle.engine")

# vLLM's: where the Unix sockets between its processes are made.
SOCKETS = "VLLM_RPC_BASE_PATH"
_SOCKET_PATH_LIMIT = 107  # bytes that the kernel takes
_SOCKET_NAME = 37  # "/" and a UUID
_END_S = 1.0

# Ends of pipes, and locks, by which others see that we live. A fork of ours must not hold them.
_life_fds: set[int] = set()


def _forget_guardians() -> None:
    for fd in _life_fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    _life_fds.clear()


os.register_at_fork(after_in_child=_forget_guardians)


class EngineGuard:
    """One guardian for one engine, from before its first process until after its last.

    Without a guardian (the system has no process left, say) an engine is started all the same, and
    a warning says so. What a dead owner has left is removed before.

    Args:
        output_fd: the reading end of the pipe into which the engine's processes print.
    """

    def __init__(self, output_fd: int) -> None:
        remove_leftovers()
        self._marker = secrets.token_hex(8)
        note = str(Note.of(self._marker, output_fd))
        self._sockets = _socket_directory(note)
        self._record = _record_directory(note, self._sockets)
        self._directories = list(dict.fromkeys(filter(None, (self._sockets, self._record))))
        self._life_fd = -1
        self._process: subprocess.Popen[bytes] | None = None
        _life_fds.update(directory.fd for directory in self._directories)
        try:
            self._start(output_fd)
        except OSError as error:
            log.warning("engine_unguarded", error=str(error))

    def _start(self, output_fd: int) -> None:
        read_fd, self._life_fd = os.pipe()
        _life_fds.add(self._life_fd)
        record_fd = self._record.fd if self._record else -1
        arguments = (
            *map(str, (read_fd, output_fd, os.getpid(), self._marker, record_fd)),
            guardian.names_of(guardian.segments()),
            *(directory.path for directory in self._directories),
        )
        fds = (read_fd, output_fd, *(directory.fd for directory in self._directories))
        try:
            # Blocked signals stay blocked in what is executed: from its first instruction on.
            with blocked({signal.SIGINT, signal.SIGTERM, signal.SIGHUP}):
                self._process = subprocess.Popen(
                    [sys.executable or "python3", "-I", "-S", guardian.__file__, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=fds,
                    start_new_session=True,
                )
        finally:
            os.close(read_fd)

    @property
    def pid(self) -> int | None:
        """The guardian's pid; None where there is none."""
        return self._process.pid if self._process else None

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """What is executed within carries our marker, and makes its sockets in our directory."""
        variables = {guardian.VARIABLE: self._marker, tracing.VARIABLE: str(os.getpid())}
        if self._sockets is not None:
            variables[SOCKETS] = self._sockets.path
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def sweep(self) -> None:
        """Has the guardian end all that is left of the engine; safe to call again."""
        if self._life_fd >= 0:
            _life_fds.discard(self._life_fd)
            os.close(self._life_fd)
            self._life_fd = -1

    def end(self) -> None:
        """The engine is gone, and so is its guardian after this; waits for it, up to 1 s."""
        if self._life_fd >= 0:
            with contextlib.suppress(OSError):  # it was killed
                os.write(self._life_fd, b".")
        self.sweep()
        self._wait()
        if self._record is not None and self._record.fd >= 0:
            guardian.remove_memory(guardian.recorded(self._record.text()))
        for directory in self._directories:
            _life_fds.discard(directory.fd)
            directory.remove()

    def _wait(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_S)


@contextlib.contextmanager
def blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Blocks signals for the calling thread, and for ever in what it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _socket_directory(note: str) -> RunDirectory | None:
    """A new one for the engine's sockets; None where the user chose one, or none can be."""
    if SOCKETS in os.environ:
        return None
    problem = "each of them is too long a path for a socket"
    for parent in (None, *SHORT):
        try:
            directory = RunDirectory(parent, note)
        except OSError as error:
            problem = str(error)
            continue
        if len(os.fsencode(directory.path)) + _SOCKET_NAME <= _SOCKET_PATH_LIMIT:
            return directory
        directory.remove()
    log.warning("no_socket_directory", error=problem)
    return None


def _record_directory(note: str, sockets: RunDirectory | None) -> RunDirectory | None:
    """Where the shared memory is recorded: beside it, so that the record lasts as long as it does.

    In a Pod /dev/shm may be a volume that outlives the container, and /tmp is not.
    """
    if sockets is not None and Path(sockets.path).parent == Path(guardian.SHARED):
        return sockets
    try:
        return RunDirectory(guardian.SHARED, note)
    except OSError:
        return sockets
