"""Whether the listening socket of the main port is served: reached from outside, as by a client.

Whether the engine answers is shown within the process (see inner_app). This shows the rest: that a
connection is accepted, and that the HTTP server behind it answers. Any answer counts, also a
refusal by TLS, a key, or a middleware: whom these let in is the operator's choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl

from ichat_lifecycle.ports import Address

TIMEOUT_S = 5.0

# The gate answers it by itself in each state, so nothing behind it can keep the answer back.
REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

_DUAL_STACK = ("::1", "127.0.0.1")


async def knock(address: Address, timeout_s: float = TIMEOUT_S) -> str:
    """Connects and waits for the first sign of the server.

    Signs are a line of HTTP, and a TLS handshake that is finished or refused: a server that wants a
    certificate of the client's, or has no cipher in common with us, refuses ours.

    Args:
        timeout_s: seconds for each address that is tried.

    Returns:
        "" where the server answers, else what came instead, in words.
    """
    said = ""
    for host in _DUAL_STACK if address.host == "::" else (address.local_host,):
        try:
            async with asyncio.timeout(timeout_s):
                said = await _knock(address, host)
        except TimeoutError:
            said = f"no answer within {timeout_s:g} s"
        except OSError as error:
            said = _words(error)
        if not said:
            return ""
    return f"{address.url}: {said}"


async def _knock(address: Address, host: str) -> str:
    if address.uds:
        reader, writer = await asyncio.open_unix_connection(address.uds)
    else:
        reader, writer = await asyncio.open_connection(host, address.port)
    try:
        if address.tls:
            return await _greet(writer)
        writer.write(REQUEST)
        line = await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if line.startswith(b"HTTP/"):
        return ""
    return f"not HTTP: {line[:80]!r}" if line else "the connection was closed without an answer"


async def _greet(writer: asyncio.StreamWriter) -> str:
    # Our own socket, by an address that its certificate need not name.
    try:
        await writer.start_tls(_any_certificate(), server_hostname="localhost")
    except ssl.SSLError as error:
        return "" if "ALERT" in (error.reason or "") else _words(error)
    except ConnectionError:
        return ""  # asyncio's servers hang up without the alert that says why
    return ""


def _any_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _words(error: OSError) -> str:
    """The system's words: asyncio puts its own in their place."""
    if error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return str(error) or repr(error)
