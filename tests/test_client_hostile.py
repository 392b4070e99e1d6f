"""Servers that want to harm who asks them: each command ends, soon, small, and in words."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import gzip
import io
import json
import re
import signal
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from client_worker import Answer, http_answer, lived, something_else
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from waiting import until

from ichat_lifecycle.client import answers, find, sse, transport
from ichat_lifecycle.client.documents import MalformedError, parse_entry, parse_status
from ichat_lifecycle.client.errors import ForeignError, UnreachableError
from ichat_lifecycle.client.fleet_client import LINE_LIMIT, FleetClient, RefusedError
from ichat_lifecycle.client.fleet_table import fleet_table
from ichat_lifecycle.client.history import all_table, transitions_table
from ichat_lifecycle.client.logbook import CHARACTERS_KEPT, Logbook
from ichat_lifecycle.client.screen import Screen
from ichat_lifecycle.client.sse import EventParser
from ichat_lifecycle.client.status import Overview, _print_json, print_overview
from ichat_lifecycle.client.transport import ControlClient
from ichat_lifecycle.errors import ExitCode
from ichat_lifecycle.states import State

pytestmark = pytest.mark.hostile

JSON = "application/json"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
AT = "2026-01-02T12:00:00+00:00"
ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "ichat_lifecycle"]
DEADLINE_S = 60
TIMEOUT_S = 1.0
SOON_S = 15  # of the machines of tests; a command that hangs does so for ever


def raw(*parts: bytes, again: bytes = b"", every_s: float = 0.0) -> Answer:
    """Says these parts, and the last of them again and again as long as somebody takes it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
        while again:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(every_s)
        await writer.drain()

    return answer


def compressed(times: int) -> Answer:
    body = b" " * (8 << 20)
    for _ in range(times):
        body = gzip.compress(body)
    encoding = ", ".join(["gzip"] * times).encode()
    return raw(HEAD + b"Content-Encoding: " + encoding + b"\r\n\r\n" + body)


def document(body: str | bytes) -> Answer:
    return http_answer("200 OK", JSON, body.encode() if isinstance(body, str) else body)


