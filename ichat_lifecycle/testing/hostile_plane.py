"""A server whose answers never end, never begin, are bombs, or lie. For tests of who asks one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

LOOPBACK = "127.0.0.1"
PIECE = b"a" * 65536
DRIP_S = 0.05

Trick = Callable[[asyncio.StreamWriter], Awaitable[None]]


class HostilePlane:
    """Answers each request on 127.0.0.1 with a trick.

    Args:
        port: where it listens; 0 (default): any free one.

    Attributes:
        trick: what is done with the next requests; see TRICKS and `answer`.
        heads: of all requests, as they came.
        open: connections that are open now.
        most_open: how many there were at a time.
    """

    def __init__(self, trick: Trick, port: int = 0) -> None:
        self.trick = trick
        self._port = port
        self.heads: list[bytes] = []
        self.open = 0
        self.most_open = 0
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[HostilePlane]:
        """While it lasts, it answers at `url`."""
        tasks: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._answer(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(connected, LOOPBACK, self._port)
        self.url = f"http://{LOOPBACK}:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        gone = None
        try:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            doing = asyncio.ensure_future(self.trick(writer))
            gone = asyncio.ensure_future(_end_of(reader))
            await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
        except (OSError, EOFError):
            pass
        finally:
            self.open -= 1
            if gone is not None:
                gone.cancel()
            writer.close()


async def _end_of(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass


def answer(
    body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None, length: int = -1
) -> Trick:
    """An answer in one piece.

    Args:
        length: what it announces; default: what it has.
    """
    lines = [f"HTTP/1.1 {status} A", f"Content-Length: {length if length >= 0 else len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    data = "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async def trick(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return trick


def document(**more: Any) -> Trick:
    """What an honest worker answers at `/lifecycle`, or nearly so."""
    return answer(json.dumps({"state": "READY", **more}).encode())


def endless(first: bytes, piece: bytes, every_s: float = 0.0) -> Trick:
    """One piece after another, for as long as somebody reads."""

    async def trick(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(every_s)

    return trick


async def _nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def in_turn() -> Trick:
    """All of TRICKS and LIES, one for each request."""
    tricks = itertools.cycle([*TRICKS.values(), *LIES.values()])

    async def trick(writer: asyncio.StreamWriter) -> None:
        await next(tricks)(writer)

    return trick


_HEAD = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_DEEP = 100_000

TRICKS: Mapping[str, Trick] = {
    "silent": _nothing,
    "hangs up": _hang_up,
    "a dripping head": endless(_HEAD + b"X: ", b"a", DRIP_S),
    "an endless head": endless(_HEAD, b"X: " + b"a" * 1000 + b"\r\n"),
    "an endless line": endless(_HEAD + b"X: ", PIECE),
    "a dripping body": endless(_CHUNKED, b"1\r\n \r\n", DRIP_S),
    "an endless body": endless(_CHUNKED, b"10000\r\n" + PIECE + b"\r\n"),
    "endless tiny chunks": endless(_CHUNKED, b"1\r\na\r\n" * 1000),
    "endless trailers": endless(_CHUNKED + b"0\r\n", b"X: " + b"a" * 1000 + b"\r\n"),
    "endless interim answers": endless(b"", b"HTTP/1.1 102 A\r\n\r\n" * 100),
    "a body that ends early": answer(b'{"state"', length=100),
    "a terabyte": answer(b"{", length=2**40),
    "a large document": document(a="a" * 300_000),
    "a compressed bomb": answer(
        zlib.compress(b" " * 10_000_000, 9), headers={"Content-Encoding": "deflate"}
    ),
    "deep lists": answer(b'{"state":' + b"[" * _DEEP + b"]" * _DEEP + b"}"),
    "rather deep lists": answer(b'{"state":' + b"[" * 900 + b"]" * 900 + b"}"),
    "deep objects": answer(b'{"a":' * 500 + b"1" + b"}" * 500),
    "NaN": answer(b'{"state": NaN}'),
    "infinity": answer(b'{"state": 1e999}'),
    "a long number": answer(b'{"state": ' + b"9" * 4000 + b"}"),
    "a longer number": answer(b'{"state": ' + b"9" * 5000 + b"}"),
    "a list": answer(b"[1]"),
    "text": answer(b'"READY"'),
    "not UTF-8": answer(b'{"state": "\xff"}'),
    "no JSON": answer(b"{"),
    "an error": answer(b'{"state": "READY"}', status=500),
    "a redirect": answer(b"{}", status=302, headers={"Location": "http://127.0.0.1:1/"}),
    "two lengths": answer(b"{}", headers={"content-length": "3"}),
    "wrong chunks": endless(_CHUNKED, b"F" * 20 + b"\r\n", DRIP_S),
    "not HTTP": endless(b"hello\r\n", b"hello\r\n", DRIP_S),
}

# What can be passed on as a document, and is none of an honest worker.
LIES: Mapping[str, Trick] = {
    "wrong kinds": answer(b'{"state": ["READY"], "reason": 7, "control_url": {}, "for_s": -1}'),
    "a terminal's commands": document(
        model="\x1b]0;owned\x07\x9b2J", reason={"message": "\u202e\x1b[5m[bold]x", "code": "\n"}
    ),
    "cookies, and headers of a connection": answer(
        b"{}",
        headers={
            "Set-Cookie": "session=of-the-worker",
            "Connection": "X-Secret, close",
            "X-Secret": "1",
            "Upgrade": "h2c",
        },
    ),
}
