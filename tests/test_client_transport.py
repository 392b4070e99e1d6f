"""One worker is asked over a real socket; whatever else answers is told in one line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from client_worker import Answer, LiveWorker, http_answer, lived, nobody, something_else

from ichat_lifecycle.client import answers, sse, transport
from ichat_lifecycle.client.documents import Entry, Gap
from ichat_lifecycle.client.errors import ForeignError, GoneError, UnreachableError
from ichat_lifecycle.client.fleet_client import FleetClient, RefusedError
from ichat_lifecycle.client.sse import EventParser, ServerEvent, TooLongError
from ichat_lifecycle.client.transport import ControlClient, Opened
from ichat_lifecycle.errors import ArgumentsError, ExitCode, LifecycleError
from ichat_lifecycle.states import State, Trigger

JSON = "application/json"

# --- server-sent events

STREAM = (
    b"retry: 1500\n\n"
    b"id: 5eed-1\nevent: phase\ndata: {}\n\n"
    b": keep-alive\n\n"
    b"event:transition\r\ndata:one\r\ndata: two\r\n\r\n"
    b"id: 5eed-3\n\n"
    b"data: caf\xc3\xa9 \xe2\x80\xa8 \x1c here\nunknown\n\n"
)
EVENTS = [
    ServerEvent("5eed-1", "phase", "{}"),
    ServerEvent("5eed-1", "transition", "one\ntwo"),
    ServerEvent("5eed-3", "message", "café \u2028 \x1c here"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_in_whatever_pieces_they_come(size: int) -> None:
    parser = EventParser()
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS
    assert parser.retry_s == 1.5


def test_an_event_without_an_end_is_not_kept() -> None:
    parser = EventParser()
    with pytest.raises(TooLongError):
        list(parser.feed(b"x" * (sse.EVENT_LIMIT + 1)))
    parser = EventParser()
    with pytest.raises(TooLongError):
        for _ in range(20):
            list(parser.feed(b"data: " + b"x" * 100_000 + b"\n"))


# --- a worker


def test_a_worker_says_where_it_is_and_what_has_happened() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker, ControlClient(worker.url) as client:
            worker.story.fire(Trigger.BIND)
            status = await client.status()
            assert (status.state, status.control_url) == (State.BOUND, worker.url)
            document, entries = await client.history()
            assert document["transitions"][0]["trigger"] == "bind"
            assert [entry.kind for entry in entries] == ["phase", "transition"]

    lived(scenario)


def test_events_begin_with_all_and_go_on_live() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker, ControlClient(worker.url) as client:
            worker.story.fire(Trigger.BIND)
            async with contextlib.aclosing(client.events()) as events:
                assert await anext(events) == Opened()
                first, second = await anext(events), await anext(events)
                assert isinstance(first, Entry) and isinstance(second, Entry)
                assert (first.kind, second.dest) == ("phase", State.BOUND)
                worker.story.phase("loading_weights")
                live = await anext(events)
                assert isinstance(live, Entry)
                assert (live.text("phase"), live.start_id, live.id) == (
                    "loading_weights",
                    "5eed",
                    3,
                )
            async with contextlib.aclosing(client.events("5eed-2")) as events:
                again = [await anext(events), await anext(events)]
                assert again[1] == live, "what it had is not sent again"
            assert client.retry_s == 1.0

    lived(scenario)


def test_a_stream_that_the_worker_ends_has_an_end() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker, ControlClient(worker.url) as client:
            events = client.events()
            await anext(events)
            await worker.stop()
            assert [item.kind async for item in events if isinstance(item, Entry)] == ["phase"]

    lived(scenario)


def test_the_environments_proxies_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    async def scenario() -> None:
        async with LiveWorker() as worker, ControlClient(worker.url) as client:
            assert (await client.status()).model == "demo"

    lived(scenario)


# --- TLS

CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))


def test_an_authority_of_ones_own_is_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no proxy: what is asked is this machine's own port, or a worker's that has a name."""
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)

    async def scenario() -> None:
        async with something_else(http_answer("404 Not Found", JSON, b"{}"), tls=tls) as url:
            monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
            async with ControlClient(url) as client:
                with pytest.raises(ForeignError, match="answers 404"):
                    await client.status()
            async with FleetClient(url, 5, own_only=False) as fleet:
                with pytest.raises(RefusedError, match="answers 404"):
                    await fleet.get("/livez")
            monkeypatch.delenv("SSL_CERT_FILE")
            async with ControlClient(url) as client:
                with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                    await client.status()
                assert "SSL_CERT_FILE" in str(caught.value.hint)

    lived(scenario)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.parametrize("ask", [ControlClient, lambda url: FleetClient(url, 1, own_only=True)])
def test_certificates_that_cannot_be_loaded_are_told_by_name(
    name: str, ask: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "/no/such")
    with pytest.raises(ArgumentsError, match=f"^{name}=/no/such cannot be loaded: No such file"):
        ask("https://127.0.0.1:1")
    monkeypatch.delenv(name)
    monkeypatch.setenv("SSL_CERT_FILE", __file__)
    with pytest.raises(ArgumentsError, match="no certificate or crl found"):
        ask("https://127.0.0.1:1")


