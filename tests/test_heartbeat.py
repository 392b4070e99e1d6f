"""The heartbeat: what is sent when, and that no gateway can do harm. httpx's MockTransport."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import heartbeat
from ichat_lifecycle.adapters.heartbeat import GATEWAY_STATES, Heartbeat, Timing, gateway_url
from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.journal import Progress, Snapshot
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.virtual_time import VirtualTimeLoop, run_virtual

IDENTITY = {
    "worker_id": "w1",
    "model_name": "demo",
    "model_path": "/models/demo",
    "backend": "vllm",
    "host": "127.0.0.1",
    "port": 8001,
}
Answer = Callable[[int], Awaitable[httpx.Response]]
LONG_S = 3600.0  # nothing happens by itself within a test
SHORT_S = 0.01


async def accept(number: int) -> httpx.Response:
    return httpx.Response(200, json={})


async def endless() -> AsyncIterator[bytes]:
    for _ in range(1000):
        yield b"x" * 1000
    raise AssertionError("it is read on and on")


async def hang(number: int) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError("not reached")


class Gateway:
    """Records what it is sent; `answer` is asked with the number of the request, from 1."""

    def __init__(self, answer: Answer = accept) -> None:
        self.answer = answer
        self.requests: list[httpx.Request] = []
        self.under_way = 0
        self.most_under_way = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            await asyncio.sleep(0)
            return await self.answer(len(self.requests))
        finally:
            self.under_way -= 1

    @property
    def states(self) -> list[str]:
        return [json.loads(request.content)["state"] for request in self.requests]

    async def has(self, count: int) -> None:
        await until(lambda: len(self.requests) >= count and not self.under_way)


class Transport(httpx.MockTransport):
    """Knows how often it was closed."""

    closed = 0

    async def aclose(self) -> None:
        self.closed += 1


class Worker:
    """The part of a worker that the heartbeat sees."""

    def __init__(self, gateway: Gateway, **options: Any) -> None:
        self.snapshot = Snapshot(State.PARSED, datetime.now(UTC), 0.0)
        self.rejections: list[str] = []
        self.transport = Transport(gateway)
        self.heart = Heartbeat(
            options.pop("address", "gateway:4000"),
            options.pop("identity", lambda: IDENTITY),
            lambda: self.snapshot,
            options.pop("on_rejected", self.rejections.append),
            look=options.pop("look", None),
            transport=self.transport,
            timing=Timing(**{"interval_s": LONG_S, "timeout_s": LONG_S, **options}),
        )

    def move(self, state: State) -> None:
        self.snapshot = replace(self.snapshot, state=state)
        self.heart.changed(self.snapshot)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def settled() -> None:
    """Long enough for anything that is going to happen without a timer to have happened."""
    for _ in range(100):
        await asyncio.sleep(0)


def live(life: Callable[[], Awaitable[None]]) -> list[Any]:
    """Runs a test's life and returns its log; a task that is left over fails it."""

    async def main() -> None:
        async with asyncio.timeout(30):
            await life()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with capture_logs() as logs:
        asyncio.run(main())
    return logs


def test_the_first_beat_registers() -> None:
    """Sent by start() at once, to the address and with the fields of the gateway's contract."""
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await gateway.has(1)
        await worker.heart.stop()

    assert live(life) == []
    request = gateway.requests[0]
    assert (request.method, str(request.url)) == (
        "POST",
        "http://gateway:4000/v1/workers/heartbeat",
    )
    assert json.loads(request.content) == {**IDENTITY, "state": "initializing"}


def test_each_state_has_the_gateways_word() -> None:
    """The mapping of the contract, for every state there is."""
    ready, ending = {State.READY}, {State.STOPPING, State.STOPPED}
    assert set(GATEWAY_STATES) == set(State)
    for state, word in GATEWAY_STATES.items():
        expected = "ready" if state in ready else "terminating" if state in ending else None
        assert word == (expected or "initializing")


