"""The fleet's port before workers that misbehave, and what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest
from on_loop import eventually, run

from ichat_lifecycle.adapters.output_tail import OutputTail
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.fleet_app import FleetDesk, build_fleet_app
from ichat_lifecycle.control.fleet_server import serving
from ichat_lifecycle.fleet.asking import ASK_TIMEOUT_S, WorkerClients, document_in
from ichat_lifecycle.fleet.fleet import Fleet, NoSuchWorkerError
from ichat_lifecycle.fleet.journal import LIMITS
from ichat_lifecycle.fleet.states import Stage
from ichat_lifecycle.fleet.told import Told
from ichat_lifecycle.journal import Journal
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.hostile_plane import TRICKS, HostilePlane, answer, document, endless

pytestmark = pytest.mark.hostile

LOOPBACK = "127.0.0.1"
DEADLINE_S = 60.0
MB = 2**20
TOKEN, WORKER_TOKEN = "fleets-token-0123456789", "workers-token-0123456789"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


class FakeFleet:
    """Two workers that serve; what they tell is true, but for the one's control plane."""

    stopping = False
    ready = True

    def __init__(self, **urls: str) -> None:
        self.members = [self._member(name, url) for name, url in urls.items()]

    def _member(self, name: str, url: str) -> Any:
        plan = SimpleNamespace(model=name, address="a:1", gpu_ids=None)
        return SimpleNamespace(
            name=name,
            plan=plan,
            stage=Stage.SERVING,
            since=datetime.now(UTC),
            since_s=0.0,
            told=Told(state=State.READY),
            state=State.READY,
            control_url=url,
            reason=None,
            process=SimpleNamespace(pid=1, token=WORKER_TOKEN),
            starts=1,
            restarts_left=1,
            ended_with=None,
            due_s=None,
            ask_to_stop=lambda why, *, now: None,
        )

    def member(self, name: str) -> Any:
        for member in self.members:
            if member.name == name:
                return member
        raise NoSuchWorkerError(name)

    def restart(self, name: str) -> None:
        self.member(name)


class Bench:
    """A fleet's port, an honest worker and one that is not."""

    def __init__(self, client: httpx.AsyncClient, port: int, hostile: HostilePlane) -> None:
        self.client, self.port, self.hostile = client, port, hostile
        self.output = OutputTail()

    async def raw(self, head: str) -> bytes:
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        text = head.replace("\n", "\r\n") + "\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write(text.encode("latin-1"))
        try:
            return await reader.read()
        finally:
            writer.close()

    @property
    def targets(self) -> list[str]:
        return [head.split(b" ")[1].decode() for head in self.hostile.heads]


@contextlib.asynccontextmanager
async def bench(trick: Any) -> AsyncIterator[Bench]:
    sock = socket.create_server((LOOPBACK, 0))
    url = f"http://{LOOPBACK}:{sock.getsockname()[1]}"
    bell = Bell()
    journal = Journal(LIMITS)
    hidden = Secrets()
    hidden.add(TOKEN, WORKER_TOKEN)
    async with (
        HostilePlane(trick).serving() as hostile,
        HostilePlane(document()).serving() as honest,
        contextlib.aclosing(WorkerClients(hidden)) as clients,
        httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False) as client,
    ):
        made = Bench(client, sock.getsockname()[1], hostile)
        app = build_fleet_app(
            cast(Fleet, FakeFleet(honest=honest.url, hostile=hostile.url)),
            cast(FleetDesk, SimpleNamespace(file="configs.yaml")),
            made.output,
            Events(journal, "5eed", bell),
            token=TOKEN,
            clients=clients,
            hidden=hidden,
        )
        async with serving(app, sock):
            yield made
            bell.close()


# --- what workers answer


