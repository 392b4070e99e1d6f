"""What may come in from outside, drawn by Hypothesis: for tests of whatever takes it.

Most of it is nearly right, as that gets further than noise does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from ichat_lifecycle.adapters.sd_notify import LIFECYCLE
from ichat_lifecycle.testing.hostile_worker import DATAGRAMS, PRINTED

_NUMBERS = ("0", "-1", "1e999", "NaN", "Infinity", "9" * 5000, "0x10", "\u0661")
_TEXTS = (
    "",
    "READY",
    "\x00",
    "\x1b]0;owned\x07",
    "\x9b2J",
    "\u202eevil",
    "a\nb",
    "\ud800",
    "[bold]x[/bold]",
    "../../etc/passwd",
    "http://evil.example/",
    "y" * 70_000,
)
_NAMES = (
    "state",
    "reason",
    "phase",
    "fraction",
    "expected_s",
    "control_url",
    "restarts",
    "start_id",
    "stop_asked",
    "event",
    "level",
    "logger",
    "worker",
    "timestamp",
    "message",
    "code",
)


def texts() -> st.SearchStrategy[str]:
    """Text with what terminals, parsers and logs would obey."""
    return st.one_of(st.sampled_from(_TEXTS), st.text(max_size=20))


def values() -> st.SearchStrategy[Any]:
    """What JSON can hold, and what Python's reads besides."""
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts())
    return st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(st.sampled_from(_NAMES), texts()), inner, max_size=6),
        ),
        max_leaves=12,
    )


def documents() -> st.SearchStrategy[bytes]:
    """JSON of an object, more or less."""
    objects = st.dictionaries(st.one_of(st.sampled_from(_NAMES), texts()), values(), max_size=8)
    whole = objects.map(lambda found: json.dumps(found).encode("utf-8", "replace"))
    deep = st.integers(1, 30_000).map(lambda depth: b'{"state":' + b"[" * depth)
    number = st.sampled_from(_NUMBERS).map(
        lambda text: b'{"state":"BOUND","expected_s":%b}' % text.encode()
    )
    return st.one_of(whole, whole.flatmap(_damaged), deep, number)


def datagrams() -> st.SearchStrategy[bytes]:
    """What a process may send to a notify socket."""
    names = st.sampled_from([LIFECYCLE.encode(), b"STATUS", b"READY", b"", b"\xff"])
    line = st.tuples(names, documents()).map(b"=".join)
    return st.one_of(
        st.lists(line, min_size=1, max_size=3).map(b"\n".join),
        st.sampled_from(DATAGRAMS),
        st.sampled_from(DATAGRAMS).flatmap(_damaged),
        st.binary(max_size=200),
    )


def output() -> st.SearchStrategy[bytes]:
    """What a process may print."""
    piece = st.one_of(
        documents(),
        st.sampled_from(PRINTED),
        st.sampled_from(PRINTED).flatmap(_damaged),
        st.sampled_from([b"\n", b"\r", b"\r\n", b"\x0b", b"\x85", b"\xe2\x80"]),
        st.binary(max_size=100),
    )
    return st.lists(piece, max_size=5).map(b"".join)


@st.composite
def _damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """With a piece of it cut out, and others put in."""
    first = draw(st.integers(0, len(whole)))
    last = draw(st.integers(first, min(len(whole), first + 20)))
    return whole[:first] + draw(st.binary(max_size=5)) + whole[last:]


_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "get", "G\x00T", "X" * 500)
_VERSIONS = (" HTTP/1.1", " HTTP/1.0", " HTTP/0.9", " HTTP/2.0", " HTTP/1.1 x", "")
_ENDS = ("\r\n", "\r\n", "\r\n", "\n", "\r")
_HEADERS = (
    "Host: 127.0.0.1",
    "Host: localhost:1",
    "Host: evil.example",
    "Host:",
    "Host: 127.0.0.1, evil.example",
    "Content-Length: 0",
    "Content-Length: 2",
    "Content-Length: -1",
    "Content-Length: 2, 3",
    "Content-Length: " + "9" * 400,
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding:\tchunked",
    "Connection: close",
    "Connection: keep-alive, Upgrade, HTTP2-Settings",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Expect: 100-continue",
    "Authorization: Bearer",
    "Authorization: Bearer wrong",
    "Authorization: Basic eA==",
    "Cookie: a=b",
    "Origin: http://evil.example",
    "Last-Event-ID: x-" + "9" * 5000,
    "X-Forwarded-For: 10.0.0.1",
    "X-Forwarded-Host: evil.example",
    "Content-Type: application/json",
    "Accept-Encoding: gzip",
    "Range: bytes=0-1,0-1,0-1",
    " folded: line",
    "no colon",
    "X: \x00",
    "X\x0b: y",
)
_BODIES = (
    b"",
    b"{}",
    b'{"now": 1}',
    b'{"model": "x", "messages": []}',
    b"[" * 1000,
    b"0\r\n\r\n",
    b"2\r\n{}\r\n0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFFF\r\n",
    b"2;x=y\r\n{}\r\n0\r\nX: y\r\n\r\n",
)
_TAILS = (
    "",
    "/",
    "//",
    "/..",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/%00",
    "/%ff",
    "/%",
    "\\..",
    "?after=1&after=2",
    "?after=x-" + "9" * 5000,
    "?after=-1",
    "?level=9",
    "?lines=-1",
    "?format=%0d%0aSet-Cookie:x",
    "#x",
    ";x",
)


def requests(paths: Sequence[str]) -> st.SearchStrategy[bytes]:
    """What a client may send on one connection: requests for these paths, more or less."""
    return st.lists(_request(paths), min_size=1, max_size=3).map(b"".join)


@st.composite
def _request(draw: st.DrawFn, paths: Sequence[str]) -> bytes:
    path = draw(st.sampled_from([*paths, "/", "*", "http://evil.example/", "evil.example:1"]))
    first = draw(st.sampled_from(_METHODS)) + " " + path + draw(st.sampled_from(_TAILS))
    headers = draw(st.lists(st.sampled_from(_HEADERS), max_size=6))
    end = draw(st.sampled_from(_ENDS))
    head = end.join([first + draw(st.sampled_from(_VERSIONS)), *headers, "", ""])
    whole = head.encode("latin-1") + draw(st.sampled_from(_BODIES))
    return draw(_damaged(whole)) if draw(st.integers(0, 3)) == 0 else whole
