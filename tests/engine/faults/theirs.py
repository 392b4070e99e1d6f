"""The same faults on `vllm serve`, each told as a short text: what was measured in this run."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path

import httpx
import psutil
from harness import START_TIMEOUT_S, living_in

from .lab import Lab, VllmServe, process_of
from .measure import Poller, Streams, ask, exit_of, last_line, not_200, outcomes, wait_alive
from .starts import BREAKS

# How long a fault that it never notices is waited for, and a stop that does not end.
PATIENCE_S = 45.0
STOP_S = 60.0


def killed(lab: Lab, which: str) -> str:
    """Its start is measured as well: the recovery of ours is compared with it."""
    with lab.vllm_serve() as server:
        lab.vllm_serve_start_s = server.wait_until_healthy()
        with Poller(f"{server.main}/health") as poller, Streams(server.main) as streams:
            began = time.monotonic()
            process_of(server, which).kill()
            noticed = poller.wait_first(not_200, began, PATIENCE_S)
            ended = streams.ended(PATIENCE_S)
            took, code = exit_of(server, began, PATIENCE_S)
        return (
            f"healthy after {lab.vllm_serve_start_s:.1f} s; /health not 200 {_after(noticed)}, "
            f"streams: {outcomes(ended)}, "
            f"exit {_after(took)}, code {code}"
        )


def _after(seconds: float | None) -> str:
    return "never" if seconds is None else f"after {seconds:.2f} s"


def stopped(lab: Lab, which: str, *, idle: bool = False) -> str:
    with lab.vllm_serve() as server:
        server.wait_until_healthy()
        with (
            Poller(f"{server.main}/health", 0.05) as poller,
            Streams(server.main, 0 if idle else 4) as streams,
        ):
            began = time.monotonic()
            process_of(server, which).send_signal(signal.SIGSTOP)
            noticed = poller.wait_first(not_200, began, PATIENCE_S)
            hung = streams.running
            new = _new_request(server)
            server.destroy()  # the streams end with it
    told = f"/health not 200: {_after(noticed)} in {PATIENCE_S:g} s"
    return f"{told}, {hung} streams hang, a new request {new}"


def _new_request(server: VllmServe) -> str:
    try:
        return f"gets {ask(server.main, timeout_s=5).status_code}"
    except httpx.TimeoutException:
        return "hangs"
    except httpx.TransportError as error:
        return repr(error)


def paused(lab: Lab) -> str:
    with lab.vllm_serve() as server:
        server.wait_until_healthy()
        with Streams(server.main) as streams:
            process = process_of(server, "EngineCore")
            process.send_signal(signal.SIGSTOP)
            time.sleep(4)
            process.send_signal(signal.SIGCONT)
            return f"streams: {outcomes(streams.ended(120))}"


def idle_stop_s(lab: Lab) -> tuple[float | None, int | None]:
    with lab.vllm_serve() as server:
        server.wait_until_healthy()
        began = time.monotonic()
        server.signal()
        return exit_of(server, began, STOP_S)


def idle(lab: Lab) -> str:
    """Ours is measured against this one."""
    took, code = idle_stop_s(lab)
    if took is not None:
        lab.vllm_serve_stop_s = took
    return f"exit {_after(took)}, code {code}"


def with_streams(lab: Lab) -> str:
    with lab.vllm_serve() as server:
        server.wait_until_healthy()
        with Streams(server.main, tokens=400) as streams:
            began = time.monotonic()
            server.signal()
            ended = streams.ended(STOP_S)
        took, code = exit_of(server, began, STOP_S)
        return f"streams: {outcomes(ended)}, exit {_after(took)}, code {code}"


def second_signal(lab: Lab) -> str:
    with lab.vllm_serve("--shutdown-timeout", "30") as server:
        server.wait_until_healthy()
        with Streams(server.main, 8):
            server.signal()
            time.sleep(0.3)
            began = time.monotonic()
            server.signal()
            took, code = exit_of(server, began, STOP_S)
            server.destroy()
        return f"exit {_after(took)}, code {code} (--shutdown-timeout 30)"


def during_start(lab: Lab) -> str:
    with lab.vllm_serve() as server:
        wait_alive(server, lambda: server.engine_pids("EngineCore"), "EngineCore")
        began = time.monotonic()
        server.signal()
        took, code = exit_of(server, began, STOP_S)
        left = _left(server)
        return f"EngineCore starting: exit {_after(took)} in {STOP_S:g} s, code {code}{left}"


def _left(server: VllmServe) -> str:
    left = len(living_in(server.directory))
    return f", {left} processes left" if left else ""


def killed_itself(lab: Lab) -> str:
    with lab.vllm_serve() as server:
        server.wait_until_healthy()
        server.process.kill()
        server.process.wait()
        began = time.monotonic()
        while (left := _names(server)) and time.monotonic() < began + 10:
            time.sleep(0.05)
        if left:
            return f"alive after 10 s: {', '.join(left)}"
        return f"nothing left after {time.monotonic() - began:.1f} s"


def _names(server: VllmServe) -> list[str]:
    names = []
    for process in living_in(server.directory):
        try:
            names.append(process.name())
        except psutil.NoSuchProcess:
            continue
    return names


def port_taken(lab: Lab) -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with lab.vllm_serve(port=port) as server:
            return _end(server)


def _end(server: VllmServe) -> str:
    took, code = exit_of(server, server.began, START_TIMEOUT_S)
    lines = len(server.log.read_text(errors="replace").splitlines())
    return f"exit {_after(took)}, code {code}, {lines} lines, the last: {last_line(server)[:90]}"


def no_model(lab: Lab, directory: Path) -> str:
    with lab.vllm_serve(model=str(directory / "none")) as server:
        return _end(server)


def no_memory(lab: Lab) -> str:
    with lab.vllm_serve(environment={"VLLM_CPU_KVCACHE_SPACE": "100000"}) as server:
        return _end(server)


def broken_model(lab: Lab, variant: str, directory: Path) -> str:
    model = directory / "broken"
    shutil.copytree(lab.model, model)
    BREAKS[variant](model)
    with lab.vllm_serve(model=str(model)) as server:
        return _end(server)


def stalled(lab: Lab) -> str:
    with lab.vllm_serve() as server:
        wait_alive(server, lambda: server.engine_pids("EngineCore"), "EngineCore")
        began = time.monotonic()
        process_of(server, "EngineCore").send_signal(signal.SIGSTOP)
        took, code = exit_of(server, began, STOP_S)
        return f"exit {_after(took)} in {STOP_S:g} s, code {code}"
