"""Clients that do a server all the harm that they can, for tests of whoever listens.

Each trick is one connection to a host and a port, without a token. None of them lasts longer than
TRICK_S, and none expects an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

TRICK_S = 5.0
CHUNK = b"x" * 65_536
PIPELINED = 50
LARGE = 20 * 2**20  # what it would send if it were let

_COMMANDS = ("/fleet/stop", "/fleet/reload", "/lifecycle/stop")

Trick = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


@dataclass(frozen=True)
class Target:
    """Who is attacked, and a path where there is something to read or to command."""

    port: int
    path: str = "/"
    host: str = "127.0.0.1"


def _get(path: str, *headers: str, host: str = "127.0.0.1") -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode("latin-1")


def _post(path: str, *headers: str, length: int = 2) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n{lines}\r\n"
    return head.encode()


def _guess(path: str) -> bytes:
    return _post(path, f"Authorization: Bearer {random.getrandbits(128):x}") + b"{}"


def _sends(text: bytes) -> Trick:
    async def trick(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()
        await reader.read(1000)

    return trick


def _pours(head: bytes, piece: bytes = CHUNK) -> Trick:
    """As much as is taken, up to LARGE."""

    async def trick(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for _number in range(LARGE // len(piece)):
            writer.write(piece)
            await writer.drain()

    return trick


def _drips(head: bytes, piece: bytes) -> Trick:
    async def trick(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)

    return trick


async def _stays(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def _goes(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def _reads_nothing(requests: bytes) -> Trick:
    async def trick(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # of sockets
        writer.write(requests)
        await asyncio.sleep(TRICK_S)

    return trick


def tricks(path: str) -> Mapping[str, Trick]:
    """All of them, against this path."""
    chunked = "Transfer-Encoding: chunked"
    return {
        "nothing": _stays,
        "goes at once": _goes,
        "an endless header": _pours(f"GET {path} HTTP/1.1\r\nX: ".encode()),
        "endless headers": _pours(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode(), b"X: y\r\n" * 1000
        ),
        "an endless target": _pours(b"GET /"),
        "an endless body": _pours(_post(path, length=LARGE)),
        "endless chunks": _pours(
            f"POST {path} HTTP/1.1\r\nHost: x\r\n{chunked}\r\n\r\n".encode(),
            b"1000\r\n" + b"x" * 4096 + b"\r\n",
        ),
        "an endless extension of a chunk": _pours(
            f"POST {path} HTTP/1.1\r\nHost: x\r\n{chunked}\r\n\r\n1;".encode()
        ),
        "a dripping head": _drips(f"GET {path} HTTP/1.1\r\n".encode(), b"X: y\r\n"),
        "a dripping body": _drips(_post(path, length=1_000_000), b"x"),
        "many at once": _sends(_get(path) * PIPELINED),
        "many that it does not read": _reads_nothing(_get(path) * PIPELINED),
        "a stream": _sends(_get("/fleet/events") + _get("/lifecycle/events")),
        "a stream that it does not read": _reads_nothing(_get("/fleet/events")),
        "a wrong token": _sends(_guess("/fleet/stop")),
        "many wrong tokens": _sends(
            b"".join(_guess(command) for command in _COMMANDS for _ in range(PIPELINED))
        ),
        "no token": _sends(_post("/lifecycle/stop") + b"{}"),
        "another host": _sends(_get(path, host="evil.example")),
        "two hosts": _sends(_get(path, "Host: evil.example")),
        "two lengths": _sends(_post(path, "Content-Length: 5") + b"{}"),
        "a length and chunks": _sends(_post(path, chunked) + b"0\r\n\r\n"),
        "HTTP/0.9": _sends(b"GET /\r\n"),
        "another protocol": _sends(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(300)),
        "no HTTP": _sends(random.randbytes(2000) + b"\r\n\r\n"),
        "a long number": _sends(_get("/fleet/events?after=x-" + "9" * 5000)),
        "a NUL in a path": _sends(_get("/fleet/x/%00")),
        "a way out of a path": _sends(_get("/fleet/a/..%2f..%2f%2e%2e/etc/passwd")),
        "deep JSON": _sends(_post(path, length=60_000) + b"[" * 60_000),
        "a WebSocket": _sends(
            _get(
                path,
                "Upgrade: websocket",
                "Connection: Upgrade",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        ),
    }


class Flood:
    """Strangers at some targets, all tricks in turn, for as long as run() is not cancelled.

    Args:
        at_once: connections to each target.
        pause_s: of each connection between two tricks.

    Attributes:
        counts: how often each trick was done.
    """

    def __init__(self, targets: Sequence[Target], at_once: int, pause_s: float) -> None:
        self._targets = targets
        self._at_once = at_once
        self._pause_s = pause_s
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for target in self._targets:
                for number in range(self._at_once):
                    group.create_task(self._keep_on(target, number))

    async def _keep_on(self, target: Target, number: int) -> None:
        named = list(tricks(target.path).items())
        for name, trick in itertools.cycle(named[number:] + named[:number]):
            self.counts[name] += 1
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(TRICK_S):
                    await _on_connection(target, trick)
            await asyncio.sleep(self._pause_s)


async def _on_connection(target: Target, trick: Trick) -> None:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        await trick(reader, writer)
    finally:
        writer.transport.abort()
