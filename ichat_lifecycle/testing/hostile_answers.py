"""Answers over HTTP that no client should be harmed by, for tests of whoever asks others.

Each is what a server sends on one connection, in pieces. A piece of None is a pause. Some of them
do not end by themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Self

PAUSE_S = 0.05  # of a piece that is None
REQUEST_S = 5.0  # for the request that is answered, and for a client that does not read
ANSWER_S = 60.0  # the longest of those that do not end
CHUNK = 64 * 1024

Pieces = Iterator[bytes | None]

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_OPEN = _HEAD + b"Connection: close\r\n\r\n"  # the body ends with the connection


def _whole(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return _HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _endless_body() -> Pieces:
    yield _OPEN + b'{"state": "'
    yield from itertools.repeat(b"x" * CHUNK)


def _dripping_body() -> Pieces:
    yield _OPEN + b'{"state": "'
    for _ in itertools.count():
        yield b"x"
        yield None


def _dripping_head() -> Pieces:
    yield _HEAD
    for number in itertools.count():
        yield b"X-%d: y\r\n" % number
        yield None


def _endless_head() -> Pieces:
    yield _HEAD
    for number in itertools.count():
        yield b"X-%d: %b\r\n" % (number, b"y" * 1000)


def _endless_early_hints() -> Pieces:
    yield from itertools.repeat(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100)


def _never() -> Pieces:
    yield from itertools.repeat(None)


def _bomb() -> Pieces:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    yield _whole(body, b"Content-Encoding: gzip")


def _one(answer: bytes) -> Callable[[], Pieces]:
    return lambda: iter((answer,))


ANSWERS: Mapping[str, Callable[[], Pieces]] = {
    "endless body": _endless_body,
    "dripping body": _dripping_body,
    "dripping head": _dripping_head,
    "endless head": _endless_head,
    "endless early hints": _endless_early_hints,
    "never": _never,
    "gzip bomb": _bomb,
    "closed at once": _one(b""),
    "deep JSON": _one(_whole(b"[" * 50_000)),
    "long number": _one(_whole(b'{"state": 1' + b"0" * 20_000 + b"}")),
    "no finite number": _one(_whole(b'{"state": "READY", "fraction": NaN, "for_s": 1e999}')),
    "no JSON": _one(_whole(b"\xff\xfe<html>")),
    "no object": _one(_whole(b'"READY"')),
    "wrong kinds": _one(_whole(b'{"state": ["READY"], "reason": 7, "control_url": {}}')),
    "a terminal's commands": _one(
        _whole(b'{"state": "READY\\u001b]0;owned\\u0007\\u009b2J", "model": "\\u202e\\u001b[5m"}')
    ),
    "cookies and hop-by-hop": _one(
        _whole(
            b"{}",
            b"Set-Cookie: session=of-the-worker",
            b"Connection: X-Secret, close",
            b"X-Secret: 1",
            b"Proxy-Authenticate: Basic",
            b"Upgrade: h2c",
        )
    ),
    "redirect": _one(
        b"HTTP/1.1 307 Moved\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"
    ),
    "two lengths": _one(_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}"),
    "wrong chunks": _one(_HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n{}"),
    "no HTTP": _one(b"\x00\x16\x03\x01SSH-2.0\r\n\r\n"),
}


class Answering:
    """A server on loopback that gives one of these answers, or all of them in turn.

    A context manager.

    Args:
        names: of ANSWERS; default: all.
        port: where it listens; 0 (default): any free one.

    Attributes:
        port, url: where it listens.
        asked: how many connections there were.
    """

    def __init__(self, *names: str, port: int = 0) -> None:
        self._answers = itertools.cycle([ANSWERS[name] for name in names or ANSWERS])
        self._sock = socket.create_server(("127.0.0.1", port))
        self._ends = threading.Event()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._threads: list[threading.Thread] = []
        self.asked = 0
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._accepting.join()
        self._sock.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while not self._ends.is_set():
            try:
                connection, _ = self._sock.accept()
            except OSError:
                continue  # out of descriptors, or it is the end
            self.asked += 1
            thread = threading.Thread(
                target=self._answer, args=(connection, next(self._answers)()), daemon=True
            )
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _answer(self, connection: socket.socket, pieces: Pieces) -> None:
        end_s = time.monotonic() + ANSWER_S
        with connection, contextlib.suppress(OSError):
            connection.settimeout(REQUEST_S)
            connection.recv(CHUNK)
            for piece in pieces:
                if self._ends.is_set() or time.monotonic() > end_s:
                    return
                if piece is None:
                    self._ends.wait(PAUSE_S)
                else:
                    connection.sendall(piece)