@pytest.mark.parametrize("trick", TRICKS)
def test_the_fleet_is_shown_whatever_a_worker_answers(trick: str) -> None:
    process = psutil.Process()

    async def scenario() -> None:
        async with bench(TRICKS[trick]) as it:
            before, began_s = process.memory_info().rss, asyncio.get_running_loop().time()
            shown = (await it.client.get("/fleet")).json()["workers"]
            took_s = asyncio.get_running_loop().time() - began_s
            assert [worker["state"] for worker in shown] == ["READY"] * 2
            assert [worker["lifecycle"] for worker in shown] == [{"state": "READY"}, None]
            assert took_s < ASK_TIMEOUT_S + 5.0
            assert process.memory_info().rss - before < 60 * MB
            await eventually(lambda: it.hostile.open == 0)

    run(scenario())


def test_a_hundred_streams_do_not_blind_the_fleet() -> None:
    """They took all connections of one pool, and `lifecycle` was null for all workers."""

    async def scenario() -> None:
        async with bench(endless(EVENT_STREAM, b": a\n\n", 0.2)) as it:
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(100):
                    stream = it.client.stream("GET", "/fleet/hostile/lifecycle/events")
                    # Connections of the test's own client have a limit as well.
                    assert (await stack.enter_async_context(stream)).status_code == 200
                it.hostile.trick = document()
                async with httpx.AsyncClient(timeout=DEADLINE_S) as other:
                    shown = (await other.get(f"http://{LOOPBACK}:{it.port}/fleet")).json()
                assert all(worker["lifecycle"] for worker in shown["workers"])
            await eventually(lambda: it.hostile.open == 0)

    run(scenario())


def test_many_who_ask_at_once_are_one_question() -> None:
    async def scenario() -> None:
        async with bench(TRICKS["silent"]) as it:
            asked = [it.client.get("/fleet") for _ in range(50)]
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
            assert it.hostile.most_open == 1

    run(scenario())


def test_a_client_that_goes_takes_its_question_along() -> None:
    async def scenario() -> None:
        async with bench(TRICKS["silent"]) as it:
            for _ in range(20):
                _, writer = await asyncio.open_connection(LOOPBACK, it.port)
                writer.write(b"GET /fleet/hostile/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await eventually(lambda: it.hostile.open >= 1)
                writer.close()
            await eventually(lambda: it.hostile.open == 0)

    run(scenario())


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1:1", "http://a@127.0.0.1:1", "file:///x", "x", ""]
)
def test_only_a_control_plane_is_asked(url: str) -> None:
    async def scenario() -> None:
        async with contextlib.aclosing(WorkerClients()) as clients:
            assert await clients.lifecycle("a", url) is None

    run(scenario())


@pytest.mark.parametrize("text", ["{}", '{"a": [1, 2.5, -1e3, null, true]}', '{"a": {"b": [[]]}}'])
def test_what_json_is_for_is_taken(text: str) -> None:
    assert document_in(text.encode()) == json.loads(text)


# --- what passes


@pytest.mark.parametrize(
    ("asked", "passed"),
    [
        ("/a/b", "/a/b"),
        ("/", "/"),
        ("/a?x=1&x=2&y=%26&z", "/a?x=1&x=2&y=%26&z"),
        ("/a?x=a%20b+c", "/a?x=a%20b+c"),
        ("/a%3Fb=1", "/a%3Fb=1"),
        ("/a%23b", "/a%23b"),
        ("/a%25b", "/a%25b"),
        ("/%00", "/%00"),
        ("/%E6%BC%94", "/%E6%BC%94"),
        ("/%ff", "/%EF%BF%BD"),
        ("//evil.example/x", "//evil.example/x"),
        ("/http://evil.example/x", "/http://evil.example/x"),
        ("/@evil.example", "/@evil.example"),
        ("/:1@evil.example/", "/:1@evil.example/"),
        ("/a\\b", "/a%5Cb"),
        ("/a%2Fb", "/a/b"),
        ("/a;b", "/a;b"),
    ],
)
def test_a_path_stays_with_its_worker(asked: str, passed: str) -> None:
    """As it came, repeated parameters too; and nothing of it becomes a host or a header."""

    async def scenario() -> None:
        async with bench(document()) as it:
            got = await it.raw(f"GET /fleet/hostile{asked} HTTP/1.1")
            assert got.startswith(b"HTTP/1.1 200 "), got
            assert it.targets == [passed]
            assert b"\r\nHost: 127.0.0.1:" in it.hostile.heads[0]
            assert it.hostile.heads[0].count(b"\r\n") == 3, it.hostile.heads[0]

    run(scenario())


