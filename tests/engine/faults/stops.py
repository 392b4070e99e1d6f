"""Faults 8 to 13, and 19: SIGTERM in every situation, kill -9 of ourselves, a blocked loop."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from harness import Worker

from .lab import Lab, python_path
from .measure import (
    COMPLETE,
    ERROR,
    Measured,
    Streams,
    all_are,
    claim_nothing_left,
    completion,
    control_poller,
    exit_of,
    is_503,
    not_200,
    outcomes,
    shared_memory_of,
    wait_alive,
)

SLOWER_AT_MOST = 1.5
STOP_TIMEOUT_S = 60.0
FORCED_CODE = 124


def idle(lab: Lab) -> Measured:
    """SIGTERM with nothing in flight."""
    measured = Measured()
    with lab.own_ready() as server:
        shared = shared_memory_of(server)
        began = time.monotonic()
        server.signal()
        took, code = exit_of(server, began, STOP_TIMEOUT_S)
        measured.within("exit", took, SLOWER_AT_MOST * lab.vllm_serve_stop_s)
        _claim_code(measured, code, 0)
        claim_nothing_left(measured, server, shared)
    return measured


def _claim_code(measured: Measured, code: int | None, expected: int) -> None:
    measured.number("code", code)
    measured.claim(f"code {expected}", code == expected, code)


def with_streams(lab: Lab) -> Measured:
    """SIGTERM while four streams run that end in time."""
    measured = Measured()
    with lab.used_up() as server:
        shared = shared_memory_of(server)
        kept = _kept_alive(server)
        with control_poller(server) as poller, Streams(server.main, tokens=400) as streams:
            began = time.monotonic()
            server.signal()
            measured.within("/readyz 503", poller.wait_first(not_200, began, 5), 0.05)
            running = streams.running
            _claim_503(measured, "new", _connection(server))
            _claim_503(measured, "kept-alive", kept)
            measured.claim("the streams were still running", running > 0)
            ended = streams.ended(STOP_TIMEOUT_S)
        took, code = exit_of(server, began, STOP_TIMEOUT_S)
        measured.number("streams", outcomes(ended))
        measured.number("exit", took)
        measured.claim("4 of 4 streams complete", all_are(ended, COMPLETE), ended)
        _claim_code(measured, code, 0)
        claim_nothing_left(measured, server, shared)
    return measured


def _connection(server: Worker) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)


def _kept_alive(server: Worker) -> http.client.HTTPConnection:
    """A connection that has had an answer, and waits for more to do."""
    connection = _connection(server)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().read()
    return connection


def _claim_503(measured: Measured, kind: str, connection: http.client.HTTPConnection) -> None:
    """A request on this connection gets 503 with Retry-After."""
    try:
        body = httpx.Request("POST", "http://x", json=completion()).content
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        seen: Any = answer.status, answer.getheader("retry-after")
    except (OSError, http.client.HTTPException) as error:
        seen = repr(error), None
    finally:
        connection.close()
    refused = seen[0] == httpx.codes.SERVICE_UNAVAILABLE and bool(seen[1])
    measured.number(f"on a {kind} connection", seen[0])
    measured.claim(f"503 with Retry-After on a {kind} connection", refused, seen)


DRAIN_S = 1.0


def past_the_drain(lab: Lab) -> Measured:
    """SIGTERM while streams run that are longer than the drain's deadline."""
    measured = Measured()
    with lab.own_ready("--set", f"stop.drain={DRAIN_S:g}") as server:
        shared = shared_memory_of(server)
        with Streams(server.main, 8) as streams:
            began = time.monotonic()
            server.signal()
            ended = streams.ended(STOP_TIMEOUT_S)
        took, code = exit_of(server, began, STOP_TIMEOUT_S)
        times = [stream.ended_at - began for stream in ended]
        measured.number("streams", outcomes(ended))
        measured.number("first ended", min(times))
        measured.within("last ended", max(times), DRAIN_S + 1)
        measured.claim("not cut before the deadline", min(times) >= DRAIN_S - 0.05, min(times))
        measured.claim("each ends with an explicit error", all_are(ended, ERROR), ended)
        measured.number("exit", took)
        _claim_code(measured, code, 0)
        claim_nothing_left(measured, server, shared)
    return measured


def second_signal(lab: Lab) -> Measured:
    """A second SIGTERM while the first one's drain lasts."""
    measured = Measured()
    with lab.own_ready("--set", "stop.drain=60") as server:
        shared = shared_memory_of(server)
        with Streams(server.main, 8) as streams:
            server.signal()
            time.sleep(0.3)
            measured.claim("it was draining", server.process.poll() is None and streams.running > 0)
            began = time.monotonic()
            server.signal()
            ended = streams.ended(STOP_TIMEOUT_S)
            took, code = exit_of(server, began, STOP_TIMEOUT_S)
        measured.within("out", took, 2)
        measured.number("streams", outcomes(ended))
        measured.claim("each stream ends with an explicit error", all_are(ended, ERROR), ended)
        _claim_code(measured, code, 0)
        claim_nothing_left(measured, server, shared)
    return measured