ENDLESS = {
    "body": raw(HEAD + b"\r\n", again=b" " * 65536),
    "chunks": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", again=b"1\r\n \r\n" * 5000),
    "drip": raw(HEAD + b"\r\n", again=b" ", every_s=0.01),
    "head": raw(b"HTTP/1.1 200 OK\r\n", again=b"X: y\r\n", every_s=0.01),
    "status line": raw(b"HTTP/1.1 200 ", again=b"O" * 65536),
    "headers": raw(b"HTTP/1.1 200 OK\r\n", again=b"X-Much: y\r\n" * 10_000),
    "header": raw(b"HTTP/1.1 200 OK\r\nX: ", again=b"y" * 65536),
    "informational": raw(again=b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "early hints": raw(again=b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n", every_s=0.001),
    "trailers": raw(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", again=b"X: y\r\n", every_s=0.01
    ),
    "silence": raw(again=b"", every_s=1),
}
WRONG = {
    "bomb": compressed(1),
    "bomb of bombs": compressed(2),
    "br": raw(HEAD + b"Content-Encoding: br\r\n\r\nabc"),
    "NaN": document('{"state": NaN}'),
    "infinity": document('{"state": -Infinity}'),
    "deep": document("[" * 40 + "]" * 40),
    "deeper": document('{"a":' * 200_000),
    "parts": document("[" + "[]," * 600_000 + "1]"),
    "digits": document("[" + "9" * 5000 + "]"),
    "UTF-16": document('{"state": "READY"}'.encode("utf-16")),
    "charset": http_answer("200 OK", f"{JSON}; charset=punycode", b"\xff" * 1000),
    "type": http_answer("200 OK", "text/html", b"{}"),
    "redirect": raw(
        b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    ),
    "no content": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "switch": raw(b"HTTP/1.1 101 x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
    "list": document("[1]"),
    "text": document('"READY"'),
    "null": document("null"),
}


async def is_told(answer: Answer) -> None:
    async with something_else(answer) as url:
        clients: list[tuple[Any, Any]] = [
            (ControlClient(url, TIMEOUT_S), ControlClient.status),
            (ControlClient(url, TIMEOUT_S), ControlClient.history),
            (FleetClient(url, TIMEOUT_S, own_only=True), lambda fleet: fleet.get("/fleet")),
        ]
        for client, ask in clients:
            async with client:
                with pytest.raises((UnreachableError, ForeignError)) as caught:
                    await ask(client)
            assert caught.value.exit_code == ExitCode.ADDRESS_UNAVAILABLE
            assert caught.value.line().isprintable()


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_answer_without_an_end_is_given_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ANSWER_LIMIT", 1 << 20)
    tracemalloc.start()
    began_s = time.monotonic()
    try:
        lived(lambda: is_told(ENDLESS[kind]))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began_s < SOON_S
    assert most < 16 << 20, "bytes"


@pytest.mark.parametrize("kind", WRONG)
def test_an_answer_of_another_kind_is_told_in_words(kind: str) -> None:
    lived(lambda: is_told(WRONG[kind]))


def test_a_redirection_is_not_followed() -> None:
    asked: list[bytes] = []

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())

    async def scenario() -> None:
        async with something_else(target) as other:
            location = f"HTTP/1.1 307 x\r\nLocation: {other}/\r\nContent-Length: 0\r\n\r\n"
            async with (
                something_else(raw(location.encode())) as url,
                FleetClient(url, 2, own_only=True) as fleet,
            ):
                with pytest.raises(ForeignError, match="answers 307"):
                    await fleet.post("/fleet/stop", None, "secret")
        assert asked == []

    lived(scenario)


# --- documents that are JSON


EVIL = "\x1b]0;title\x07\x1b[2J\x1b]52;c;cm0=\x07\x9b2J\u202eevil\rforged\x85"
EXTREME = st.sampled_from(
    [0, -1, 10**9, 10**400, -(10**400), 1e308, -1e308, 5e-324, 9.9e9, -9.9e9, 1e12]
)
ODD = st.recursive(
    st.none()
    | st.booleans()
    | EXTREME
    | st.sampled_from([AT, "READY", EVIL, "x" * 9000])
    | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=3), below),
    max_leaves=6,
)
NUMBERS = (
    *("for_s", "in_flight", "restarts", "seq", "stop_bound_s", "pid", "id", "fraction"),
    *("elapsed_s", "expected_s", "began_s", "took_s", "answered_s", "times", "ended", "delay_s"),
    *("restarts_left", "silent_s", "starts", "starts_again_in_s"),
)
TEXTS = (
    *("evidence", "model", "start_id", "control_url", "vllm_version", "phase", "code", "message"),
    *("source", "dest", "trigger", "cause", "kind", "until", "stage", "outcome", "error", "step"),
    *("name", "address", "root_cause", "hint"),
)
WHOLE = ("reason", "warnings", "progress", "phases", "download", "ranks", "gpu_ids", "lifecycle")


