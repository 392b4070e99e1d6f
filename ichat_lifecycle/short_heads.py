"""httpx's transport, for whoever answers: the head of an answer has an end.

httpx has no limit on what comes before an answer: `100 Continue` again and again, each of which
costs more than it costs to send, for as long as the time-outs allow.
"""

from __future__ import annotations

import ssl
from typing import Any

import httpcore
import httpx

HEAD_BYTES = 16 * 1024  # with what comes before it; a usual one has some hundreds
PIECE = 4096  # read at once of a head; the beginning of a body may come along


class ShortHeads(httpx.AsyncHTTPTransport):
    """Without proxies, redirects or a trust in the environment.

    An answer whose head is too large is a ReadError.

    Args:
        verify: the certificates that are trusted; False: none has to be.
        uds: the path of a Unix socket; default: TCP.
        keep: whether connections are used again.
    """

    def __init__(
        self, verify: ssl.SSLContext | bool = False, uds: str | None = None, *, keep: bool = True
    ) -> None:
        super().__init__(verify=verify, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(  # httpx has no parameter for the backend
            ssl_context=httpx.create_ssl_context(verify=verify, trust_env=False),
            max_connections=None,
            max_keepalive_connections=None if keep else 0,
            keepalive_expiry=5.0,
            uds=uds,
            network_backend=_Backend(),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(request)
        stream = answer.extensions.get("network_stream")
        if isinstance(stream, _Stream):
            stream.pass_body()
        return answer


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self) -> None:
        self._real = httpcore.AnyIOBackend()

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._real.connect_tcp(*args, **kwargs))

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._real.connect_unix_socket(*args, **kwargs))

    async def sleep(self, seconds: float) -> None:
        await self._real.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, real: httpcore.AsyncNetworkStream) -> None:
        self._real = real
        self._left: int | None = HEAD_BYTES  # of a head; None for a body

    def pass_body(self) -> None:
        """The head is whole."""
        self._left = None

    async def read(
        self,
        max_bytes: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's
    ) -> bytes:
        if self._left is None:
            return await self._real.read(max_bytes, timeout)
        if self._left <= 0:
            raise httpcore.ReadError(f"more than {HEAD_BYTES} bytes before an answer")
        data = await self._real.read(min(max_bytes, PIECE), timeout)
        self._left -= len(data)
        return data

    async def write(
        self,
        buffer: bytes,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's
    ) -> None:
        self._left = HEAD_BYTES  # of the next answer: a request is sent whole before that is read
        await self._real.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._real.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._real.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._real.get_extra_info(info)
