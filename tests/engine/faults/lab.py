"""Where faults get their servers from: one shared worker, or one of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from harness import ENGINE_FLAGS, START_TIMEOUT_S, Server, Worker, free_port, wait_for

from .measure import destroyed

# Longer than the other tests have it: streams have to last some seconds.
LENGTH = ("--max-model-len", "2048")
# The time to DEGRADED is that of the defaults; only what follows it is shorter.
QUICK_TO_GIVE_UP = ("--set", "health.give_up_after=2")
TOKEN = "the-control-token-of-the-faults"
# Not so many that saturation is a question of memory, and fewer than the clients of fault 7.
SEQUENCES = 16

# vLLM's own stop while idle, as measured before; `make faults` puts in what it measures.
VLLM_SERVE_STOP_S = 0.8


class VllmServe(Server):
    """What `vllm serve` runs (the CPU build's script of that name is broken)."""

    stdout_in_log = True

    def __init__(
        self,
        model: str,
        *flags: str,
        port: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.main = f"http://127.0.0.1:{self.port}"
        new = importlib.util.find_spec("vllm.entrypoints.launchers") is not None
        module = "launchers.api_server.entry" if new else "openai.api_server"
        super().__init__(
            [
                *(sys.executable, "-m", f"vllm.entrypoints.{module}", "--model", model),
                *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(self.port)),
                *(*ENGINE_FLAGS, *LENGTH, "--max-num-seqs", str(SEQUENCES), *flags),
            ],
            environment=environment,
        )

    def wait_until_healthy(self) -> float:
        """Seconds from its start to that."""

        def healthy() -> bool:
            assert self.process.poll() is None, self.tail()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.main}/health", timeout=5).status_code == httpx.codes.OK
            return False

        wait_for(healthy, "vLLM's /health")
        return time.monotonic() - self.began


@dataclass
class Lab:
    """What a fault is driven with. Not more than one server runs at a time.

    Args:
        model: a directory with the demo model.
        saturate_s: how long fault 7 lasts.

    Attributes:
        vllm_serve_stop_s: its stop while idle, in this run where it was measured.
        vllm_serve_start_s: a start of it to its first healthy answer; None where not measured.
    """

    model: str
    saturate_s: float = 30.0
    vllm_serve_stop_s: float = VLLM_SERVE_STOP_S
    vllm_serve_start_s: float | None = None
    _shared: Worker | None = None

    def shared(self) -> Worker:
        """A READY worker that others have used before, and will after; a new one if it is gone."""
        if self._shared is not None and not _becomes_ready(self._shared):
            self.close()
        if self._shared is None:
            self._shared = self._worker("--set", "restart.max=1000", *QUICK_TO_GIVE_UP)
            self._shared.wait_for_state("READY")
        return self._shared

    @contextlib.contextmanager
    def used_up(self) -> Iterator[Worker]:
        """A READY worker for a fault that ends it: the shared one where there is one."""
        worker = self.shared()
        self._shared = None
        with destroyed(worker):
            yield worker

    @contextlib.contextmanager
    def own(
        self,
        *flags: str,
        model: str | None = None,
        prefix: Sequence[str] = (),
        stderr: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Iterator[Worker]:
        """A worker of one's own, which has just been started."""
        self.close()
        worker = self._worker(
            *flags, model=model, prefix=prefix, stderr=stderr, environment=environment
        )
        with destroyed(worker):
            try:
                yield worker
            except BaseException:
                print(worker.tail(60))
                raise

    @contextlib.contextmanager
    def own_ready(self, *flags: str, environment: dict[str, str] | None = None) -> Iterator[Worker]:
        with self.own(*flags, environment=environment) as worker:
            worker.wait_for_state("READY")
            yield worker

    @contextlib.contextmanager
    def vllm_serve(
        self,
        *flags: str,
        model: str | None = None,
        port: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Iterator[VllmServe]:
        """vLLM's own server, which has just been started."""
        self.close()
        server = VllmServe(model or self.model, *flags, port=port, environment=environment)
        with destroyed(server):
            yield server

    def _worker(
        self,
        *flags: str,
        model: str | None = None,
        prefix: Sequence[str] = (),
        stderr: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Worker:
        arguments = ("--model-path", model or self.model, "--served-model-name", "demo", *LENGTH)
        more = ("--max-num-seqs", str(SEQUENCES), "--control-token", TOKEN)
        return Worker(
            [*arguments, *more, *flags], prefix=prefix, stderr=stderr, environment=environment
        )

    def close(self) -> None:
        if self._shared is not None:
            self._shared.destroy()
            self._shared = None


def _becomes_ready(worker: Worker) -> bool:
    """Whether it is READY again in time after the fault before."""
    deadline = time.monotonic() + START_TIMEOUT_S / 2
    while time.monotonic() < deadline and worker.process.poll() is None:
        if worker.state() == "READY":
            return True
        time.sleep(0.1)
    return False


def core_of(server: Server) -> psutil.Process:
    return server.engine_pids("EngineCore")[0]


def worker_of(server: Server) -> psutil.Process:
    """The engine's own worker process: the child of EngineCore that uses most memory."""
    children = core_of(server).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)


def process_of(server: Server, which: str) -> psutil.Process:
    return core_of(server) if which == "EngineCore" else worker_of(server)


# Runs a command without the rights by which root reads and writes everything; others lack them
# anyway. A launcher of our own, because util-linux is not everywhere.
WITHOUT_PRIVILEGE = (
    sys.executable,
    "-c",
    "import ctypes, os, sys\n"
    "libc = ctypes.CDLL(None)\n"
    "for right in (1, 2): libc.prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_*\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
)


def with_file_limit(files: int) -> tuple[str, ...]:
    return ("sh", "-c", f'ulimit -n {files}; exec "$@"', "sh")


def python_path(directory: Path) -> dict[str, str]:
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(directory), *([known] if known else [])])}