def test_a_successor_is_silent_until_it_is_ready_and_then_beats_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one before has the same worker_id, and says goodbye meanwhile."""
    monkeypatch.setattr(heartbeat, "EAGER_S", SHORT_S)
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway, succeeds_s=LONG_S)
        await worker.heart.start()
        worker.move(State.BOUND)
        await settled()
        assert gateway.states == []
        worker.move(State.READY)
        await gateway.has(3)
        worker.move(State.STOPPING)
        await worker.heart.stop()

    live(life)
    assert set(gateway.states[:3]) == {"ready"}
    assert gateway.states[-1] == "terminating"


def test_a_successor_that_never_was_ready_says_nothing() -> None:
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway, succeeds_s=LONG_S)
        await worker.heart.start()
        worker.move(State.STOPPING)
        await settled()
        await worker.heart.stop()

    live(life)
    assert gateway.states == []


def test_once_it_has_succeeded_it_beats_as_seldom_as_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "EAGER_S", LONG_S)
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway, succeeds_s=SHORT_S, interval_s=SHORT_S)
        worker.snapshot = replace(worker.snapshot, state=State.READY)
        await worker.heart.start()
        await gateway.has(3)
        await worker.heart.stop()

    live(life)


def test_a_change_of_state_beats_at_once() -> None:
    """Long before the interval is over, and other news does not."""
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await gateway.has(1)
        for count, state in enumerate((State.BOUND, State.READY, State.DEGRADED), start=2):
            worker.move(state)
            await gateway.has(count)
        worker.snapshot = replace(worker.snapshot, progress=Progress("loading"))
        worker.heart.changed()
        await settled()
        assert len(gateway.requests) == 4
        await worker.heart.stop()

    live(life)
    still_degraded = "initializing"  # said once more by stop()
    assert gateway.states == [*("initializing",) * 2, "ready", "initializing", still_degraded]


def test_changes_come_together_and_never_two_requests_at_once() -> None:
    """While a slow gateway thinks, changes wait for one beat with the newest state."""
    go = asyncio.Event()

    async def slow_at_first(number: int) -> httpx.Response:
        if number == 1:
            await go.wait()
        return httpx.Response(200)

    gateway = Gateway(slow_at_first)

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await until(lambda: gateway.under_way == 1)
        for state in (State.BOUND, State.ENGINE_UP, State.SERVING, State.READY):
            worker.move(state)
            await settled()
        assert len(gateway.requests) == 1
        go.set()
        await gateway.has(2)
        await settled()
        assert gateway.states == ["initializing", "ready"]
        await worker.heart.stop()

    live(life)
    assert gateway.most_under_way == 1


def test_it_beats_at_every_interval() -> None:
    """Without any change."""
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway, interval_s=SHORT_S)
        await worker.heart.start()
        await gateway.has(4)
        await worker.heart.stop()

    live(life)
    assert gateway.most_under_way == 1


REDIRECT = {"location": "https://user:word@gw.corp/v1/workers/heartbeat?state=5ecret#x"}
ANSWERS: dict[str, Callable[[], httpx.Response]] = {
    "500": lambda: httpx.Response(500),
    "redirect": lambda: httpx.Response(307, headers=REDIRECT),
    "endless": lambda: httpx.Response(500, content=endless()),
    "portal": lambda: httpx.Response(200, html="<h1>Log in</h1>"),
    "portal's 409": lambda: httpx.Response(409, html="<h1>Busy</h1>"),
}


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("refused", "refused"),
        ("silent", "ReadError"),
        ("500", "answered 500"),
        ("redirect", "answered 307; it is at https://***@gw.corp/v1/workers/heartbeat"),
        ("endless", "answered 500"),
        ("portal", "answered 200 with a page (text/html): is this the Gateway?"),
        ("portal's 409", "answered 409 with a page (text/html)"),
        ("hang", "no answer within 0.01 s"),
        ("identity", "no port yet"),
    ],
)
def test_a_dead_gateway_never_harms(failure: str, words: str) -> None:
    """Each kind of failure is logged once per run of failures, and so is its end."""
    broken = True

    async def answer(number: int) -> httpx.Response:
        match failure if broken else "":
            case "refused":
                raise httpx.ConnectError("refused")
            case "silent":
                raise httpx.ReadError("")
            case "hang":
                return await hang(number)
        return ANSWERS[failure]() if broken and failure in ANSWERS else httpx.Response(200)

    gateway = Gateway(answer)
    asked = 0

    def identity() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if broken and failure == "identity":
            raise LookupError("no port yet")
        return dict(IDENTITY)

    async def life() -> None:
        nonlocal broken
        worker = Worker(gateway, identity=identity, interval_s=SHORT_S, timeout_s=SHORT_S)
        await worker.heart.start()
        for runs in (1, 2):
            broken = True
            start = asked
            await until(lambda start=start: asked >= start + 4)  # type: ignore[misc]
            broken = False
            start = len(gateway.requests)
            await gateway.has(start + 3)
            assert worker.rejections == [], runs
        await worker.heart.stop()

    logs = live(life)
    assert [log["event"] for log in logs] == ["gateway_unreachable", "gateway_back"] * 2
    assert all(log["gateway"] == "http://gateway:4000" for log in logs)
    assert words in logs[0]["error"]


def test_a_409_of_a_worker_that_was_killed_a_moment_ago_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Gateway forgets it after its own time-out; until then there are more tries, and often."""
    monkeypatch.setattr(heartbeat, "CONFLICT_RETRY_S", SHORT_S)

    async def conflict_at_first(number: int) -> httpx.Response:
        return httpx.Response(409 if number <= 3 else 200, text="held by w0")

    gateway = Gateway(conflict_at_first)

    async def life() -> None:
        worker = Worker(gateway, gateway_timeout_s=LONG_S)
        await worker.heart.start()
        await gateway.has(4)
        worker.move(State.READY)
        await gateway.has(5)
        assert worker.rejections == []
        await worker.heart.stop()

    logs = live(life)
    assert gateway.states[4] == "ready"
    assert [log["event"] for log in logs] == ["gateway_conflict", "gateway_back"]
    assert logs[0]["retry_for_s"] == LONG_S * heartbeat.CONFLICT_MARGIN
    assert "held by w0" in logs[0]["error"]