def fields(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Most of what anything of ours has, and in each place mostly what could be there."""
    numbers = {name: EXTREME | st.integers(-9, 99) for name in NUMBERS}
    texts = {
        name: st.sampled_from([*State, AT, EVIL, "x" * 9000, "hung", "lost"]) for name in TEXTS
    }
    odd = dict.fromkeys(WHOLE, ODD)
    return st.fixed_dictionaries({}, optional={**numbers, **texts, **odd, **more})


FLAT = fields()
FIELDS = fields(
    reason=FLAT,
    warnings=st.lists(FLAT, max_size=2),
    lifecycle=FLAT,
    progress=fields(phases=st.lists(FLAT, max_size=3), download=FLAT),
    ranks=st.lists(ODD, max_size=2),
    gpu_ids=st.lists(ODD, max_size=2),
)
KINDS = st.sampled_from(["transition", "attempt", "verdict", "phase", "stage", "recovery", "new"])
NEAR = st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))
MOMENTS = NEAR.map(lambda at: at.isoformat()) | st.just(AT)
EVENTS = st.lists(st.tuples(KINDS, FLAT, MOMENTS), max_size=4)


def shown(*renderables: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, height=30, color_system=None, markup=False)
    for one in renderables:
        console.print(one)
    return stream.getvalue()


@settings(max_examples=100, deadline=None)
@given(FIELDS, st.sampled_from(State), MOMENTS, EVENTS)
def test_whatever_a_document_says_it_is_shown(
    fields: dict[str, Any], state: str, since: str, events: list[tuple[str, Any, str]]
) -> None:
    status = parse_status({**fields, "state": state, "since": since})
    entries = [parse_entry(kind, {**item, "at": at}) for kind, item, at in events]
    book = Logbook("http://x", status, time.monotonic)
    for entry in entries:
        book.take(entry)
    told = {"workers": [{**fields, "state": state}, *(item for _, item, _ in events)]}
    overview = Overview([told], [find.Worker("http://x", status)])
    text = shown(Screen(book.scene()), all_table(entries), transitions_table(entries))
    text += shown(fleet_table(told))
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    print_overview(console, overview)
    _print_json(console, overview)
    assert overview.ready in (True, False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", stream.getvalue())


@pytest.mark.parametrize("odd", [EVIL, [EVIL], {EVIL: EVIL}, [[EVIL]], 10**400, None, True])
def test_a_worker_of_a_fleet_may_say_anything(odd: Any) -> None:
    """Its document is passed on as it came."""
    names = (*NUMBERS, *TEXTS, *WHOLE, "state", "gpu_ids", "for_s")
    told = {
        "workers": [dict.fromkeys(names, odd), {"gpu_ids": [odd], "lifecycle": {"a": odd}}, odd]
    }
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    overview = Overview([told], [])
    print_overview(console, overview)
    _print_json(console, overview)
    assert not overview.ready
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", stream.getvalue())
    listed = stream.getvalue().partition("\n[")[2]
    assert isinstance(json.loads(f"[{listed}"), list)


@pytest.mark.parametrize(
    "at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1900-01-01T00:00:00+00:00"]
)
def test_a_time_that_no_clock_shows_is_none(at: str) -> None:
    """Arithmetic with it would fail, or take a worker for older than mankind."""
    with pytest.raises(MalformedError, match="since when"):
        parse_status({"state": "READY", "since": at})
    with pytest.raises(MalformedError, match="when it was"):
        parse_entry("phase", {"at": at})


@settings(max_examples=50, deadline=None)
@given(ODD, FLAT)
def test_a_refusal_may_say_anything(odd: Any, fields: dict[str, Any]) -> None:
    for body in ({"error": odd}, {"error": fields, "problems": odd}, odd):
        answer = answers.Answer(409, JSON, json.dumps(body).encode())
        with pytest.raises(RefusedError) as caught:
            FleetClient("http://x", 1, own_only=False)._check(answer, "/")
        assert caught.value.line().isprintable()
        assert all(line.isprintable() for line in caught.value.told)


# --- streams


def test_an_event_of_empty_lines_is_not_kept() -> None:
    parser = EventParser()
    with pytest.raises(sse.TooLongError):
        for _ in range(1000):
            list(parser.feed(b"data:\n" * 10_000))


def test_a_line_that_comes_byte_by_byte_costs_little() -> None:
    parser = EventParser()
    began_s = time.process_time()
    with pytest.raises(sse.TooLongError):
        while True:
            list(parser.feed(b"xxxx"))
    assert time.process_time() - began_s < SOON_S


@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "99999999999"])
def test_a_server_cannot_have_its_reader_wait_for_ever(value: str) -> None:
    parser = EventParser()
    list(parser.feed(f"retry: {value}\n\n".encode()))
    assert parser.retry_s is not None
    assert parser.retry_s <= 60


def test_a_stream_in_which_no_line_ends_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SILENCE_S", 0.5)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    async def scenario() -> None:
        async with (
            something_else(raw(head, again=b"x", every_s=0.01)) as url,
            ControlClient(url) as client,
        ):
            with pytest.raises(UnreachableError, match="no answer"):
                async for _ in client.events():
                    pass

    lived(scenario)


def test_a_watcher_keeps_so_many_characters() -> None:
    status = parse_status({"state": "READY", "since": AT})
    book = Logbook("http://x", status, time.monotonic)
    size = CHARACTERS_KEPT // 4
    for number in range(20):
        book.take(parse_entry("stage", {"at": AT, "id": number}, "", size))
    assert [entry.id for entry in book.scene().entries] == [16, 17, 18, 19]


def logs_of(text: bytes) -> Answer:
    return raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + text)


def test_lines_without_an_end_are_cut() -> None:
    async def scenario() -> None:
        async with (
            something_else(logs_of(b"y" * (3 * LINE_LIMIT) + b"\nlast")) as url,
            FleetClient(url, 5, own_only=True) as fleet,
        ):
            lines = [line async for line in fleet.follow("/logs", {})]
        assert lines[-1] == "last"
        assert "".join(lines[:-1]) == "y" * (3 * LINE_LIMIT)
        assert max(map(len, lines)) <= 3 * LINE_LIMIT

    lived(scenario)


# --- commands as a shell runs them


@contextlib.contextmanager
def aside(answer: Answer) -> Iterator[str]:
    """The URL of a server of a thread of its own."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    urls: list[str] = []

    async def serve() -> None:
        async with something_else(answer) as url:
            urls.append(url)
            started.set()
            await asyncio.Event().wait()

    task = loop.create_task(serve())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        for left in asyncio.all_tasks(loop):
            left.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(left)
        loop.close()


def command(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_logs_print_nothing_that_a_terminal_obeys(follow: list[str]) -> None:
    """Also into a pipe."""
    text = f'first\n{EVIL}\n{{"event": "{EVIL}"}}\nlast\n'
    with aside(logs_of(text.encode())) as url:
        done = command("logs", "a", "--fleet", url, *follow)
        out, err = done.communicate(timeout=DEADLINE_S)
    assert (done.returncode, err) == (0, "")
    lines = out.split("\n")
    assert (lines[0], lines[-2:]) == ("first", ["last", ""])
    assert len(lines) == 5
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)


ASKING = {
    "status": ["status", "URL"],
    "history": ["history", "URL"],
    "diagram": ["diagram", "URL"],
    "wait": ["wait", "URL", "--for", "READY"],
    "reload": ["reload", "--fleet", "URL", "--token", "t"],
    "stop": ["stop", "--all", "--fleet", "URL", "--token", "t"],
    "restart": ["restart", "a", "--fleet", "URL", "--token", "t"],
    "logs": ["logs", "a", "--fleet", "URL"],
    "follow": ["logs", "a", "-f", "--fleet", "URL"],
}


@pytest.mark.parametrize("words", ASKING.values(), ids=ASKING)
def test_ctrl_c_ends_a_command_to_a_server_that_drips(words: list[str]) -> None:
    asked = threading.Event()

    async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        writer.write(HEAD + b"\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)

    with aside(drips) as url:
        process = command(*(url if word == "URL" else word for word in words))
        assert asked.wait(DEADLINE_S)
        process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out.strip(), err) == (130, "", "")
    assert time.monotonic() - began_s < SOON_S


def full(pipe: Any) -> bool:
    """Whether so much waits in it that no further line has room."""
    waiting = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, waiting)
    return waiting[0] > fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) - 4096


def test_ctrl_c_ends_logs_that_nobody_reads() -> None:
    """The pipe is full: the write waits, and so would the event loop."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
    with aside(raw(head, again=b"y" * 1000 + b"\n")) as url:
        process = command("logs", "a", "-f", "--fleet", url)
        assert process.stdout is not None
        process.stdout.read(1)
        until(lambda: full(process.stdout), within_s=DEADLINE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(SOON_S) == 130
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()
