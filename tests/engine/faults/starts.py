"""Faults 14 to 18 and 20: starts that cannot succeed, or have to with little."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from harness import START_TIMEOUT_S, Worker, wait_for

from .lab import WITHOUT_PRIVILEGE, Lab, core_of, with_file_limit
from .measure import (
    Measured,
    ask,
    claim_nothing_left,
    control_poller,
    exit_of,
    last_line,
    shared_memory_of,
    wait_alive,
)

QUICK_S = 2.0
PREFIX = "ichat-lifecycle: error: "


def _ends(measured: Measured, server: Worker, codes: tuple[int, ...], timeout_s: float) -> str:
    """The worker ends in time with one of these codes, and nothing is left. Gives its last line."""
    took, code = exit_of(server, server.began, 1.5 * START_TIMEOUT_S)
    measured.within("exit", took, timeout_s)
    measured.number("code", code)
    expected = " or ".join(map(str, codes))
    measured.claim(f"code {expected}", code in codes, f"{code}, {server.tail(3)}")
    claim_nothing_left(measured, server, set())
    line = last_line(server)
    measured.claim("the last line says it", line.startswith(PREFIX), line)
    return line


def _told_in_one_line(measured: Measured, server: Worker, code: int) -> str:
    line = _ends(measured, server, (code,), QUICK_S)
    lines = server.log.read_text().splitlines()
    measured.claim("one line", len(lines) == 1, lines)
    return line


def port_taken(lab: Lab) -> Measured:
    """Somebody listens on the main port."""
    measured = Measured()
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        lab.own("--port", str(taken.getsockname()[1])) as server,
    ):
        line = _told_in_one_line(measured, server, 69)
    holder = f"pid {os.getpid()} "
    measured.claim("the line says who holds it", holder in line, line)
    return measured


def no_model(lab: Lab, variant: str, directory: Path) -> Measured:
    """The model's path is missing, or may not be read."""
    measured = Measured()
    path = directory / "model"
    if variant == "unreadable":
        shutil.copytree(lab.model, path)
        path.chmod(0)
    try:
        with lab.own(model=str(path), prefix=WITHOUT_PRIVILEGE) as server:
            line = _told_in_one_line(measured, server, 66)
    finally:
        if path.exists():
            path.chmod(0o755)
    measured.claim("the line names it", str(path) in line, line)
    return measured


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"{host}:{port}"


def no_memory(lab: Lab) -> Measured:
    """More memory is asked for than there is."""
    measured = Measured()
    environment = {"VLLM_CPU_KVCACHE_SPACE": "100000"}
    # Its end is a matter of milliseconds: it takes longer where a gateway is silent at the goodbye.
    with (
        socket.create_server(("127.0.0.1", 0)) as gateway,
        lab.own("--gateway-address", address(gateway), environment=environment) as server,
    ):
        wait_alive(server, server.state, "the control plane answers")
        with control_poller(server, "/lifecycle", 0.01) as told:
            line = _ends(measured, server, (71,), START_TIMEOUT_S)
        _claim_cause(measured, line, server.log.read_text())
        reasons = [d["reason"] for d in told.documents if d["reason"]]
        shown = bool(reasons) and "emory" in str(reasons[-1]["root_cause"])
        measured.claim("/lifecycle has the cause", shown, reasons[-1:])
    measured.claim("the cause is the engine's own", "emory" in line, line)
    return measured


def _claim_cause(measured: Measured, line: str, log: str) -> None:
    cause = line.partition("cause: ")[2].partition("; hint: ")[0]
    measured.number("cause", cause[:60])
    measured.claim("a cause and a hint", "cause: " in line and "hint: " in line, line)
    measured.claim("not an echo of it", "See root cause above" not in line, line)
    # Scrubbed, shortened and escaped as JSON: its beginning is enough.
    measured.claim("the log has it too", log.count(json.dumps(cause[:40])[1:-1]) > 1, cause)


def _corrupt_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"no tensors here")


def _bad_config(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], ')


def _unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["NobodyKnowsForCausalLM"], "model_type": "nobody_knows"}
    (model / "config.json").write_text(json.dumps(config))


def _missing_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


BREAKS: dict[str, Callable[[Path], None]] = {
    "corrupt weights": _corrupt_weights,
    "bad config.json": _bad_config,
    "unknown architecture": _unknown_architecture,
    "missing tokenizer": _missing_tokenizer,
}


def broken_model(lab: Lab, variant: str, directory: Path) -> Measured:
    """A model that is there and cannot be served."""
    measured = Measured()
    model = directory / "broken"
    shutil.copytree(lab.model, model)
    BREAKS[variant](model)
    with lab.own(model=str(model)) as server:
        line = _ends(measured, server, (66, 70), START_TIMEOUT_S)
        _claim_cause(measured, line, server.log.read_text())
    return measured


# 18 -----------------------------------------------------------------------------------------------

STALL_S = 8.0
STALLS = ("--set", f"start.stall_timeout={STALL_S:g}")
SLOW_FOR_S, STOPPED_S, RUNS_S = 24.0, 2.0, 1.0


