"""What keeps web pages out: the names of a port, and the headers of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from on_loop import run
from stand_ins import NOON, FakeIdentity, FakeLife

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.held_socket import Absence, HeldSocket
from ichat_lifecycle.adapters.host_names import HostNames
from ichat_lifecycle.adapters.refusal import Receive, Scope, Send, send_json
from ichat_lifecycle.config import Http, load_settings
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.fleet_server import serving
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.journal import Reason, Snapshot
from ichat_lifecycle.ports import Address
from ichat_lifecycle.states import State

LOOPBACK = "127.0.0.1"
DEADLINE_S = 60.0
TOKEN = "0123456789abcdef"

OURS = [
    "localhost", "localhost:80", "LocalHost:8001", "localhost.", "localhost.:80", "127.0.0.1",
    "127.0.0.1:18000", "127.1.2.3", "[::1]", "[::1]:80", "a.localhost", "[::ffff:127.0.0.1]:80",
    "localhost:",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:18000", "localhost.evil.example", "127.0.0.1.evil.example",
    "evil.example#localhost", "localhost@evil.example", "evil.example:80@localhost", "", " ", ":80",
    "10.0.0.1", "[fe80::1]", "0.0.0.0", "notlocalhost", "localhost..", "127.0.0.1:80:80",
    "localhost, evil.example", "localhost evil.example", "[::1", "::1]", "localhost/evil", "*",
    "2130706433", "0x7f.1", "localhost:80a", "[::1]evil.example", "xn--localhost",
    "localhost\\evil",
]  # fmt: skip


def asked(name: str) -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), (b"host", name.encode())]


@pytest.mark.parametrize("bound", [LOOPBACK, "::1", "127.0.0.53", "localhost"])
def test_on_loopback_only_its_own_names_pass(bound: str) -> None:
    names = HostNames(bound)
    assert [name for name in OURS if not names.allow(asked(name))] == []
    assert [name for name in FOREIGN if names.allow(asked(name))] == []


def test_names_can_be_added_and_all_can_be_let_in() -> None:
    names = HostNames(LOOPBACK, ["Models.Corp.", "[fd00::1]"])
    for name in (*OURS, "models.corp", "MODELS.corp:443", "models.corp.", "[fd00::1]:80"):
        assert names.allow(asked(name)), name
    assert not any(names.allow(asked(name)) for name in (*FOREIGN, "a.models.corp", "corp"))
    assert all(HostNames(LOOPBACK, ["*"]).allow(asked(name)) for name in (*OURS, *FOREIGN))


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "10.0.0.1", None, ""])
def test_elsewhere_any_name_passes(bound: str | None) -> None:
    """A browser does not reach a Unix socket; what others call a machine is not known."""
    assert all(HostNames(bound).allow(asked(name)) for name in (*OURS, *FOREIGN))


def test_elsewhere_names_and_addresses_pass_where_names_are_given() -> None:
    """A probe asks by a Pod's address, from which no page was loaded."""
    names = HostNames("0.0.0.0", ["models.corp"])
    for name in (*OURS, "models.corp", "10.0.0.1:80", "[fe80::1]", "0.0.0.0"):
        assert names.allow(asked(name)), name
    assert not names.allow(asked("evil.example"))


def test_every_host_of_a_request_has_to_be_ours() -> None:
    """One without any is HTTP/1.0, which no browser speaks."""
    names = HostNames(LOOPBACK)
    assert names.allow([])
    assert not names.allow([*asked("localhost"), *asked("evil.example")])
    assert names.allow([*asked("localhost"), (b"x-forwarded-host", b"evil.example")])
    assert not names.allow([*asked("evil.example"), (b"x-forwarded-host", b"localhost")])


def test_pages_are_told_apart_by_their_origin() -> None:
    names = HostNames(LOOPBACK, ["models.corp"])
    for ours in (None, *(f"http://{name}" for name in OURS), "https://models.corp:8443"):
        headers = [] if ours is None else [(b"origin", ours.encode())]
        assert names.allow_page(headers), ours
    for foreign in ("null", "", "localhost", *(f"https://{name}" for name in FOREIGN)):
        assert not names.allow_page([(b"origin", foreign.encode())]), foreign
        assert not HostNames("10.9.9.9").allow_page([(b"origin", foreign.encode())]), foreign
        assert HostNames(None).allow_page([(b"origin", foreign.encode())])
        assert HostNames(LOOPBACK, ["*"]).allow_page([(b"origin", foreign.encode())])