# 12 and 13 ----------------------------------------------------------------------------------------


def _is_warming_up(server: Worker) -> bool:
    return server.state() == "SERVING" or server.phase() == "warm_up"


MOMENTS: dict[str, Callable[[Worker], bool]] = {
    "importing": lambda server: server.phase() == "importing",
    "EngineCore starting": lambda server: bool(server.engine_pids("EngineCore")),
    "weights loading": lambda server: server.phase() == "loading_weights",
    "warm-up": _is_warming_up,
}
# So long that the moment cannot be missed.
LONG_WARM_UP = ("--set", "warm_up.requests=50", "--set", "warm_up.max_tokens=500")


def during_start(lab: Lab, moment: str) -> Measured:
    """SIGTERM at a moment of a start."""
    measured = Measured()
    with lab.own(*LONG_WARM_UP) as server:
        wait_alive(server, lambda: MOMENTS[moment](server), moment)
        shared = shared_memory_of(server)
        began = time.monotonic()
        server.signal()
        took, code = exit_of(server, began, STOP_TIMEOUT_S)
        measured.within("out", took, 5)
        _claim_code(measured, code, 0)
        claim_nothing_left(measured, server, shared)
    return measured


def killed_ourselves(lab: Lab, moment: str) -> Measured:
    """kill -9 of our own process."""
    measured = Measured()
    with lab.own() as server:
        if moment == "READY":
            server.wait_for_state("READY")
        else:
            wait_alive(server, lambda: len(_engine(server)) > 1, "the engine's processes")
        shared = shared_memory_of(server)
        measured.number("engine processes", len(_engine(server)))
        measured.number("shared memory", len(shared))
        server.process.kill()
        server.process.wait()
        claim_nothing_left(measured, server, shared)
    return measured


def _engine(server: Worker) -> list[int]:
    """EngineCore and what it has started."""
    cores = server.engine_pids("EngineCore")
    return [p.pid for core in cores for p in (core, *core.children(recursive=True))]


# 19 -----------------------------------------------------------------------------------------------

BLOCKED_S = 60
BLOCKER = f"""
import time

class Blocker:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope.get("path") == "/v1/block":
            time.sleep({BLOCKED_S})
        await self.app(scope, receive, send)
"""
# Shorter than the default, so that the last resort comes while the loop is still blocked.
SHORT_STOP = ("--set", "stop.drain=1")
NOTICED_S = 10.0


def loop_blocked(lab: Lab, directory: Path) -> Measured:
    """A middleware of the user's blocks the event loop."""
    measured = Measured()
    (directory / "blocking_middleware.py").write_text(BLOCKER)
    flags = ("--middleware", "blocking_middleware.Blocker", *SHORT_STOP)
    with lab.own_ready(*flags, environment=python_path(directory)) as server:
        shared = shared_memory_of(server)
        bound_s = server.get("/lifecycle").json()["stop_bound_s"]
        with control_poller(server) as poller:
            began = time.monotonic()
            _send_and_leave(server, "/v1/block")
            measured.within("/readyz 503", poller.wait_first(is_503, began, NOTICED_S), NOTICED_S)
            document = server.get("/lifecycle").json()
            where = (document["reason"] or {}).get("root_cause")
            measured.claim("/lifecycle says loop_blocked", _says_blocked(document), document)
            measured.claim("and where", "blocking_middleware.py" in str(where), where)
            measured.number("worst /readyz", max(poller.waits_s))
            measured.claim(
                "the control plane always answers", all(s is not None for _, s in poller.answers)
            )
            asked = time.monotonic()
            server.signal()
            took, code = exit_of(server, asked, BLOCKED_S)
        measured.number("stop bound", bound_s)
        measured.within("exit", took, bound_s + 3)
        _claim_code(measured, code, FORCED_CODE)
        log = server.log.read_text()
        measured.claim("the log has the stack that blocked", "blocking_middleware.py" in log)
        claim_nothing_left(measured, server, shared)
    return measured


def _send_and_leave(server: Worker, path: str) -> None:
    """Nobody waits for the answer: a client that has gone makes no difference."""
    connection = _connection(server)
    connection.request("GET", path)
    time.sleep(0.2)
    connection.close()


def _says_blocked(document: dict[str, Any]) -> bool:
    reason, loop = document.get("reason") or {}, document.get("loop") or {}
    return reason.get("code") == "loop_blocked" and loop.get("blocked") is True
