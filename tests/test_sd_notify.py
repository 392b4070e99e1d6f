"""What a service manager is told, read from a real datagram socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import NOON, FakeIdentity, FakeLife
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import sd_notify
from ichat_lifecycle.adapters.sd_notify import LIFECYCLE, SOCKET_VARIABLE, Notifier
from ichat_lifecycle.control.view import summary_document
from ichat_lifecycle.journal import Progress, Reason, Snapshot
from ichat_lifecycle.states import State

DEADLINE_S = 30
MORE_TIME = "EXTEND_TIMEOUT_USEC"


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address.replace("@", "\0", 1))
        self._sock.setblocking(False)

    def heard(self) -> list[dict[str, str]]:
        """The messages so far, as dictionaries."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self._sock.recv(65536).decode()
                messages.append(dict(line.split("=", 1) for line in text.splitlines()))
        return messages

    async def hears(self, name: str) -> dict[str, str]:
        """The next message that has this name in it."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for message in self.heard():
                    if name in message:
                        return message
                await asyncio.sleep(0.01)

    def close(self) -> None:
        self._sock.close()


class Bench:
    def __init__(self, address: str, **environment: str) -> None:
        self.life = FakeLife(Snapshot(State.PARSED, NOON, 0.0))
        self.notifier = Notifier(
            lambda: self.life.snapshot,
            lambda: summary_document(self.life, FakeIdentity()),
            {SOCKET_VARIABLE: address, **environment},
        )

    def now(self, **changes: Any) -> None:
        self.life.snapshot = replace(self.life.snapshot, **changes)
        self.notifier.changed(self.life.snapshot)


def scheduled() -> list[asyncio.TimerHandle]:
    loop: Any = asyncio.get_running_loop()
    return list(loop._scheduled)  # asyncio's own name


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@ichat-test-{os.getpid()}"


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    manager = Manager(address)
    yield manager
    manager.close()


def test_a_whole_life_as_systemd_hears_it(manager: Manager, address: str) -> None:
    bench = Bench(address)
    bench.now(state=State.BOUND)
    bench.now(progress=Progress("loading_weights", 0.43))
    bench.now(state=State.READY)
    hung = Reason("engine_hung", "no token from the\nengine for 10 s")
    bench.now(state=State.DEGRADED, reason=hung)
    bench.now(state=State.STOPPING)
    bench.now(state=State.STOPPED)
    heard = manager.heard()
    for message in heard:
        message.pop(LIFECYCLE)
    more = {MORE_TIME: "30000000"}
    assert heard == [
        {"STATUS": "BOUND: starting", **more},
        {"STATUS": "BOUND: loading_weights, 43%"},
        {"STATUS": "READY", "READY": "1"},
        {"STATUS": "DEGRADED: no token from the engine for 10 s"},
        {"STATUS": "STOPPING: no token from the engine for 10 s", "STOPPING": "1", **more},
        {"STATUS": "STOPPED: no token from the engine for 10 s"},
    ]


def test_a_supervisor_hears_more(manager: Manager, address: str) -> None:
    bench = Bench(address)
    bench.now(state=State.BOUND, progress=Progress("loading_weights", 0.5, expected_s=30.0))
    (message,) = manager.heard()
    assert json.loads(message[LIFECYCLE]) == {
        "state": "BOUND",
        "stop_asked": False,
        "reason": None,
        "phase": "loading_weights",
        "fraction": 0.5,
        "expected_s": 30.0,
        "restarts": 0,
        "start_id": "5eed",
        "control_url": "http://127.0.0.1:18000",
    }


def test_what_is_no_news_is_not_told(manager: Manager, address: str) -> None:
    """The watchdog publishes a snapshot with each verdict."""
    bench = Bench(address)
    bench.now(state=State.READY)
    for seq in range(5):
        bench.now(seq=seq)
    assert len(manager.heard()) == 1


def test_its_beginning_and_its_end_are_told(manager: Manager, address: str) -> None:
    async def main() -> None:
        bench = Bench(address)
        with bench.notifier.beating():
            assert (await manager.hears("STATUS"))["STATUS"] == "PARSED: starting"
            bench.now(state=State.STOPPED)
            assert (await manager.hears("STATUS"))["STATUS"] == "STOPPED"
        assert not any(not timer.cancelled() for timer in scheduled())

    asyncio.run(main())


@pytest.mark.parametrize("pid", [None, str(os.getpid())], ids=["any", "own"])
def test_the_watchdog_is_fed_as_long_as_the_loop_turns(
    manager: Manager, address: str, pid: str | None
) -> None:
    async def main() -> None:
        limit = {"WATCHDOG_USEC": "50000", **({"WATCHDOG_PID": pid} if pid else {})}
        bench = Bench(address, **limit)
        bench.now(state=State.READY)
        with bench.notifier.beating():
            for _ in range(3):
                fed = await manager.hears("WATCHDOG")
                assert fed["WATCHDOG"] == "1"
            assert MORE_TIME not in fed, "READY takes as long as it likes"

    asyncio.run(main())


@pytest.mark.parametrize(
    "limit",
    [
        {},
        {"WATCHDOG_USEC": "10000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
    ],
)
def test_nobody_elses_watchdog_is_fed(
    manager: Manager, address: str, limit: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd_notify, "EXTEND_EVERY_S", 0.01)

    async def main() -> None:
        bench = Bench(address, **limit)
        with bench.notifier.beating():
            told = [await manager.hears(MORE_TIME) for _ in range(3)]
            assert all("WATCHDOG" not in message for message in told)

    asyncio.run(main())


@pytest.mark.parametrize("state", [State.BOUND, State.SERVING, State.STOPPING])
def test_what_takes_long_asks_for_more_time_again_and_again(
    manager: Manager, address: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd_notify, "EXTEND_EVERY_S", 0.01)

    async def main() -> None:
        bench = Bench(address)
        bench.now(state=state)
        with bench.notifier.beating():
            for _ in range(3):
                await manager.hears(MORE_TIME)

    asyncio.run(main())


def test_what_a_busy_manager_cannot_take_is_told_later(manager: Manager, address: str) -> None:
    async def life() -> dict[str, str]:
        bench = Bench(address)
        with bench.notifier.beating():
            _fill(address)
            bench.now(state=State.READY)
            bench.now(state=State.DEGRADED)
            assert not [message for message in manager.heard() if "READY" in message]
            return await manager.hears("READY")

    assert json.loads(asyncio.run(life())[LIFECYCLE])["state"] == "DEGRADED"


def _fill(address: str) -> None:
    """Others have sent as much as fits."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"STATUS=of another", address.replace("@", "\0", 1))