def test_a_page_passes_that_was_loaded_from_here() -> None:
    names = HostNames("0.0.0.0")
    for own in ("gpu-7:8000", "10.0.0.1:8000", "Chat.Example"):
        page = (b"origin", f"http://{own.lower()}".encode())
        assert names.allow_page([(b"host", own.encode()), page])
        assert not names.allow_page([(b"host", b"other.example"), page])
    assert not names.allow_page([(b"host", b""), (b"origin", b"http://")])


# --- on real ports


@contextlib.asynccontextmanager
async def worker(hosts: tuple[str, ...] = ()) -> AsyncIterator[int]:
    control = ControlPlane(
        lambda: build_control_app(FakeLife(), FakeIdentity(), token=TOKEN),
        LOOPBACK,
        0,
        None,
        lambda url: None,
        hosts=hosts,
    )
    await control.start()
    try:
        yield control.address[1]
    finally:
        await control.stop()


@contextlib.asynccontextmanager
async def fleet(hosts: tuple[str, ...] = ()) -> AsyncIterator[int]:
    sock = socket.create_server((LOOPBACK, 0))
    app = build_control_app(FakeLife(), FakeIdentity(), token=TOKEN)  # any app
    async with serving(app, sock, hosts):
        yield sock.getsockname()[1]


PLANES = pytest.mark.parametrize("plane", [worker, fleet])


async def raw(port: int, head: str) -> str:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    try:
        return (await reader.read()).decode("latin-1")
    finally:
        writer.close()


@PLANES
@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /livez HTTP/1.1\nHost: localhost\nConnection: close", 200),
        ("GET /livez HTTP/1.0", 200),
        ("GET /livez HTTP/1.0\nHost: evil.example", 421),
        ("GET /livez HTTP/1.1\nConnection: close", 400),
        ("GET /lifecycle HTTP/1.1\nHost: evil.example", 421),
        ("GET /lifecycle HTTP/1.1\nHost: evil.example\nX-Forwarded-Host: localhost", 421),
        ("GET / HTTP/1.1\nHost: evil.example\nX-Forwarded-For: 127.0.0.1", 421),
        ("GET /lifecycle/events HTTP/1.1\nHost: evil.example", 421),
        ("GET /nothing HTTP/1.1\nHost: evil.example", 421),
        ("GET http://evil.example/lifecycle HTTP/1.1\nHost: localhost\nConnection: close", 404),
        ("GET http://localhost/lifecycle HTTP/1.1\nHost: evil.example", 421),
        ("OPTIONS /lifecycle HTTP/1.1\nHost: evil.example\nOrigin: http://evil.example", 421),
        ("POST /lifecycle/stop HTTP/1.1\nHost: evil.example\nContent-Length: 5", 421),
        ("GET /livez HTTP/1.1\nHost: localhost\nHost: localhost", 400),
    ],
)
def test_a_page_of_another_name_gets_nothing(plane: Any, head: str, status: int) -> None:
    async def scenario() -> None:
        async with plane() as port:
            answer = await raw(port, head)
            assert answer.startswith(f"HTTP/1.1 {status} "), answer
            if status == 421:
                assert '"misdirected_request"' in answer
                assert "hosts" in answer

    run(scenario())


@PLANES
def test_a_name_that_is_set_gets_in(plane: Any) -> None:
    async def scenario() -> None:
        async with plane(("models.corp",)) as port:
            head = "GET /livez HTTP/1.1\nHost: models.corp:80\nConnection: close"
            assert (await raw(port, head)).startswith("HTTP/1.1 200 ")
            assert " 421 " in await raw(port, head.replace("models", "evil"))

    run(scenario())


@PLANES
@pytest.mark.parametrize("path", ["/lifecycle", "/nothing", "/openapi.json", "/lifecycle/diagram"])
def test_no_answer_is_cached_sniffed_or_framed(plane: Any, path: str) -> None:
    async def scenario() -> None:
        async with plane() as port, httpx.AsyncClient(timeout=DEADLINE_S) as client:
            url = f"http://{LOOPBACK}:{port}{path}"
            for answer in (await client.get(url), await client.get(url, headers={"Host": "evil"})):
                headers = answer.headers
                assert headers["x-content-type-options"] == "nosniff"
                assert headers["cache-control"] == "no-store"
                assert "frame-ancestors 'none'" in headers["content-security-policy"]
                assert "default-src 'none'" in headers["content-security-policy"]
                assert "access-control-allow-origin" not in headers

    run(scenario())