def test_a_stop_in_a_conflict_says_no_goodbye_for_the_other_worker() -> None:
    async def conflict(number: int) -> httpx.Response:
        return httpx.Response(409)

    gateway = Gateway(conflict)

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await gateway.has(1)
        await settled()
        worker.snapshot = replace(worker.snapshot, state=State.STOPPING)
        await worker.heart.stop()
        assert worker.rejections == []

    live(life)
    assert gateway.states == ["initializing"]


def test_what_is_looked_for_before_a_beat_may_fail() -> None:
    """Then the beat fails, and the next one looks again."""
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise OSError("no route")

    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway, look=look, interval_s=SHORT_S)
        await worker.heart.start()
        await gateway.has(2)
        await worker.heart.stop()

    assert [log["event"] for log in live(life)] == ["gateway_unreachable", "gateway_back"]


def test_a_409_that_lasts_rejects_once() -> None:
    """Another live worker serves the name: the message says so, and the heartbeat has ended."""

    async def conflict(number: int) -> httpx.Response:
        if number == 1:
            raise httpx.ConnectError("refused")  # a gateway that was down has registered nobody
        return httpx.Response(409, text="held by\n w2")

    gateway = Gateway(conflict)

    async def life() -> None:
        worker = Worker(gateway, interval_s=SHORT_S, gateway_timeout_s=5 * SHORT_S)
        await worker.heart.start()
        await until(lambda: bool(worker.rejections))
        count = len(gateway.requests)
        worker.move(State.STOPPING)
        await settled()
        await worker.heart.stop()
        assert len(worker.rejections) == 1
        assert "another live worker" in worker.rejections[0]
        assert "held by w2" in worker.rejections[0]
        assert "http://gateway:4000" in worker.rejections[0]
        assert len(gateway.requests) == count, "nothing is sent in the name of another worker"

    live(life)
    assert len(gateway.requests) > 2


def test_what_on_rejected_raises_is_logged() -> None:
    """It is not ours, and must not end in an unretrieved exception."""

    def explode(message: str) -> None:
        raise RuntimeError(message)

    async def conflict(number: int) -> httpx.Response:
        return httpx.Response(409)

    gateway = Gateway(conflict)

    async def life() -> None:
        worker = Worker(gateway, on_rejected=explode, gateway_timeout_s=0)
        await worker.heart.start()
        await gateway.has(1)
        await settled()
        await worker.heart.stop()

    assert [log["event"] for log in live(life)] == ["gateway_conflict", "on_rejected_failed"]


def test_a_409_after_registration_is_only_logged() -> None:
    """Once: a worker that serves is not ended by a gateway's change of mind."""

    async def conflict_later(number: int) -> httpx.Response:
        return httpx.Response(200 if number == 1 else 409)

    gateway = Gateway(conflict_later)

    async def life() -> None:
        worker = Worker(gateway, interval_s=SHORT_S)
        await worker.heart.start()
        await gateway.has(5)
        await worker.heart.stop()
        assert worker.rejections == []

    assert [log["event"] for log in live(life)] == ["gateway_conflict"]


