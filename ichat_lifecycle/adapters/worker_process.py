"""Workers as processes of the supervisor's: `serve` with a socket handed down."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog

from ichat_lifecycle.adapters.line_throttle import ThrottledLines, cost_of, line_bucket
from ichat_lifecycle.adapters.notify_socket import NotifySockets
from ichat_lifecycle.adapters.parent import SUPERVISOR_VARIABLE
from ichat_lifecycle.adapters.sd_notify import (
    SOCKET_VARIABLE,
    WATCHDOG_PID_VARIABLE,
    WATCHDOG_VARIABLE,
)
from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.config import TOKEN_VARIABLE
from ichat_lifecycle.environment import METRICS_DIRECTORY
from ichat_lifecycle.fleet.ports import Hearer, Plan
from ichat_lifecycle.secret_words import ARGS_FD, hand_over
from ichat_lifecycle.token_bucket import TokenBucket

log = structlog.get_logger("ichat_lifecycle.fleet")

# -P: a file called argparse.py where `up` was started must not be run.
SERVE = (sys.executable, "-P", "-m", "ichat_lifecycle", "serve")
_OWN = (FLEET_TOKEN_VARIABLE, WATCHDOG_PID_VARIABLE)  # the supervisor's
_NO_PIDFD = (errno.ENOSYS, errno.EPERM)  # a kernel before 5.3, a sandbox

CHUNK = 16_384
# A worker that prints without end must not hold up the others, nor take a core: it is read so far
# at once, and then again after a pause. A pipe that is full is its own trouble.
TURN_COST, PAUSE_S = 256 * 1024, 0.05
PIPE_MAX = 1 << 20  # bytes that a pipe may hold at its end
_ERROR = "ichat-lifecycle: error: "  # begins the last line of a process that has failed

# A worker's name, and a line that it has printed.
LineSink = Callable[[str, str], None]
FdOf = Callable[[Plan], int]


class WorkerProcess:
    """One process, whose end and whose output come by the event loop.

    Nothing that it prints, and no failure of who gets that, keeps its end from being noticed.

    Args:
        fds: what it inherits, by the same numbers.
        on_line: gets each line that it prints, without its end; those that come too fast are left
            out (see line_throttle).
        scrub: takes secrets out of each line before anybody gets it.
        on_end: called once it has ended and all that it had printed by then has been read.
        on_dropped: gets the number of lines that were left out, at most every 10 s.
        bucket: what it prints is taken from it; default: one of its own.

    Attributes:
        token: what commands to its control plane need.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        fds: Sequence[int],
        on_line: Callable[[str], None],
        on_end: Callable[[int], None],
        on_dropped: Callable[[int], None] = lambda count: None,
        scrub: Callable[[str], str] = str,
        bucket: TokenBucket | None = None,
    ) -> None:
        self._on_line = on_line
        self._scrub = scrub
        self._on_end = on_end
        self._on_dropped = on_dropped
        self._lines = ThrottledLines(bucket)
        self._pause: asyncio.TimerHandle | None = None
        self._failed = False  # who gets what it prints, which is told once
        self.last_words = ""
        self.token = ""
        read_fd, write_fd = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                pass_fds=fds,
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
        except BaseException:  # too many open files, or threads: what nobody watches must not run
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
        spent = 0
        while spent < TURN_COST:
            chunk = self._chunk()
            if chunk is None:
                return
            if not chunk:
                self._loop.remove_reader(self._read_fd)
                return
            spent += cost_of(chunk)
            self._take(chunk)
        self._loop.remove_reader(self._read_fd)
        self._pause = self._loop.call_later(PAUSE_S, self._read_on)

    def _read_on(self) -> None:
        self._loop.add_reader(self._read_fd, self._read)

    def _chunk(self) -> bytes | None:
        """What is there; None where that is nothing now, and empty where nothing comes any more."""
        try:
            return os.read(self._read_fd, CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _take(self, chunk: bytes) -> None:
        now_s = self._loop.time()
        for line in self._lines.feed(chunk, now_s):
            self._safely(self._give, line)
        self._report_dropped(now_s)

    def _give(self, line: str) -> None:
        line = self._scrub(line)
        if line.startswith(_ERROR):
            self.last_words = line.removeprefix(_ERROR)
        self._on_line(line)

    def _report_dropped(self, now_s: float, *, at_end: bool = False) -> None:
        if count := self._lines.take_dropped(now_s, at_end=at_end):
            self._safely(self._on_dropped, count)

    def _safely(self, hearer: Callable[[Any], None], what: Any) -> None:
        try:
            hearer(what)
        except Exception:
            if not self._failed:
                log.exception("line_not_taken", pid=self.pid)
            self._failed = True

    def _ended(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._read_fd)
        if self._pause is not None:
            self._pause.cancel()
        try:
            self._read_rest()
        finally:
            self._reap()

    def _read_rest(self) -> None:
        left = PIPE_MAX
        while left > 0 and (chunk := self._chunk()):
            left -= len(chunk)
            self._take(chunk)
        for line in self._lines.end():
            self._safely(self._give, line)
        self._report_dropped(self._loop.time(), at_end=True)

    def _reap(self) -> None:
        os.close(self._read_fd)
        self._end_group()
        code = self._process.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._safely(self._on_end, code)
        self._end.set_result(code)

    def _end_group(self) -> None:
        """End what it has left in its process group, which may hold its port's socket.

        To be called before it is reaped: until then the number is nobody else's. SIGTERM, because
        Python's resource tracker is among them, which ignores it and has shared memory to remove.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGTERM)


@contextlib.contextmanager
def _handed_over(words: Sequence[str]) -> Iterator[list[int]]:
    """While it lasts, a descriptor with these words, to be inherited; none for no words."""
    if not words:
        yield []
        return
    fd = hand_over(words)
    try:
        yield [fd]
    finally:
        os.close(fd)


class ServeLauncher:
    """Starts workers (fleet.ports.Launcher).

    Args:
        fd_of: the descriptor of the listening socket of a plan.
        on_line: gets what the workers print.
        token: what all of them take as the token of their control planes; "": each has its own.
        command: what a worker is run with; its own words follow.
        scrub: takes secrets out of what the workers print.
        on_token: gets each token that is made, which is to be hidden, too.
    """

    def __init__(
        self,
        notify: NotifySockets,
        fd_of: FdOf,
        on_line: LineSink,
        token: str = "",
        command: Sequence[str] = SERVE,
        scrub: Callable[[str], str] = str,
        on_token: Callable[[str], None] = lambda token: None,
    ) -> None:
        self._notify = notify
        self._on_token = on_token
        self._scrub = scrub
        self._fd_of = fd_of
        self._on_line = on_line
        self._token = token
        self._buckets: dict[str, TokenBucket] = {}
        self._tokens: dict[str, str] = {}
        self._command = command

    def _own_token(self, name: str) -> str:
        """The same in all lives of a worker: what is to be hidden does not become more and more."""
        if name not in self._tokens:
            self._tokens[name] = secrets.token_urlsafe(24)
            self._on_token(self._tokens[name])
        return self._tokens[name]

    def launch(
        self, plan: Plan, *, accept_from: str, watchdog_s: float, on_news: Hearer
    ) -> WorkerProcess:
        fd = self._fd_of(plan)
        inbox = self._notify.open(plan.name)
        token = (
            plan.env.get(TOKEN_VARIABLE, "").strip() or self._token or self._own_token(plan.name)
        )
        environment = {
            # In one directory of metrics for all, each worker would show the numbers of all.
            **{k: v for k, v in os.environ.items() if k != METRICS_DIRECTORY},
            **plan.env,
            SOCKET_VARIABLE: inbox.address,
            SUPERVISOR_VARIABLE: str(os.getpid()),
            WATCHDOG_VARIABLE: str(int(watchdog_s * 1e6)),
            TOKEN_VARIABLE: token,
        }
        for name in _OWN:
            environment.pop(name, None)
        words = [*plan.argv, "--fd", str(fd), "--accept-from", accept_from]
        if accept_from == "ready":
            words += ["--control-port", "0"]  # the one before still has the other
        try:
            with _handed_over(plan.secret_argv) as secret_fds:
                secret = [word for one in secret_fds for word in (ARGS_FD, str(one))]
                process = WorkerProcess(
                    [*self._command, *secret, *words],
                    environment,
                    [fd, *inbox.fds, *secret_fds],
                    lambda line: self._on_line(plan.name, line),
                    lambda _: inbox.close(),
                    lambda count: log.warning("lines_dropped", worker=plan.name, count=count),
                    self._scrub,
                    self._buckets.setdefault(plan.name, line_bucket()),
                )
        except BaseException:
            inbox.close()
            raise
        process.token = token
        inbox.hear(process.pid, lambda told: on_news(told and told.scrubbed(self._scrub)))
        return process