@PLANES
def test_another_sites_form_gives_no_command(plane: Any) -> None:
    """A simple request, which a browser sends without asking: it has no token."""
    cross = {"Origin": "http://evil.example", "Content-Type": "text/plain", "Cookie": "a=b"}
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}

    async def scenario() -> None:
        async with plane() as port, httpx.AsyncClient(timeout=DEADLINE_S) as client:
            url = f"http://{LOOPBACK}:{port}/lifecycle/stop"
            posted = await client.post(url, content=b'{"now": true}', headers=cross)
            assert posted.status_code in (401, 404)
            preflight = await client.options(url, headers=asks)
            assert preflight.status_code in (404, 405)
            for answer in (posted, preflight):
                assert "access-control-allow-origin" not in answer.headers

    run(scenario())


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_no_page_runs_another_hosts_scripts(path: str) -> None:
    async def scenario() -> None:
        async with worker() as port:
            connection = http.client.HTTPConnection(LOOPBACK, port, timeout=DEADLINE_S)
            await asyncio.to_thread(connection.request, "GET", path)
            answer = await asyncio.to_thread(connection.getresponse)
            assert answer.status == 404
            connection.close()

    run(scenario())


# --- the main port


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send_json(send, 200, {})


EVIL = "evil.example"
PAGE = {"Origin": f"http://{EVIL}"}
REASON = Reason("out_of_memory", "of /srv/models/secret-project")


def gate_of(bound: str | None, hosts: Any = (), origins: Any = ()) -> Gate:
    gate = Gate(lambda: FakeLife().snapshot, app, lambda: 1, Http(hosts=hosts))
    gate.app = app
    gate.require_hosts(bound, origins)
    return gate


