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
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog

from ichat_lifecycle.adapters import guardian, tracing

log = structlog.get_logger("ichat_lifecycle.engine")

# vLLM's: where the Unix sockets between its processes are made.
SOCKETS = "VLLM_RPC_BASE_PATH"
_SOCKET_PATH_LIMIT = 107  # bytes that the kernel takes
_SOCKET_NAME = 37  # "/" and a UUID
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # where TMPDIR is too long a path
_END_S = 1.0

# Ends of pipes by which guardians see that we live. A fork of ours must not hold them.
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
    a warning says so.

    Args:
        output_fd: the reading end of the pipe into which the engine's processes print.
    """

    def __init__(self, output_fd: int) -> None:
        self._marker = secrets.token_hex(8)
        self._directory = _socket_directory()
        self._life_fd = -1
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(output_fd)
        except OSError as error:
            log.warning("engine_unguarded", error=str(error))

    def _start(self, output_fd: int) -> None:
        read_fd, self._life_fd = os.pipe()
        _life_fds.add(self._life_fd)
        fds = (read_fd, output_fd)
        arguments = (*map(str, fds), str(os.getpid()), self._marker, self._directory)
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
        if self._directory:
            variables[SOCKETS] = self._directory
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
        guardian.remove_sockets(self._directory)
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


def _socket_directory() -> str:
    """A new directory for the engine's sockets; "" where the user chose one, or none can be."""
    if SOCKETS in os.environ:
        return ""
    problem = "each of them is too long a path for a socket"
    for parent in (None, *_SHORT):
        try:
            directory = tempfile.mkdtemp(prefix="ichat-", dir=parent)
        except OSError as error:
            problem = str(error)
            continue
        if len(os.fsencode(directory)) + _SOCKET_NAME <= _SOCKET_PATH_LIMIT:
            return directory
        Path(directory).rmdir()
    log.warning("no_socket_directory", error=problem)
    return ""