def test_stop_says_goodbye_once() -> None:
    """With the state as it is then; after it nothing more is sent, and nothing is left."""
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway, interval_s=SHORT_S)
        await worker.heart.start()
        await gateway.has(1)
        worker.snapshot = replace(worker.snapshot, state=State.STOPPING)
        await worker.heart.stop()
        count = len(gateway.requests)
        assert gateway.states[-1] == "terminating"
        assert worker.transport.closed == 1
        await worker.heart.stop()
        worker.heart.changed()
        await settled()
        assert len(gateway.requests) == count

    assert live(life) == []


def test_stop_gives_a_hanging_beat_up_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never two at a time; and a gateway that hangs for good does not hold the stop up."""
    assert Settings().stop.companion > heartbeat.LAST_BEAT_TIMEOUT_S
    monkeypatch.setattr(heartbeat, "LAST_BEAT_TIMEOUT_S", SHORT_S)
    gateway = Gateway(hang)

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await until(lambda: gateway.under_way == 1)
        worker.move(State.STOPPING)
        await worker.heart.stop()

    logs = live(life)
    assert gateway.states == ["initializing", "terminating"]
    assert gateway.most_under_way == 1
    assert [log["event"] for log in logs] == ["gateway_unreachable"]


def test_a_short_timeout_bounds_the_last_beat_too() -> None:
    """The smaller of the two deadlines counts."""
    gateway = Gateway(hang)

    async def life() -> None:
        worker = Worker(gateway, timeout_s=SHORT_S)
        await worker.heart.start()
        await until(lambda: gateway.under_way == 1)
        async with asyncio.timeout(0.5):
            await worker.heart.stop()

    live(life)


def test_a_409_to_the_last_beat_rejects_nobody() -> None:
    """A worker that ends anyway has no error of its own to report."""

    async def conflict(number: int) -> httpx.Response:
        if number == 1:
            return await hang(number)
        return httpx.Response(409)

    gateway = Gateway(conflict)

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await until(lambda: gateway.under_way == 1)
        await worker.heart.stop()
        assert worker.rejections == []

    live(life)
    assert len(gateway.requests) == 2


def test_a_cancelled_stop_leaves_nothing() -> None:
    """The lifecycle's own deadline may cut it off."""
    gateway = Gateway(hang)

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await until(lambda: gateway.under_way == 1)
        stopping = asyncio.create_task(worker.heart.stop())
        await until(lambda: len(gateway.requests) == 2)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert worker.transport.closed == 1

    live(life)
    assert gateway.under_way == 0


def test_stop_is_safe_without_a_start() -> None:
    """A release follows a start that failed before it began."""
    gateway = Gateway()

    async def life() -> None:
        worker = Worker(gateway)
        worker.heart.changed()
        await worker.heart.stop()

    live(life)
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gateway:4000", "http://gateway:4000"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("[::1]:4000", "http://[::1]:4000"),
        (" http://g:1/ ", "http://g:1"),
        ("https://g/ichat/", "https://g/ichat"),
    ],
)
def test_gateway_addresses(given: str, expected: str) -> None:
    """With or without a scheme, a trailing slash or a path."""
    assert gateway_url(given) == expected


@pytest.mark.parametrize(
    "given", ["", "http://", "ftp://g", "http://g:port", "unix:///s", "g:99999"]
)
def test_what_is_no_gateway_address(given: str) -> None:
    """Said when it is given, not at every beat."""
    with pytest.raises(ArgumentsError, match="--gateway-address"):
        Worker(Gateway(), address=given)


@pytest.mark.parametrize("interval_s", [0.0, -1.0, 1e-9, math.nan])
def test_what_is_no_interval(interval_s: float) -> None:
    with pytest.raises(ArgumentsError, match=r"at least 0\.01 s"):
        Worker(Gateway(), interval_s=interval_s)


def test_the_gateways_password_stays_out_of_the_log() -> None:
    """It is sent to the gateway, and shown to nobody else."""

    async def fail(number: int) -> httpx.Response:
        return httpx.Response(503)

    gateway = Gateway(fail)

    async def life() -> None:
        worker = Worker(gateway, address="http://user:word@g:1")
        await worker.heart.start()
        await gateway.has(1)
        await worker.heart.stop()

    logs = live(life)
    assert gateway.requests[0].headers["authorization"].startswith("Basic ")
    assert logs
    assert "word" not in repr(logs)