def answer_of(gate: Gate, path: str, host: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def asked_of_gate(bound: str | None, path: str, host: str, *keys: str, hosts: Any = ()) -> int:
    gate = gate_of(bound, hosts)
    gate.require_keys(keys)
    return answer_of(gate, path, host).status_code


@pytest.mark.parametrize("path", ["/lifecycle", "/lifecycle/history", "/livez"])
def test_our_routes_on_a_main_port_are_for_its_own_names(path: str) -> None:
    assert asked_of_gate(LOOPBACK, path, "localhost") == 200
    assert asked_of_gate(LOOPBACK, path, "evil.example") == 421
    assert asked_of_gate(LOOPBACK, path, "models.corp", hosts=("models.corp",)) == 200
    assert asked_of_gate("0.0.0.0", path, "evil.example") == 200
    assert asked_of_gate(None, path, "evil.example") == 200
    assert asked_of_gate(LOOPBACK, path, "evil.example", "key") == 401, "the key keeps it"


def test_vllms_routes_are_for_any_name_unless_names_are_set() -> None:
    assert asked_of_gate(LOOPBACK, "/v1/models", "models.corp") == 200
    assert asked_of_gate(LOOPBACK, "/v1/models", "evil.example", hosts=("models.corp",)) == 421
    assert asked_of_gate(LOOPBACK, "/v1/models", "localhost", hosts=("models.corp",)) == 200
    assert asked_of_gate("0.0.0.0", "/v1/models", "10.0.0.1", hosts=("models.corp",)) == 200


def test_our_routes_are_for_no_page_that_vllms_cors_lets_in_with_all_others() -> None:
    """`--allowed-origins` is `*` by default: a page could ask 127.0.0.1 by this very name."""
    for origins in ((), ("*",)):
        assert answer_of(gate_of(LOOPBACK, (), origins), "/lifecycle", LOOPBACK, **PAGE).is_error
    listed = gate_of(LOOPBACK, (), (PAGE["Origin"],))
    assert answer_of(listed, "/lifecycle", LOOPBACK, **PAGE).status_code == 200
    named = gate_of(LOOPBACK, (EVIL,))
    assert answer_of(named, "/lifecycle", LOOPBACK, **PAGE).status_code == 200
    assert answer_of(gate_of("0.0.0.0"), "/lifecycle", LOOPBACK, **PAGE).is_error, "also there"
    assert answer_of(gate_of("0.0.0.0"), "/lifecycle", EVIL, **PAGE).status_code == 200, "its own"
    own = {"Origin": "http://localhost:3000"}
    assert answer_of(gate_of(LOOPBACK), "/lifecycle", LOOPBACK, **own).status_code == 200
    assert answer_of(gate_of(LOOPBACK), "/v1/models", LOOPBACK, **PAGE).status_code == 200, "vLLM's"


def not_ready(bound: str | None, hosts: Any = ()) -> Gate:
    gate = gate_of(bound, hosts)
    gate._snapshot = lambda: Snapshot(State.DEGRADED, NOON, 0.0, reason=REASON)
    return gate


@pytest.mark.parametrize(
    ("bound", "host", "headers", "told"),
    [
        (LOOPBACK, "localhost", {}, True),
        (LOOPBACK, EVIL, {}, False),
        (LOOPBACK, "localhost", PAGE, False),
        ("0.0.0.0", EVIL, {}, True),
        ("0.0.0.0", "localhost", PAGE, False),
        (None, EVIL, {}, True),
    ],
)
def test_a_refusal_of_vllms_routes_tells_its_reason_to_our_names_alone(
    bound: str | None, host: str, headers: dict[str, str], told: bool
) -> None:
    """Who waits for the worker gets what waiting takes: the status, the state, and the time."""
    answer = answer_of(not_ready(bound), "/health", host, **headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["state"] == "DEGRADED"
    assert (REASON.message in answer.text) is told


def test_a_websocket_that_is_closed_is_told_no_more() -> None:
    async def reason(host: str) -> str:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": asked(host)}
        await not_ready(LOOPBACK)(scope, receive, send)
        return str(sent[-1]["reason"])

    assert REASON.message in asyncio.run(reason("localhost"))
    assert asyncio.run(reason(EVIL)) == "The worker is not ready: its state is DEGRADED."


# --- the main port of a worker that is absent


@contextlib.asynccontextmanager
async def absent(bound: str = LOOPBACK, **more: Any) -> AsyncIterator[int]:
    with socket.create_server((bound, 0)) as probe:
        port = probe.getsockname()[1]
    held = HeldSocket(Address(bound, port), lambda: Absence(REASON.message, "starting", 7, **more))
    try:
        yield port
    finally:
        await held.close()


@pytest.mark.parametrize(
    ("path", "headers", "more", "status", "told"),
    [
        ("/v1/models", {"Host": "localhost"}, {}, 503, True),
        ("/v1/models", {"Host": "[::1]:80"}, {}, 503, True),
        ("/v1/models", {"Host": EVIL}, {}, 503, False),
        ("/v1/models", PAGE, {}, 503, False),
        ("/lifecycle", {}, {}, 503, True),
        ("/lifecycle", {"Host": EVIL}, {}, 421, False),
        ("/lifecycle/history", PAGE, {}, 421, False),
        ("/livez", {"Host": "models.corp"}, {"hosts": ("models.corp",)}, 503, True),
        ("/v1/models", {"Host": "models.corp:80"}, {"hosts": ("models.corp",)}, 503, True),
        ("/v1/models", {"Host": "localhost"}, {"hosts": ("models.corp",)}, 503, True),
        ("/v1/models", {"Host": EVIL}, {"hosts": ("models.corp",)}, 421, False),
        ("/lifecycle", PAGE, {"headers": AnswerHeaders(("*",))}, 421, False),
        ("/lifecycle", PAGE, {"headers": AnswerHeaders((PAGE["Origin"],))}, 503, True),
    ],
)
def test_the_port_of_an_absent_worker_has_the_names_that_it_has_with_one(
    path: str, headers: dict[str, str], more: dict[str, Any], status: int, told: bool
) -> None:
    async def scenario() -> None:
        async with absent(**more) as port, httpx.AsyncClient(timeout=DEADLINE_S) as client:
            answer = await client.get(f"http://{LOOPBACK}:{port}{path}", headers=headers)
            assert answer.status_code == status, answer.text
            assert (REASON.message in answer.text) is told
            assert ("retry-after" in answer.headers) is (status == 503)

    run(scenario())
    # One decision: the worker itself refuses the same, and no more.
    origins = more.get("headers", AnswerHeaders()).allowed_origins
    gate = gate_of(LOOPBACK, more.get("hosts", ()), origins)
    served = answer_of(gate, path, LOOPBACK, **headers)
    assert (served.status_code == 421) is (status == 421)


@pytest.mark.parametrize("path", ["/v1/models", "/lifecycle"])
def test_elsewhere_an_absent_worker_tells_any_name(path: str) -> None:
    """A proxy that keeps its clients' Host, and a kubelet's probe, which asks by an address."""

    async def scenario() -> None:
        async with absent("0.0.0.0") as port, httpx.AsyncClient(timeout=DEADLINE_S) as client:
            for name in (EVIL, "10.0.0.1", "a.svc.cluster.local"):
                url, headers = f"http://{LOOPBACK}:{port}{path}", {"Host": name}
                answer = await client.get(url, headers=headers)
                assert (answer.status_code, REASON.message in answer.text) == (503, True)

    run(scenario())


@pytest.mark.parametrize("name", ["", "http://a", "a/b", "a b", "a\nb", "*.corp"])
def test_a_name_that_no_host_has_is_an_error(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"http: {{hosts: [{name!r}]}}", encoding="utf-8")
    with pytest.raises(ArgumentsError, match=r"http\.hosts"):
        load_settings(file)