@pytest.mark.parametrize(
    "path", ["/fleet/hostile/../x", "/fleet/hostile/%2e%2e/x", "/fleet/hostile/a/../../../x"]
)
def test_dots_reach_nobody_else(path: str) -> None:
    async def scenario() -> None:
        async with bench(document()) as it:
            assert (await it.raw(f"GET {path} HTTP/1.1")).startswith(b"HTTP/1.1 200 ")
            assert len(it.targets) == 1
            assert it.targets[0].endswith("/x")

    run(scenario())


@pytest.mark.parametrize(
    "name", ["nobody", "hostile%0a", "%00", "..", "%2e%2e", "hostile%00", "a%0d%0ab", "%ff"]
)
@pytest.mark.parametrize("rest", ["", "/", "/logs", "/lifecycle", "/a%0d%0aX:%20b"])
def test_a_name_that_nobody_has_is_404(name: str, rest: str) -> None:
    async def scenario() -> None:
        async with bench(document()) as it:
            answer = await it.raw(f"GET /fleet/{name}{rest} HTTP/1.1")
            assert answer.startswith(b"HTTP/1.1 404 "), answer
            assert it.targets == []

    run(scenario())


def test_a_worker_gets_nothing_that_is_its_clients() -> None:
    async def scenario() -> None:
        async with bench(document()) as it:
            mine = {"Cookie": "a=b", "X-Api-Key": "c", "Last-Event-ID": "5eed-1", **RIGHT}
            await it.client.get("/fleet/hostile/x", headers=mine)
            await it.client.post("/fleet/hostile/x", headers=mine, content=b"body")
            read, command = it.hostile.heads
            for head in (read, command):
                assert TOKEN.encode() not in head
                assert b"cookie" not in head.lower()
                assert b"api-key" not in head.lower()
                assert b"Last-Event-ID: 5eed-1" in head
            assert b"Authorization" not in read
            assert f"Authorization: Bearer {WORKER_TOKEN}".encode() in command

    run(scenario())


def test_a_worker_does_not_act_as_the_fleet() -> None:
    """Its cookies, redirects and policies are not the fleet's, and neither are its pages."""
    headers = {
        "Set-Cookie": "a=b; Path=/",
        "Location": "http://evil.example",
        "Content-Type": "text/html",
        "Content-Security-Policy": "script-src *",
        "Access-Control-Allow-Origin": "*",
        "Service-Worker-Allowed": "/",
        "Refresh": "0; url=http://evil.example",
        "Clear-Site-Data": '"*"',
        "Cache-Control": "max-age=100000",
        "X-Named": "1",
        "Connection": "close, X-Named",
        "Keep-Alive": "timeout=100",
        "Proxy-Authenticate": "Basic",
        "WWW-Authenticate": "Basic",
        "Upgrade": "x",
        "Trailer": "x",
        "Retry-After": "7",
        "Content-Encoding": "gzip",
    }

    async def scenario() -> None:
        async with bench(answer(b"<script>1</script>", status=302, headers=headers)) as it:
            got = await it.client.get("/fleet/hostile/")
            assert (got.status_code, got.text) == (302, "<script>1</script>")
            assert set(got.headers) == {
                "cache-control", "content-security-policy", "content-type", "date",
                "referrer-policy", "retry-after", "transfer-encoding", "x-content-type-options",
            }  # fmt: skip
            assert got.headers["cache-control"] == "no-store"
            assert got.headers.get_list("content-security-policy")[0].startswith("sandbox;")
            assert not it.client.cookies
            again = await it.client.get("/fleet/honest/")
            assert again.status_code == 200
            await it.client.get("/fleet/hostile/")
            assert b"cookie" not in it.hostile.heads[-1].lower()

    run(scenario())


