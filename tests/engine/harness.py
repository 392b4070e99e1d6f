"""A worker as a process of its own, watched from outside: HTTP, signals, the process table."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

# Generous: a start takes 15 to 45 s on a quiet machine, and these are not quiet.
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0

ENGINE_FLAGS = ("--max-model-len", "512", "--enforce-eager", "--dtype", "float32")
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S) -> Any:
    """Polls until the condition gives something true, and gives that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def living_in(directory: Path) -> list[psutil.Process]:
    """Every live process whose working directory this is.

    Children inherit it, orphans keep it, and unlike the environment it survives the titles that
    vLLM gives to its processes.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


class Server:
    """One server process in a directory of its own, which is also where its temporary files go."""

    stdout_in_log = False

    def __init__(
        self,
        command: Sequence[str],
        *,
        prefix: Sequence[str] = (),
        stderr: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp()).resolve()
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir()
        self.log = self.directory / "log"
        self.log.touch()
        self.began = time.monotonic()
        places = {"TMPDIR": str(self.temporary), "XDG_STATE_HOME": str(self.directory / "state")}
        own = {**places, **ENGINE_ENVIRONMENT, **(environment or {})}
        with (stderr or self.log).open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                cwd=self.directory,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=log if self.stdout_in_log else subprocess.DEVNULL,
                stderr=log,
                process_group=0,  # Ctrl-C in a test is for all of it, and for nothing else
            )

    def engine_pids(self, name: str) -> list[psutil.Process]:
        """The engine's processes by the title that vLLM gives them."""
        found = []
        for process in living_in(self.directory):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code; no process of it may be left."""
        code = self.process.wait(timeout_s)
        wait_for(lambda: not living_in(self.directory), "no process is left", 5)
        return code

    def destroy(self) -> None:
        self.process.kill()
        self.process.wait()
        # The guardian and the resource tracker first do their work: else shared memory stays.
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not living_in(self.directory), "no process is left", 10)
        for process in living_in(self.directory):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


class Worker(Server):
    """One `ichat-lifecycle serve` process.

    Args:
        arguments: added to those that every worker has here; the last one of a kind counts.
        prefix: a command that runs the worker's.
        stderr: where its log goes instead of `log`.
        environment: added to the common one.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        prefix: Sequence[str] = (),
        stderr: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port, self.control_port = free_port(), free_port()
        self.main = f"http://127.0.0.1:{self.port}"
        self.control = f"http://127.0.0.1:{self.control_port}"
        command = [
            *(sys.executable, "-m", "ichat_lifecycle", "serve"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--control-port", str(self.control_port)),
            *ENGINE_FLAGS,
            *arguments,
        ]
        # One client, and no TLS to set up: who asks all the time must not slow down who answers.
        self._client = httpx.Client(base_url=self.control, timeout=20, verify=False)
        super().__init__(command, prefix=prefix, stderr=stderr, environment=environment)

    def destroy(self) -> None:
        self._client.close()
        super().destroy()

    # --- looking

    def get(self, path: str) -> httpx.Response:
        return self._client.get(path)

    def state(self) -> str | None:
        """The state, or None while the control plane does not answer."""
        try:
            return str(self.get("/lifecycle").json()["state"])
        except httpx.TransportError:
            return None

    def phase(self) -> str | None:
        try:
            return str(self.get("/lifecycle").json()["progress"]["phase"])
        except httpx.TransportError:
            return None

    def wait_for_state(self, state: str, timeout_s: float = START_TIMEOUT_S) -> None:
        def reached() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}\n{self.tail()}")
            return self.state() == state

        wait_for(reached, f"state {state}, is {self.state()}", timeout_s)


@contextmanager
def worker(*arguments: str, **environment: str) -> Iterator[Worker]:
    """A worker that is gone at the end, whatever the test did."""
    started = Worker(arguments, environment=environment)
    try:
        yield started
    except BaseException:
        print(started.tail(80))
        raise
    finally:
        started.destroy()