def test_without_tls_no_certificate_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That of a socket was: a stale variable ended each command for a fleet in a traceback."""
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such")
    path = tmp_path / "fleet.sock"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await http_answer("200 OK", JSON, b'{"fleet": 7}')(reader, writer)
        writer.close()

    async def scenario() -> None:
        async with (
            await asyncio.start_unix_server(answer, path),
            FleetClient(f"unix:{path}", 5, own_only=True) as fleet,
        ):
            assert await fleet.get("/livez") == {"fleet": 7}
        with nobody() as url:
            async with ControlClient(url) as client:
                with pytest.raises(GoneError):
                    await client.status()

    lived(scenario)


# --- anything else


def test_nobody_at_the_address_is_told_as_that() -> None:
    async def scenario() -> None:
        with nobody() as url:
            async with ControlClient(url) as client:
                with pytest.raises(GoneError, match="connection refused") as caught:
                    await client.status()
                assert caught.value.exit_code == ExitCode.ADDRESS_UNAVAILABLE
                assert caught.value.hint
                with pytest.raises(GoneError):
                    await anext(client.events())

    lived(scenario)


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    writer.write(head.encode() + b"{")
    await writer.drain()


async def smtp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail \x1b[31m\r\n\r\n")
    await writer.drain()
    await reader.read()


HTML = http_answer("200 OK", "text/html", b"<h1>Welcome</h1>")
SHORT = http_answer("200 OK", JSON, b'{"object": "list", "data": []}')


@pytest.mark.parametrize(
    ("answer", "kind", "complaint"),
    [
        (http_answer("404 Not Found", JSON, b"{}"), ForeignError, "answers 404"),
        (http_answer("302 Found", JSON, b"{}"), ForeignError, "answers 302"),
        (http_answer("500 Oops", JSON, b"{}"), ForeignError, "answers 500"),
        (http_answer("401 Unauthorized", JSON, b"{}"), ForeignError, "answers 401"),
        (HTML, ForeignError, "no application/json"),
        (SHORT, ForeignError, "it has no state"),
        (http_answer("200 OK", JSON, b"{"), ForeignError, "not JSON"),
        (http_answer("200 OK", JSON, b"[" * 100_000), ForeignError, "not JSON"),
        (http_answer("200 OK", JSON, b"\xff\xfe\x00"), ForeignError, "not JSON"),
        (smtp, ForeignError, "does not speak HTTP"),
        (http_answer("503 Unavailable", JSON, b"{}"), UnreachableError, "answers 503"),
        (hangs_up, UnreachableError, "hung up"),
        (breaks_off, UnreachableError, "hung up"),
    ],
)
def test_what_is_no_worker_is_told_in_one_line(
    answer: Answer, kind: type[LifecycleError], complaint: str
) -> None:
    async def scenario() -> None:
        async with something_else(answer) as url, ControlClient(url) as client:
            with pytest.raises(kind, match=complaint) as caught:
                await client.status()
        assert caught.value.exit_code == ExitCode.ADDRESS_UNAVAILABLE
        assert url in caught.value.line()
        assert caught.value.hint, "and what to do"
        assert caught.value.line().isprintable()

    lived(scenario)


def stream(text: str, media_type: str = "text/event-stream") -> Answer:
    return http_answer("200 OK", media_type, text.encode())


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (HTML, "no text/event-stream"),
        (stream("event: phase\ndata: {\n\n"), "not JSON"),
        (stream("event: phase\ndata: {}\n\n"), "does not say when"),
        (stream("event: gap\ndata: {}\n\n"), "gap"),
        (stream("data: " + "x" * (sse.EVENT_LIMIT + 10)), "an event of more than"),
    ],
)
def test_events_of_something_else_are_told_in_one_line(answer: Answer, complaint: str) -> None:
    async def scenario() -> None:
        async with something_else(answer) as url, ControlClient(url) as client:
            with pytest.raises(ForeignError, match=complaint):
                async with contextlib.aclosing(client.events()) as events:
                    async for _ in events:
                        pass

    lived(scenario)


def test_a_gap_and_an_event_of_a_newer_version_are_read() -> None:
    later = json.dumps({"id": 9, "event": "weather", "at": "2026-01-02T12:00:00+00:00"})
    text = (
        f'event: gap\ndata: {{"after": 1, "to": 4}}\n\nid: a-9\nevent: weather\ndata: {later}\n\n'
    )

    async def scenario() -> None:
        async with something_else(stream(text)) as url, ControlClient(url) as client:
            opened, gap, entry = [item async for item in client.events()]
        assert (opened, gap) == (Opened(), Gap(3))
        assert isinstance(entry, Entry)
        assert (entry.kind, entry.start_id) == ("weather", "a")

    lived(scenario)


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each byte in time, and no end."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", [never, drips])
def test_an_answer_has_to_come_in_time(answer: Answer) -> None:
    async def scenario() -> None:
        async with something_else(answer) as url, ControlClient(url, timeout_s=0.2) as client:
            with pytest.raises(UnreachableError, match="no answer"):
                await client.status()

    lived(scenario)


def test_an_answer_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ANSWER_LIMIT", 10)

    async def scenario() -> None:
        async with LiveWorker() as worker, ControlClient(worker.url) as client:
            with pytest.raises(ForeignError, match="no end"):
                await client.status()

    lived(scenario)


def test_a_stream_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SILENCE_S", 0.2)

    async def scenario() -> None:
        async with LiveWorker() as worker, ControlClient(worker.url) as client:
            with pytest.raises(UnreachableError, match="no answer"):
                async for _ in client.events():
                    pass

    lived(scenario)


def test_a_name_that_leads_nowhere_is_told() -> None:
    async def scenario() -> None:
        async with ControlClient("http://no-such-host.invalid:1") as client:
            with pytest.raises(UnreachableError, match="cannot reach") as caught:
                await client.status()
            assert not isinstance(caught.value, GoneError)

    lived(scenario)