def test_a_heartbeat_that_ends_by_itself_is_logged() -> None:
    """Else the Gateway forgets a worker that serves on, and nobody knows why."""

    async def life() -> None:
        gateway = Gateway()
        worker = Worker(gateway)
        await worker.heart.start()
        await gateway.has(1)
        worker.snapshot = None  # type: ignore[assignment]  # a defect: an AttributeError
        worker.heart.changed()
        task = worker.heart._task
        assert task is not None
        await until(task.done)
        await asyncio.sleep(0)

    with capture_logs() as logs:
        asyncio.run(life())
    (line,) = [line for line in logs if line["event"] == "heartbeat_ended"]
    assert "AttributeError" in line["error"]


def test_one_that_is_stopped_is_not() -> None:
    async def life() -> None:
        gateway = Gateway()
        worker = Worker(gateway)
        await worker.heart.start()
        await gateway.has(1)
        await worker.heart.stop()

    with capture_logs() as logs:
        asyncio.run(life())
    assert logs == []


@pytest.mark.parametrize("location", ["x" * 10_000, "/\x1b[31m\u202e", "http://[", "?a=5ecret"])
def test_where_a_redirect_leads_may_be_anything(location: str) -> None:
    async def redirect(number: int) -> httpx.Response:
        return httpx.Response(308, headers={b"location": location.encode()})

    gateway = Gateway(redirect)

    async def life() -> None:
        worker = Worker(gateway)
        await worker.heart.start()
        await gateway.has(1)
        await worker.heart.stop()

    (log,) = live(life)
    assert log["error"].startswith(("answered 308", "Invalid URL in location"))  # httpx's words
    assert log["error"].isprintable()
    assert "5ecret" not in log["error"]
    assert len(log["error"]) < 300


def test_an_endless_answer_that_registers_is_not_read_to_its_end() -> None:
    async def accept_at_length(number: int) -> httpx.Response:
        return httpx.Response(200, content=endless())

    gateway = Gateway(accept_at_length)

    async def life() -> None:
        worker = Worker(gateway, interval_s=SHORT_S)
        await worker.heart.start()
        await gateway.has(3)
        await worker.heart.stop()

    assert live(life) == []


# --- a process that was frozen: docker pause, a live migration, SIGSTOP


def freeze(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.block(seconds)


def test_a_409_after_a_freeze_is_not_final() -> None:
    """The worker has not asked meanwhile, and the Gateway was frozen with it, perhaps."""

    async def conflict(number: int) -> httpx.Response:
        return httpx.Response(409)

    gateway = Gateway(conflict)

    async def life() -> None:
        worker = Worker(gateway, timeout_s=5.0, gateway_timeout_s=30.0)
        await worker.heart.start()
        await asyncio.sleep(10)
        freeze(3600)
        await asyncio.sleep(25)
        assert worker.rejections == []
        await asyncio.sleep(25)
        assert len(worker.rejections) == 1
        await worker.heart.stop()

    with capture_logs():
        run_virtual(life())


def test_a_409_that_lasts_is_final_after_the_time_that_the_log_told() -> None:
    async def conflict(number: int) -> httpx.Response:
        return httpx.Response(409)

    gateway = Gateway(conflict)

    async def life() -> None:
        worker = Worker(gateway, timeout_s=5.0, gateway_timeout_s=30.0)
        await worker.heart.start()
        await asyncio.sleep(44)
        assert worker.rejections == []
        await asyncio.sleep(4)
        assert len(worker.rejections) == 1
        await worker.heart.stop()

    with capture_logs():
        run_virtual(life())


def test_a_beat_that_was_frozen_says_nothing_of_the_gateway() -> None:
    """It is sent again at once: its answer may have come meanwhile."""

    async def hang_at_first(number: int) -> httpx.Response:
        return await (hang if number == 1 else accept)(number)

    gateway = Gateway(hang_at_first)

    async def life() -> None:
        worker = Worker(gateway, timeout_s=5.0)
        await worker.heart.start()
        await asyncio.sleep(1)
        freeze(3600)
        await asyncio.sleep(1)
        assert gateway.states == ["initializing"] * 2
        await worker.heart.stop()

    with capture_logs() as logs:
        run_virtual(life())
    assert logs == []
