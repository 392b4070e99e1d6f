"""Workers as processes of the supervisor's: `serve` with a socket handed down."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from ichat_lifecycle.adapters.line_splitter import LineSplitter
from ichat_lifecycle.adapters.notify_socket import NotifySocket
from ichat_lifecycle.adapters.parent import SUPERVISOR_VARIABLE
from ichat_lifecycle.adapters.sd_notify import (
    SOCKET_VARIABLE,
    WATCHDOG_PID_VARIABLE,
    WATCHDOG_VARIABLE,
)
from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.environment import METRICS_DIRECTORY
from ichat_lifecycle.fleet.ports import Hearer, Plan

# -P: a file called argparse.py where `up` was started must not be run.
SERVE = (sys.executable, "-P", "-m", "ichat_lifecycle", "serve")
_OWN = (FLEET_TOKEN_VARIABLE, WATCHDOG_PID_VARIABLE)  # the supervisor's
_NO_PIDFD = (errno.ENOSYS, errno.EPERM)  # a kernel before 5.3, a sandbox

CHUNK = 65_536
CHUNKS = 16  # read at once: a worker that prints without end must not hold up the others
_ERROR = "ichat-lifecycle: error: "  # begins the last line of a process that has failed

# A worker's name, and a line that it has printed.
LineSink = Callable[[str, str], None]
FdOf = Callable[[Plan], int]


class WorkerProcess:
    """One process, whose end and whose output come by the event loop.

    Args:
        on_line: gets each line that it prints, without its end.
        on_end: called once it has ended and all that it had printed by then has been read.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        fd: int,
        on_line: Callable[[str], None],
        on_end: Callable[[int], None],
    ) -> None:
        self._on_line = on_line
        self._on_end = on_end
        self._splitter = LineSplitter()
        self.last_words = ""
        read_fd, write_fd = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                pass_fds=[fd],
                # Ctrl-C is for the supervisor, which stops its workers itself. No session: sessions
                # share the cores as wholes (autogroups).
                process_group=0,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self.pid = self._process.pid
        self._read_fd = read_fd
        os.set_blocking(read_fd, False)
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[int] = self._loop.create_future()
        try:
            self._pidfd = self._watch()
        except OSError:  # too many open files: what cannot be watched must not run
            self._process.kill()
            self._process.wait()
            os.close(read_fd)
            raise
        self._loop.add_reader(read_fd, self._read)

    def _watch(self) -> int | None:
        """The descriptor that tells the end; None where there is none, and a thread waits."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            if error.errno not in _NO_PIDFD:
                raise
            threading.Thread(target=self._outwait, name=f"wait-{self.pid}", daemon=True).start()
            return None
        self._loop.add_reader(pidfd, self._ended)
        return pidfd

    def _outwait(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # its pid stays its own until then
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._ended)

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def hurry(self) -> None:
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def renew_certificate(self) -> None:
        self._signal(signal.SIGHUP)

    def _signal(self, number: signal.Signals) -> None:
        if self._end.done():  # whoever asks has not heard of it yet
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended this very moment
            if self._pidfd is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)

    def _read(self) -> None:
        """Whatever is there. Its engine's processes may have the other end, too, and outlive it."""
        for _ in range(CHUNKS):
            try:
                chunk = os.read(self._read_fd, CHUNK)
            except BlockingIOError:
                return
            if not chunk:
                self._loop.remove_reader(self._read_fd)
                return
            for line in self._splitter.feed(chunk):
                self._take(line)

    def _take(self, line: str) -> None:
        if line.startswith(_ERROR):
            self.last_words = line.removeprefix(_ERROR)
        self._on_line(line)

    def _ended(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
        self._read()
        if self._splitter.rest:
            self._take(self._splitter.rest)
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)
        code = self._process.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._on_end(code)
        self._end.set_result(code)


class ServeLauncher:
    """Starts workers (fleet.ports.Launcher).

    Args:
        fd_of: the descriptor of the listening socket of a plan.
        on_line: gets what the workers print.
        token: lets the supervisor command them over their control planes.
        command: what a worker is run with; its own words follow.
    """

    def __init__(
        self,
        notify: NotifySocket,
        fd_of: FdOf,
        on_line: LineSink,
        token: Mapping[str, str],
        command: Sequence[str] = SERVE,
    ) -> None:
        self._notify = notify
        self._fd_of = fd_of
        self._on_line = on_line
        self._token = token
        self._command = command

    def launch(
        self, plan: Plan, *, accept_from: str, watchdog_s: float, on_news: Hearer
    ) -> WorkerProcess:
        fd = self._fd_of(plan)
        environment = {
            # In one directory for all, each worker would show the numbers of all.
            **{k: v for k, v in os.environ.items() if k != METRICS_DIRECTORY},
            **self._token,
            **plan.env,
            SOCKET_VARIABLE: self._notify.address,
            SUPERVISOR_VARIABLE: str(os.getpid()),
            WATCHDOG_VARIABLE: str(int(watchdog_s * 1e6)),
        }
        for name in _OWN:
            environment.pop(name, None)
        words = [*plan.argv, "--fd", str(fd), "--accept-from", accept_from]
        if accept_from == "ready":
            words += ["--control-port", "0"]  # the one before still has the other
        process = WorkerProcess(
            [*self._command, *words],
            environment,
            fd,
            lambda line: self._on_line(plan.name, line),
            lambda _: self._notify.forget(process.pid),
        )
        self._notify.hear(process.pid, on_news)
        return process