@pytest.mark.parametrize("address", ["", "relative/path", "vsock:2:1234"])
def test_without_a_manager_that_can_be_told_nobody_is(address: str) -> None:
    bench = Bench(address)
    assert not bench.notifier.wanted
    bench.now(state=State.READY)


def test_a_manager_that_is_gone_is_warned_of_once(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    bench = Bench(address)
    assert bench.notifier.wanted
    with capture_logs() as logs:
        bench.now(state=State.BOUND)
        bench.now(state=State.READY)
    assert [(log["event"], log["log_level"]) for log in logs] == [
        ("service_manager_not_told", "warning")
    ]
    manager = Manager(address)
    bench.now(state=State.DEGRADED)
    manager.close()
    with capture_logs() as logs:
        bench.now(state=State.READY)
    assert len(logs) == 1, "it had come back"


def test_what_could_not_be_told_for_a_while_comes_with_what_is_told_next(tmp_path: Path) -> None:
    """Its socket was tidied away, or no descriptor was left."""
    bench = Bench(str(tmp_path / "notify"))
    with capture_logs() as logs:
        bench.now(state=State.READY)
    assert [line["event"] for line in logs] == ["service_manager_not_told"]
    manager = Manager(str(tmp_path / "notify"))
    bench.now(state=State.DEGRADED)
    (message,) = manager.heard()
    manager.close()
    assert message["READY"] == "1"
    assert json.loads(message[LIFECYCLE])["state"] == "DEGRADED"