def stalled(lab: Lab, variant: str) -> Measured:
    """EngineCore is stopped during the load: for ever, or again and again so that it is slow."""
    measured = Measured()
    with lab.own(*STALLS) as server:
        wait_alive(server, lambda: server.engine_pids("EngineCore"), "EngineCore")
        shared = shared_memory_of(server)
        began = time.monotonic()
        core = core_of(server)
        if variant == "slow":
            _slow_down(server)
            server.wait_for_state("READY")
            measured.number("slowed for", SLOW_FOR_S)
            measured.number("READY", time.monotonic() - server.began)
            measured.claim("a slow load is no stall", ask(server.main).status_code == 200)
            return measured
        core.send_signal(signal.SIGSTOP)
        took, code = exit_of(server, began, STALL_S + 30)
        measured.within("exit", took, STALL_S + 10)
        measured.number("code", code)
        measured.claim("code 70", code == 70, code)
        line = last_line(server)
        phase = any(word in line for word in ("starting_engine", "starting engine", "loading"))
        measured.claim("the last line has the phase", phase, line)
        measured.claim("and the cause", "cause: " in line or "hint: " in line, line)
        claim_nothing_left(measured, server, shared)
    return measured


def _slow_down(server: Worker) -> None:
    until = time.monotonic() + SLOW_FOR_S
    core = core_of(server)
    while time.monotonic() < until and core.is_running():
        core.send_signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        core.send_signal(signal.SIGCONT)
        time.sleep(RUNS_S)


# 20 -----------------------------------------------------------------------------------------------

FILES = 64
END_S = 60.0


def few_files(lab: Lab) -> Measured:
    """RLIMIT_NOFILE of 64, hard."""
    measured = Measured()
    with lab.own(prefix=with_file_limit(FILES)) as server:
        began = time.monotonic()
        while server.process.poll() is None and time.monotonic() < began + START_TIMEOUT_S:
            if server.state() == "READY":
                break
            time.sleep(0.1)
        log = server.log.read_text()
        if server.process.poll() is None:
            measured.number("outcome", server.state())
            measured.claim("READY with a warning", _warns(log, "files"), server.tail(3))
            _claim_survives_connections(measured, server)
            _claim_stop(measured, server)
        else:
            measured.number("outcome", f"exit {server.process.returncode}")
            line = last_line(server)
            measured.number("last line", line[:100])
            measured.claim("code 71", server.process.returncode == 71, server.process.returncode)
            measured.claim("a clear error", "files" in line and "hint: " in line, line)
        claim_nothing_left(measured, server, set())
    return measured


def _warns(log: str, word: str) -> bool:
    return any('"warning"' in line and word in line for line in log.splitlines())


def _claim_survives_connections(measured: Measured, server: Worker) -> None:
    """More connections than descriptors: some wait or fail, and then it goes on."""
    clients: list[socket.socket] = []
    try:
        for _ in range(FILES):
            clients.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
    except OSError:
        pass  # the backlog is full, which is as good
    finally:
        for client in clients:
            client.close()
    time.sleep(1)
    measured.claim("it answers after too many connections", ask(server.main).is_success)


def _claim_stop(measured: Measured, server: Worker) -> None:
    began = time.monotonic()
    server.signal()
    took, code = exit_of(server, began, END_S)
    measured.number("exit", took)
    measured.claim("code 0", code == 0, code)


def full_disk(lab: Lab) -> Measured:
    """The log cannot be written: /dev/full is what a full disk is."""
    measured = Measured()
    with lab.own(stderr=Path("/dev/full")) as server:
        server.wait_for_state("READY")
        measured.number("outcome", "READY")
        measured.claim("it serves", ask(server.main).status_code == httpx.codes.OK)
        _claim_stop(measured, server)
        claim_nothing_left(measured, server, set())
    return measured


def no_cache(lab: Lab, directory: Path) -> Measured:
    """No cache directory may be written."""
    measured = Measured()
    cache = directory / "cache"
    cache.mkdir()
    cache.chmod(0o555)
    environment = {"XDG_CACHE_HOME": str(cache), "VLLM_CACHE_ROOT": str(cache / "vllm")}
    with lab.own(prefix=WITHOUT_PRIVILEGE, environment=environment) as server:
        took, code = None, None
        wait_for(
            lambda: server.process.poll() is not None or server.state() == "READY", "an outcome"
        )
        if server.process.poll() is None:
            measured.number("outcome", "READY")
            measured.claim("it serves", ask(server.main).status_code == httpx.codes.OK)
            log = server.log.read_text()
            measured.claim("it warns", _warns(log, str(cache)), server.tail(5))
            _claim_stop(measured, server)
        else:
            took, code = exit_of(server, server.began, 1)
            measured.number("outcome", f"exit {code} after {took}")
            line = last_line(server)
            measured.claim("a clear error", str(cache) in line and "hint: " in line, line)
        claim_nothing_left(measured, server, set())
    return measured
