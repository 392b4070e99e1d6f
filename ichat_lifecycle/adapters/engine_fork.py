"""Forking vLLM's EngineCore out of a process that has threads, sockets and signal handlers.

Why at all: nearly all of a start is imports, three times over. EngineCore forked from a process
that has imported vLLM already saves one of the three. Its workers are still spawned, because OpenMP
reads its thread affinity, and the loader its LD_PRELOAD, when a process is executed; so they run
exactly as under `vllm serve`.

What a forked child must not keep of us, and what is done here, in the child, before anything else:

- our listening sockets and clients' connections, which it would hold open after we close them, by
  whatever address, also those that come during the load;
- our signal handlers and wake-up descriptor: a SIGTERM for the child would appear in our loop;
- our process group: Ctrl-C is for us, and we decide when the engine ends;
- its life, when we lose ours: whatever kills us closes our end of a pipe, and a thread of the child
  that reads the other end kills its whole group (PR_SET_PDEATHSIG would follow the forking thread).
  The guardian (see engine_guard) does that too; this holds even if it was killed with us;
- our standard streams' locks, which another thread may have held at the moment of the fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ichat_lifecycle.adapters import births
from ichat_lifecycle.adapters.standard_streams import ESCAPED

STDERR = 2
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
# Asked at import: vLLM's CPU platform overwrites it while it makes an engine's configuration.
CHOSEN_BY_USER = os.environ.get(METHOD)


@dataclass(frozen=True, slots=True)
class _Fork:
    """A load that forks.

    Args:
        workers: the method for EngineCore's workers.
        births_fd: where its birth is reported.
        sockets: the inodes of those that were there before.
    """

    workers: str
    births_fd: int
    sockets: frozenset[int]


# By the threads that are forking an EngineCore now.
_forking: dict[int, _Fork] = {}
# Nobody ever writes: a child that reads its end of file has lost us.
_life_pipe: list[int] = []


@contextlib.contextmanager
def start_method(core: str, workers: str, births_fd: int = -1) -> Iterator[None]:
    """vLLM starts EngineCore by `core`, and EngineCore its workers by `workers`: fork or spawn.

    For the processes that the calling thread starts within; the environment is put back after.

    Args:
        births_fd: where a forked EngineCore reports its birth (see births).
    """
    before = os.environ.get(METHOD)
    os.environ[METHOD] = core
    if core == "fork":
        sockets = frozenset(inode for _, inode in _sockets())
        _forking[threading.get_ident()] = _Fork(workers, births_fd, sockets)
        if not _life_pipe:
            _life_pipe.extend(os.pipe())  # for as long as we live; the kernel closes it
    try:
        yield
    finally:
        _forking.pop(threading.get_ident(), None)
        if before is None:
            os.environ.pop(METHOD, None)
        else:
            os.environ[METHOD] = before


def _in_child() -> None:
    forking = _forking.get(threading.get_ident())
    if forking is None:
        return  # a fork of somebody else's
    # A group, not a session: sessions share the cores as wholes (autogroups), and an engine with a
    # session of its own had 0.84 of the throughput.
    os.setpgid(0, 0)
    _forget_signals()
    _forget_sockets(forking.sockets)
    _fresh_streams()
    os.environ[METHOD] = forking.workers
    births.report(forking.births_fd)
    _die_with_parent()


os.register_at_fork(after_in_child=_in_child)


def _die_with_parent() -> None:
    read_fd, write_fd = _life_pipe
    os.close(write_fd)

    def wait() -> None:
        os.read(read_fd, 1)
        os.killpg(0, signal.SIGKILL)  # the workers that it spawned too

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def _forget_signals() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _forget_sockets(before: frozenset[int]) -> None:
    """Puts /dev/null in the place of each socket that was not made for the engine.

    Not closed: Python objects still hold the numbers, and would close what gets them next.

    Args:
        before: the inodes of the sockets that were there before the load.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd, inode in _sockets():
        # Its standard streams are the load's own by now, whatever they are.
        if fd > STDERR and (inode in before or not _is_pair(fd)):
            with contextlib.suppress(OSError):
                os.dup2(null, fd, inheritable=False)
    os.close(null)


def _sockets() -> Iterator[tuple[int, int]]:
    """Each descriptor of this process that is a socket, and the socket's inode."""
    for entry in Path("/proc/self/fd").iterdir():
        fd = int(entry.name)
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            if stat.S_ISSOCK(status.st_mode):
                yield fd, status.st_ino


def _is_pair(fd: int) -> bool:
    """Whether this is an end of a socket pair, as multiprocessing's pipes are.

    Only those are for the child among the sockets of a load. Whatever has a name, or a peer with
    one, is a listener, a connection that it accepted, or a client's: of ours, which go on during a
    load, or of the engine client's ZeroMQ. The kernel gives the name as it was bound: absolute,
    relative, or abstract.
    """
    sock = socket.socket(fileno=fd)
    try:
        return sock.family == socket.AF_UNIX and not sock.getsockname() and not sock.getpeername()
    except OSError:  # it is connected to nobody
        return False
    finally:
        sock.detach()


def _fresh_streams() -> None:
    # In UTF-8, as the reader of the pipe takes it, whatever the locale is.
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors=ESCAPED, closefd=False)
        for fd in (1, 2)
    )
    for logger in (logging.getLogger(), logging.getLogger("vllm")):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.stream = sys.stderr  # not setStream: it would flush the parent's buffer
