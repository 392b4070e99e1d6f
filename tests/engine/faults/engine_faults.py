"""Faults 1 to 7: the engine dies, hangs, pauses, or is merely busy."""

from __future__ import annotations

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from harness import Worker

from .lab import QUICK_TO_GIVE_UP, SEQUENCES, Lab, process_of
from .measure import (
    COMPLETE,
    ERROR,
    Measured,
    Poller,
    Streams,
    all_are,
    ask,
    claim_nothing_left,
    completion,
    control_poller,
    exit_of,
    last_line,
    long_prompt,
    not_200,
    outcomes,
    shared_memory_of,
)

IN_PLACE, EXIT_75 = "in place", "exit 75"
RECOVERY_S = 240.0  # a new engine's start, on a machine that others use too
HUNG_END_S = 60.0  # two misses, and the way out
EXIT_75_CODE = 75
OF_A_START = 0.6
READY_AGAIN = "READY again"


def killed(lab: Lab, which: str, limit_s: float, variant: str) -> Measured:
    """kill -9 of an engine's process while four streams run."""
    if variant == IN_PLACE:
        measured = _killed(lab.shared(), which, limit_s, variant)
        _claim_quicker_than_a_start(measured, lab)
        return measured
    with lab.own_ready("--set", "restart.max=0") as server:
        return _killed(server, which, limit_s, variant)


def _killed(server: Worker, which: str, limit_s: float, variant: str) -> Measured:
    measured = Measured()
    before = _restarts(server)
    shared = shared_memory_of(server)
    with Poller(f"{server.main}/health", 0.05) as port:
        with control_poller(server) as poller, Streams(server.main) as streams:
            victim = process_of(server, which)
            began = time.monotonic()
            victim.kill()
            measured.within("/readyz 503", poller.wait_first(not_200, began, 30), limit_s)
            ended = streams.ended(30)
        measured.number("streams", outcomes(ended))
        measured.number("streams ended", max(s.ended_at for s in ended) - began)
        measured.claim("every stream ends with an explicit error", all_are(ended, ERROR), ended)
        if variant == IN_PLACE:
            _claim_recovery(measured, server, before, began)
            refused = [at for at, status in port.answers if status is None]
            measured.claim("the port always answers", not refused, f"{len(refused)} times not")
            return measured
    _claim_exit_75(measured, server, began, shared)
    return measured


def _claim_quicker_than_a_start(measured: Measured, lab: Lab) -> None:
    """Only where a cold start of `vllm serve` was measured in the same run."""
    took = measured.numbers[READY_AGAIN]
    if lab.vllm_serve_start_s is not None and isinstance(took, float):
        ratio = took / lab.vllm_serve_start_s
        measured.number("of a cold vllm serve", ratio)
        what = f"READY again in {OF_A_START} of the time of a cold vllm serve"
        measured.claim(what, ratio <= OF_A_START, f"{ratio:.2f}")


def stopped(lab: Lab, which: str, variant: str, *, idle: bool = False) -> Measured:
    """kill -STOP of an engine's process, for ever."""
    if variant == IN_PLACE:
        return _stopped(lab.shared(), which, variant, idle)
    with lab.own_ready("--set", "restart.max=0", *QUICK_TO_GIVE_UP) as server:
        return _stopped(server, which, variant, idle)


def _stopped(server: Worker, which: str, variant: str, idle: bool) -> Measured:
    measured = Measured()
    limit_s = 30.0 if idle else 15.0
    before = _restarts(server)
    shared = shared_memory_of(server)
    with (
        control_poller(server) as poller,
        control_poller(server, "/lifecycle", 0.05) as told,
        Streams(server.main, 0 if idle else 4) as streams,
    ):
        process = process_of(server, which)
        began = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        try:
            noticed = poller.wait_first(not_200, began, limit_s + 30)
            measured.within("/readyz 503", noticed, limit_s)
            if noticed is None:
                return measured
            state = server.state()
            measured.number("state", state)
            measured.claim("DEGRADED", state == "DEGRADED", state)
            _claim_refused(measured, server)
            if not idle:
                ended = streams.ended(HUNG_END_S)
                measured.number("streams", outcomes(ended))
                measured.number("streams ended", max(s.ended_at for s in ended) - began)
                measured.claim(
                    "hung streams end with an explicit error", all_are(ended, ERROR), ended
                )
            if variant == IN_PLACE:
                _claim_recovery(measured, server, before, began)
            else:
                _claim_exit_75(measured, server, began, shared)
        finally:
            # What was given up has been killed meanwhile; what was not goes on.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    _claim_evidence(measured, told.documents)
    return measured


def _claim_refused(measured: Measured, server: Worker) -> None:
    """A new request meanwhile is refused at once, and does not hang."""
    began = time.monotonic()
    try:
        status: Any = ask(server.main, timeout_s=10).status_code
    except httpx.HTTPError as error:
        status = repr(error)
    measured.number("new request", status)
    refused = status == httpx.codes.SERVICE_UNAVAILABLE and time.monotonic() - began < 1
    measured.claim("a new request is refused at once", refused, status)