ECHO = f"of the fleet {TOKEN}, of the worker {WORKER_TOKEN}."
CLEAN = "of the fleet ***, of the worker ***."


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("kind", "body", "clean"),
    [
        ("application/json", f'{{"a":["{ECHO}"]}}', f'{{"a":["{CLEAN}"]}}'),
        ("text/plain", f"a\n{ECHO}\nb", f"a\n{CLEAN}\nb"),
        ("text/event-stream", f"data: {ECHO}\n\n", f"data: {CLEAN}\n\n"),
        ("image/svg+xml", f"<svg><!-- {ECHO} --></svg>", f"<svg><!-- {CLEAN} --></svg>"),
    ],
)  # fmt: skip
def test_a_worker_that_echoes_secrets_tells_no_client(
    method: str, kind: str, body: str, clean: str
) -> None:
    async def scenario() -> None:
        async with bench(answer(body.encode(), headers={"Content-Type": kind})) as it:
            got = await it.client.request(method, "/fleet/hostile/x", headers=RIGHT)
            assert (got.status_code, got.text) == (200, clean)
            assert got.headers["content-type"] == kind
            raw = await it.raw(f"HEAD /fleet/hostile/x HTTP/1.1\nAuthorization: Bearer {TOKEN}")
            assert raw.startswith(b"HTTP/1.1 200 ")
            assert raw.endswith(b"\r\n\r\n")

    run(scenario())


def test_a_workers_document_in_the_fleets_has_no_secrets() -> None:
    async def scenario() -> None:
        async with bench(document(reason={"message": ECHO}, port=8000)) as it:
            for path in ("/fleet", "/fleet/hostile"):
                got = await it.client.get(path)
                assert CLEAN in got.text
                assert TOKEN not in got.text
                assert WORKER_TOKEN not in got.text

    run(scenario())


def test_an_error_does_not_repeat_a_workers_words() -> None:
    async def scenario() -> None:
        async with bench(endless(f"{ECHO}\r\n\r\n".encode(), b"")) as it:
            got = await it.client.get("/fleet/hostile/x")
            assert got.status_code == 502
            assert "of the worker ***" in got.text
            assert WORKER_TOKEN not in got.text

    run(scenario())


@pytest.mark.parametrize("status", [100, 101, 199, 204, 304, 600, 999])
def test_any_status_is_passed_or_502(status: int) -> None:
    async def scenario() -> None:
        async with bench(answer(b"", status=status)) as it:
            asking = asyncio.create_task(it.raw("GET /fleet/hostile/x HTTP/1.1"))
            done, _ = await asyncio.wait({asking}, timeout=2.0)
            if not done:  # an interim answer, after which none comes
                assert status < 200
                asking.cancel()
                return
            got = int(asking.result().split()[1])
            assert got == status or (got == 502 and (status < 200 or status > 599))

    run(scenario())


def test_a_head_is_asked_for_as_any_other_answer() -> None:
    async def scenario() -> None:
        async with bench(document()) as it:
            for path in ("", "/events", "/hostile", "/hostile/logs?follow=true", "/hostile/x"):
                answer = await it.client.head(f"/fleet{path}")
                assert (answer.status_code, answer.content) == (200, b""), path
            for path in ("/livez", "/readyz"):
                assert (await it.client.head(path)).status_code == 200
            assert it.hostile.heads[-1].startswith(b"HEAD /x ")

    run(scenario())


@pytest.mark.parametrize(
    "number", ["9" * 5000, "9" * 18, "-1", "1" * 19, "\u0661", "0x1", " 1", ""]
)
def test_no_event_id_is_an_error(number: str) -> None:
    async def scenario() -> None:
        async with bench(document()) as it:
            path = f"/fleet/events?after=5eed-{number}"
            async with it.client.stream("GET", path) as answer:
                assert answer.status_code == 200

    run(scenario())


def test_a_log_is_sent_in_pieces_and_whole() -> None:
    """Of a client that does not read, one piece waits."""

    async def scenario() -> None:
        async with bench(document()) as it:
            lines = ["x" * 5000 + str(n) for n in range(100)]
            for line in lines:
                it.output.add("hostile", line)
            whole = await it.client.get("/fleet/hostile/logs?lines=100")
            assert whole.text.splitlines() == lines
            empty = await it.client.get("/fleet/hostile/logs?lines=0")
            assert empty.text == ""

    run(scenario())
