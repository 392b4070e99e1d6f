"""The control plane's thread on real sockets: it answers, gives way to nobody, and goes away."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import FakeIdentity, FakeLife
from structlog.testing import capture_logs

from ichat_lifecycle.beacon import CONTROL_THREAD
from ichat_lifecycle.config import Settings
from ichat_lifecycle.control import server as control_server
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.server import CONTROL_LIMITS, ControlPlane
from ichat_lifecycle.errors import (
    AddressError,
    ArgumentsError,
    ExitCode,
    LimitError,
    StartError,
    StopDeadlineError,
)
from ichat_lifecycle.ports import Companion

LOOPBACK = "127.0.0.1"
REQUEST = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSE = b"\r\nConnection: close\r\n\r\n"  # ends the headers in its place


def make_app() -> Any:
    return build_control_app(FakeLife(), FakeIdentity())


def plane(factory: Callable[[], Any] = make_app, **options: Any) -> ControlPlane:
    values = {"host": LOOPBACK, "port": 0, "main_port": None, "announce": lambda url: None}
    return ControlPlane(factory, **{**values, **options})


def while_it_runs(control: ControlPlane, scenario: Callable[[], Awaitable[None]]) -> None:
    """Runs `scenario` between start() and stop()."""

    async def main() -> None:
        try:
            await control.start()
            await scenario()
        finally:
            await control.stop()

    asyncio.run(main())


def get(control: ControlPlane, path: str, method: str = "GET") -> tuple[int, bytes]:
    """One request, blocking: called on a loop, that loop is blocked until it is answered."""
    connection = http.client.HTTPConnection(*control.address, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def dial(control: ControlPlane) -> socket.socket:
    return socket.create_connection(control.address, timeout=10)


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def hung_up(client: socket.socket, within_s: float = 0) -> bool:
    """Whether the other end has closed, without waiting longer than `within_s`."""
    readable, _, _ = select.select([client], [], [], within_s)
    if not readable:
        return False
    try:
        return client.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def left_behind() -> tuple[int, list[str]]:
    """The open file descriptors, and the control plane's threads."""
    threads = [thread.name for thread in threading.enumerate() if "control" in thread.name]
    return len(list(Path("/proc/self/fd").iterdir())), threads


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Invariant of every test here: no thread and no file descriptor outlives a stop."""
    before = left_behind()
    yield
    assert left_behind() == before


# --- answering


def test_it_answers_while_the_callers_loop_is_blocked() -> None:
    control = plane()

    async def scenario() -> None:
        ticks = 0

        def tick() -> None:
            nonlocal ticks
            ticks += 1
            asyncio.get_running_loop().call_soon(tick)

        tick()
        before = ticks
        status, body = get(control, "/lifecycle")  # blocks this loop
        assert ticks == before, "the loop was blocked all the time"
        assert (status, json.loads(body)["state"]) == (200, "READY")

    while_it_runs(control, scenario)


def test_start_and_stop_do_not_block_the_callers_loop() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow_factory() -> Any:
        entered.set()
        leave.wait(10)
        return make_app()

    async def main() -> None:
        control = plane(slow_factory)
        starting = asyncio.create_task(control.start())
        while not entered.is_set():
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not starting.done(), "start() returns once it answers, not before"
        leave.set()
        await starting
        assert get(control, "/livez")[0] == 200
        stopping = asyncio.create_task(control.stop())
        await asyncio.sleep(0)
        assert not stopping.done()
        await stopping

    asyncio.run(main())


def test_it_announces_where_it_answers() -> None:
    said: list[str] = []
    control = plane(announce=said.append)
    companion: Companion = control

    async def scenario() -> None:
        assert companion.name == "control plane"
        host, port = control.address
        assert (host, said) == (LOOPBACK, [f"http://{LOOPBACK}:{port}"])
        assert control.url == said[0]
        assert port > 0

    while_it_runs(control, scenario)


def thread_names() -> set[str]:
    """As the kernel has them."""
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def test_the_kernel_knows_its_thread_by_name() -> None:
    """That is how commands on this machine find it."""
    control = plane()

    async def scenario() -> None:
        assert CONTROL_THREAD in thread_names()

    while_it_runs(control, scenario)


def test_a_head_request_has_no_body() -> None:
    control = plane()

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(REQUEST.replace(b"GET", b"HEAD").replace(b"\r\n\r\n", CLOSE))
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"\r\n\r\n")
        assert b"server:" not in answer.lower(), "which software it is, is nobody's business"

    while_it_runs(control, scenario)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n\r\n",  # TLS
        b"GET /livez HTTP/1.1\r\n\r\n",  # no Host
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000,  # headers without an end
    ],
)
def test_malformed_http_gets_400_and_harms_nobody_else(request_bytes: bytes) -> None:
    control = plane()

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(request_bytes)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        assert get(control, "/livez")[0] == 200

    while_it_runs(control, scenario)


def test_a_refused_body_is_not_read_on_a_real_socket() -> None:
    control = plane()

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(
                b"POST /livez HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 10000000\r\n\r\n"
            )
            answer = read_all(client)  # the server hangs up: the body is not waited for
        assert answer.startswith(b"HTTP/1.1 413 ")

    while_it_runs(control, scenario)


def test_a_failing_route_shows_no_traceback() -> None:
    class Broken(FakeLife):
        def monotonic(self) -> float:
            raise KeyError("inside")

    control = plane(lambda: build_control_app(Broken(), FakeIdentity()))

    async def scenario() -> None:
        status, body = get(control, "/lifecycle")
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
        assert b"inside" not in body

    while_it_runs(control, scenario)


def test_signals_and_the_access_log_of_the_process_stay_as_they_are() -> None:
    access = logging.getLogger("uvicorn.access")
    handler = logging.NullHandler()
    access.addHandler(handler)
    control = plane()

    def state() -> Any:
        signals = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        return signals, access.handlers[:], access.propagate

    async def main() -> None:
        before = state()
        await control.start()
        assert state() == before
        await control.stop()
        assert state() == before

    try:
        asyncio.run(main())
    finally:
        access.removeHandler(handler)


def test_requests_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    control = plane()

    async def scenario() -> None:
        get(control, "/livez")

    with caplog.at_level(logging.DEBUG, "uvicorn.access"):
        while_it_runs(control, scenario)
    assert [record for record in caplog.records if record.name == "uvicorn.access"] == []


# --- connections that do not behave


def test_idle_connections_cannot_lock_a_probe_out() -> None:
    control = plane()

    async def scenario() -> None:
        idle = [dial(control) for _ in range(CONTROL_LIMITS.connections() + 44)]
        try:
            assert get(control, "/livez")[0] == 200
            # The oldest made room, those that came last are still there.
            assert hung_up(idle[0], within_s=10)
            assert not hung_up(idle[-1])
            assert sum(hung_up(client) for client in idle) == 45
        finally:
            for client in idle:
                client.close()

    while_it_runs(control, scenario)


@pytest.fixture
def three_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(CONTROL_LIMITS, connections=lambda: 3)
    monkeypatch.setattr(control_server, "CONTROL_LIMITS", limits)


class HangingApp:
    """An ASGI app whose `/hang` answers once told, and which says when it is there."""

    def __init__(self) -> None:
        self.hanging = threading.Semaphore(0)
        self.release = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["path"] == "/hang":
                self.hanging.release()
                while not self.release.is_set():
                    await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    def hang(self, control: ControlPlane) -> socket.socket:
        client = dial(control)
        client.sendall(REQUEST.replace(b"/livez", b"/hang"))
        assert self.hanging.acquire(timeout=10)
        return client


@pytest.mark.usefixtures("three_connections")
def test_who_waits_for_an_answer_makes_room_last() -> None:
    app = HangingApp()
    control = plane(lambda: app)

    async def scenario() -> None:
        with app.hang(control) as first, app.hang(control) as second, dial(control) as idle:
            assert get(control, "/livez")[0] == 200
            assert hung_up(idle, within_s=10), "the idle one went, though it was the youngest"
            assert not hung_up(first)
            with app.hang(control) as third, app.hang(control) as fourth:
                assert hung_up(first, within_s=10), "all busy: the oldest goes"
                app.release.set()
                for client in (second, third, fourth):
                    assert b"200" in client.recv(1 << 16)

    while_it_runs(control, scenario)


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(CONTROL_LIMITS, head_s=0.1, request_s=0.1, unread_s=0.1)
    monkeypatch.setattr(control_server, "CONTROL_LIMITS", limits)
    monkeypatch.setattr(control_server, "KEEP_ALIVE_S", 0.1)


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /livez HT",
        b"POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nfour",
        REQUEST,  # answered, and then silent
        REQUEST + b"GET /li",
    ],
)
def test_a_connection_without_a_whole_request_is_ended(beginning: bytes) -> None:
    control = plane()

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(beginning)
            while not hung_up(client, within_s=10):
                pass

    while_it_runs(control, scenario)


@pytest.mark.usefixtures("short_patience")
def test_a_body_that_somebody_waits_for_buys_no_time_either() -> None:
    gone = threading.Event()

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    control = plane(lambda: reading)

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nfour")
            assert hung_up(client, within_s=10)
        assert gone.wait(10)

    while_it_runs(control, scenario)


@pytest.mark.usefixtures("short_patience")
def test_bytes_that_drip_in_buy_no_time() -> None:
    control = plane()

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(b"GET /livez HTTP/1.1\r\nX: ")
            deadline = time.monotonic() + 10
            while not hung_up(client, within_s=0.01):
                assert time.monotonic() < deadline
                try:
                    client.sendall(b"a")
                except OSError:
                    break

    while_it_runs(control, scenario)


@pytest.mark.usefixtures("short_patience")
def test_an_answer_may_take_longer_than_a_request() -> None:
    app = HangingApp()
    control = plane(lambda: app)

    async def scenario() -> None:
        with app.hang(control) as client:
            assert not hung_up(client, within_s=0.3)
            app.release.set()
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")

    while_it_runs(control, scenario)


@pytest.mark.usefixtures("short_patience")
def test_who_does_not_read_the_answer_is_cut() -> None:
    sent = threading.Event()

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (1 << 25)})
        sent.set()

    control = plane(lambda: large)

    async def scenario() -> None:
        with dial(control) as client:
            client.sendall(REQUEST)
            assert sent.wait(10)
            assert await connections_of(control, 0)

    while_it_runs(control, scenario)


async def connections_of(control: ControlPlane, count: int) -> bool:
    """Waits until Uvicorn has `count` connections."""
    assert control._server is not None
    async with asyncio.timeout(10):
        while len(control._server.server_state.connections) != count:
            await asyncio.sleep(0.005)
    return True


# --- addresses


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize("main_port", [None, 0, -1, 55_536, 65_535])
def test_without_a_valid_default_any_free_port_is_taken(main_port: int | None) -> None:
    assert plane(port=None, main_port=main_port)._wanted_port() == 0


@pytest.mark.parametrize(("main_port", "port"), [(1, 10_001), (8000, 18_000), (55_535, 65_535)])
def test_the_default_port_follows_the_main_port(main_port: int, port: int) -> None:
    assert plane(port=None, main_port=main_port)._wanted_port() == port


def test_a_port_that_is_given_wins() -> None:
    port = free_port()
    control = plane(port=port, main_port=8000)

    async def scenario() -> None:
        assert control.address == (LOOPBACK, port)

    while_it_runs(control, scenario)


@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_that_is_no_port_is_a_wrong_argument(port: int) -> None:
    with pytest.raises(ArgumentsError, match=r"--control-port .*expected 0 to 65535"):
        asyncio.run(plane(port=port).start())


def test_a_taken_port_names_the_flag_and_a_way_out() -> None:
    async def main() -> None:
        with socket.create_server((LOOPBACK, 0)) as other:
            port = other.getsockname()[1]
            control = plane(port=port)
            with pytest.raises(AddressError) as caught:
                await control.start()
            await control.stop()
        assert caught.value.message == f"--control-port: {LOOPBACK}:{port} is taken"
        assert "--control-port" in str(caught.value.hint)
        assert caught.value.exit_code is ExitCode.ADDRESS_UNAVAILABLE

    asyncio.run(main())


def test_a_taken_default_port_is_replaced_by_any_free_one() -> None:
    """Nobody has chosen it, and it may lie in the range that the kernel gives to clients."""
    with socket.create_server((LOOPBACK, 0)) as other, capture_logs() as logs:
        taken = other.getsockname()[1]
        control = plane(port=None, main_port=taken - 10_000)

        async def scenario() -> None:
            assert control.address[1] not in (0, taken)
            with dial(control) as client:
                client.sendall(REQUEST.replace(b"\r\n\r\n", CLOSE))
                assert read_all(client)

        while_it_runs(control, scenario)
    (line,) = [line for line in logs if line["event"] == "control_port_taken"]
    assert (line["wanted"], line["port"]) == (taken, control.address[1])


def test_a_default_port_that_cannot_be_had_for_another_reason_is_an_error() -> None:
    with pytest.raises(AddressError, match="no address of this machine"):
        asyncio.run(plane(host="192.0.2.1", port=None, main_port=8000).start())


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("192.0.2.1", "no address of this machine"),
        ("no-such-host.invalid", "cannot be bound"),
        ("a" * 70, "cannot be bound"),
    ],
)
def test_a_host_that_is_not_here(host: str, text: str) -> None:
    with pytest.raises(AddressError, match=text) as caught:
        asyncio.run(plane(host=host).start())
    assert "--control-host" in str(caught.value.hint)


def test_a_port_can_be_taken_again_at_once() -> None:
    port = free_port()
    for _ in range(2):
        control = plane(port=port)

        async def scenario(control: ControlPlane = control) -> None:
            with dial(control) as client:
                client.sendall(REQUEST.replace(b"\r\n\r\n", CLOSE))
                assert read_all(client)  # the server hangs up first: its port is in TIME_WAIT

        while_it_runs(control, scenario)


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    control = plane(host="::1")

    async def scenario() -> None:
        assert control.url == f"http://[::1]:{control.address[1]}"
        assert get(control, "/livez")[0] == 200

    while_it_runs(control, scenario)


# --- starts that fail, and stops


def test_a_stop_without_a_start_does_nothing() -> None:
    async def main() -> None:
        control = plane()
        await control.stop()
        await control.stop()

    asyncio.run(main())


def test_an_app_that_cannot_be_made_is_a_failed_start() -> None:
    def broken() -> Any:
        raise RuntimeError("no app today")

    async def main() -> None:
        control = plane(broken)
        with pytest.raises(StartError, match="no app today"):
            await control.start()
        await control.stop()

    asyncio.run(main())


def test_an_error_of_ours_comes_out_as_it_is() -> None:
    def broken() -> Any:
        raise ArgumentsError("--control-token: empty")

    async def main() -> None:
        control = plane(broken)
        with pytest.raises(ArgumentsError, match="empty"):
            await control.start()
        await control.stop()

    asyncio.run(main())


def test_no_thread_to_be_had_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        control = plane()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(LimitError, match="can't start new thread"):
                await control.start()
        await control.stop()

    asyncio.run(main())


def test_it_starts_once() -> None:
    control = plane()

    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="once"):
            await control.start()
        assert get(control, "/livez")[0] == 200

    while_it_runs(control, scenario)


def test_a_start_that_is_cancelled_is_stopped_like_any_other() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow_factory() -> Any:
        entered.set()
        leave.wait(10)
        return make_app()

    async def main() -> None:
        control = plane(slow_factory)
        starting = asyncio.create_task(control.start())
        while not entered.is_set():
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        leave.set()
        await control.stop()

    asyncio.run(main())


def test_after_a_stop_nobody_answers_and_no_task_is_left() -> None:
    async def main() -> None:
        control = plane()
        await control.start()
        idle = dial(control)
        await asyncio.gather(control.stop(), control.stop())
        await control.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert hung_up(idle, within_s=10)
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            dial(control)

    asyncio.run(main())


def test_a_stop_waits_for_an_answer_that_comes_soon() -> None:
    app = HangingApp()
    control = plane(lambda: app)

    async def main() -> None:
        await control.start()
        with app.hang(control) as client:
            stopping = asyncio.create_task(control.stop())
            assert control._server is not None
            while control._server.accepting:  # until it shuts down
                await asyncio.sleep(0)
            app.release.set()
            await stopping
            assert b"late" in client.recv(1 << 16)
        assert not app.cancelled.is_set()

    asyncio.run(main())


def test_a_stop_ends_an_answer_that_does_not_come() -> None:
    app = HangingApp()
    control = plane(lambda: app)

    async def main() -> None:
        await control.start()
        with app.hang(control) as client:
            await control.stop()
            assert hung_up(client, within_s=10)
        assert app.cancelled.is_set()

    asyncio.run(main())


def test_every_stop_fits_into_the_second_that_a_companion_has() -> None:
    assert control_server.GRACE_S < control_server.STOP_S
    assert Settings().stop.companion > control_server.STOP_S + control_server.FORCED_S


def test_a_thread_that_is_stuck_is_told_and_does_not_hold_the_stop_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stuck, release = threading.Event(), threading.Event()

    async def blocking(scope: Any, receive: Any, send: Any) -> None:
        stuck.set()
        release.wait(30)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    control = plane(lambda: blocking)

    async def scenario() -> None:
        await control.start()
        with dial(control) as client:
            client.sendall(REQUEST)
            assert stuck.wait(10)
            with pytest.raises(StopDeadlineError):
                await control.stop()
            assert not release.is_set(), "it was not waited for"

    asyncio.run(scenario())
    release.set()  # it ends after all, and finds the loop that waited for it closed
    asyncio.run(control.stop())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_loop_that_ends_without_a_stop_is_not_called_later() -> None:
    """The thread is a daemon and outlives a loop that forgot it; it must not fail on that."""

    async def forget(control: ControlPlane) -> None:
        await control.start()

    control = plane()
    asyncio.run(forget(control))
    assert get(control, "/livez")[0] == 200
    asyncio.run(control.stop())


def test_a_death_after_the_start_is_logged_and_a_stop_still_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Recorder:
        def error(self, event: str, **_: Any) -> None:
            events.append(event)

    async def dying(self: Any, counter: int) -> bool:
        raise RuntimeError("tick failed")

    monkeypatch.setattr(control_server, "log", Recorder())
    monkeypatch.setattr(control_server._Server, "on_tick", dying)

    async def main() -> None:
        control = plane()
        await control.start()
        await control.stop()

    asyncio.run(main())
    assert events == ["control_plane_died"]


def test_many_starts_and_stops_leave_nothing() -> None:
    before = left_behind()
    for _ in range(5):
        while_it_runs(plane(), _nothing)
    assert left_behind() == before


async def _nothing() -> None:
    pass