def _claim_evidence(measured: Measured, documents: list[dict[str, Any]]) -> None:
    paths = [path for document in documents if (path := document.get("evidence"))]
    kept = bool(paths) and Path(paths[-1]).exists()
    measured.claim("evidence is kept", kept, paths[-1:] or "no evidence in /lifecycle")


def _restarts(server: Worker) -> int:
    return int(server.get("/lifecycle").json()["restarts"])


def _claim_recovery(measured: Measured, server: Worker, before: int, began: float) -> None:
    """READY again in the same process, which answers as before."""
    deadline = began + RECOVERY_S
    document: dict[str, Any] = {}
    while time.monotonic() < deadline and server.process.poll() is None:
        document = server.get("/lifecycle").json()
        if document["ready"] and document["restarts"] == before + 1:
            break
        time.sleep(0.05)
    recovered = bool(document.get("ready")) and document["restarts"] == before + 1
    measured.number(READY_AGAIN, time.monotonic() - began if recovered else None)
    measured.claim("recovery in place", recovered, server.process.returncode or document)
    if recovered:
        measured.claim("it answers again", ask(server.main).status_code == httpx.codes.OK)


def _claim_exit_75(measured: Measured, server: Worker, began: float, shared: set[Path]) -> None:
    took, code = exit_of(server, began, HUNG_END_S)
    measured.number("exit", took)
    measured.number("code", code)
    measured.claim("exit 75", code == EXIT_75_CODE, code)
    line = last_line(server)
    measured.claim("the last line says why", line.startswith("ichat-lifecycle: error: "), line)
    claim_nothing_left(measured, server, shared)


# 6 and 7 ------------------------------------------------------------------------------------------

PAUSE_S = 4.0


def paused(lab: Lab, which: str) -> Measured:
    """kill -STOP for PAUSE_S, then CONT, with four streams and a fifth request."""
    measured = Measured()
    server = lab.shared()
    seq, restarts = server.get("/lifecycle").json()["seq"], _restarts(server)
    with Streams(server.main) as streams, ThreadPoolExecutor(1) as pool:
        process = process_of(server, which)
        process.send_signal(signal.SIGSTOP)
        try:
            late = pool.submit(ask, server.main)
            time.sleep(PAUSE_S)
        finally:
            process.send_signal(signal.SIGCONT)
        ended = streams.ended(120)
        status = late.result().status_code
    server.wait_for_state("READY", 60)
    triggers = _triggers_since(server, seq)
    measured.number("transitions", " ".join(triggers) or "none")
    measured.number("streams", outcomes(ended))
    measured.number("request in the pause", status)
    measured.claim("at most DEGRADED and back", triggers in ([], ["degrade", "recover"]), triggers)
    measured.claim("no restart", _restarts(server) == restarts)
    measured.claim("no stream lost", all_are(ended, COMPLETE), ended)
    measured.claim("no request lost", status == httpx.codes.OK, status)
    return measured


def _triggers_since(server: Worker, seq: int) -> list[str]:
    history = server.get(f"/lifecycle/history?after={seq}").json()
    return [transition["trigger"] for transition in history["transitions"]]


PROMPT_TOKENS, ANSWER_TOKENS = 1900, 100


def saturated(lab: Lab) -> Measured:
    """All sequences taken and as many requests waiting, each with the longest prompt."""
    measured = Measured()
    server = lab.shared()
    seq = server.get("/lifecycle").json()["seq"]
    until = time.monotonic() + lab.saturate_s
    with (
        control_poller(server, interval_s=0.1) as poller,
        control_poller(server, "/lifecycle", 0.5) as told,
        ThreadPoolExecutor(2 * SEQUENCES) as pool,
    ):
        clients = [pool.submit(_keep_asking, server.main, until) for _ in range(2 * SEQUENCES)]
        statuses = [status for client in clients for status in client.result()]
    not_ready = [status for _, status in poller.answers if status != httpx.codes.OK]
    verdicts = [d["last_verdict"] for d in told.documents if d["last_verdict"]]
    missed = [verdict for verdict in verdicts if verdict["kind"] == "missed"]
    failed = [status for status in statuses if status != httpx.codes.OK]
    measured.number("seconds", lab.saturate_s)
    measured.number("requests", len(statuses))
    measured.number("in flight at most", max(d["in_flight"] for d in told.documents))
    measured.number("worst /readyz", max(poller.waits_s))
    measured.number("missed verdicts", len(missed))
    measured.claim("saturated", any(d["in_flight"] > SEQUENCES for d in told.documents))
    measured.claim("not one false verdict", not missed, missed)
    measured.claim("/readyz 200 throughout", not not_ready, not_ready)
    measured.claim("no transition", not _triggers_since(server, seq), _triggers_since(server, seq))
    measured.claim("every request answered with 200", not failed, failed)
    return measured


def _keep_asking(main: str, until: float) -> list[int]:
    statuses = []
    with httpx.Client(timeout=300) as client:
        while time.monotonic() < until:
            body = completion(ANSWER_TOKENS, long_prompt(PROMPT_TOKENS))
            statuses.append(client.post(f"{main}/v1/completions", json=body).status_code)
    return statuses
