"""Whether the main port is served, however it lets clients in: TLS, certificates, Unix sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from ichat_lifecycle.adapters.front_door import knock
from ichat_lifecycle.adapters.inner_app import below_middleware
from ichat_lifecycle.adapters.sockets import SocketBinder
from ichat_lifecycle.ports import Address

CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))


async def unauthorized(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def served(sock: socket.socket, use: Callable[[], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """Runs `use` while Uvicorn serves on the socket."""

    async def main() -> Any:
        config = uvicorn.Config(unauthorized, lifespan="off", log_config=None, **options)
        config.load()
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            async with asyncio.timeout(60):
                while not server.started:
                    await asyncio.sleep(0.01)
                return await use()
        finally:
            server.should_exit = True
            await running

    return asyncio.run(main())


TLS = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": CERTIFICATE}


@pytest.mark.parametrize(
    "options",
    [
        {},
        TLS,
        {**TLS, "ssl_ca_certs": CERTIFICATE, "ssl_cert_reqs": int(ssl.CERT_REQUIRED)},
        {**TLS, "ssl_ca_certs": CERTIFICATE, "ssl_cert_reqs": int(ssl.CERT_OPTIONAL)},
        {**TLS, "ssl_ciphers": "ECDHE-ECDSA-AES128-GCM-SHA256"},
        {"h11_max_incomplete_event_size": 60},
    ],
    ids=["plain", "tls", "client certificate", "optional one", "ciphers", "small limit"],
)
def test_a_port_that_is_served_is_reached(options: dict[str, Any]) -> None:
    """Also one that lets in only clients with a certificate that we do not have."""
    sock = socket.create_server(("127.0.0.1", 0))
    address = Address("127.0.0.1", sock.getsockname()[1], tls="ssl_certfile" in options)
    assert served(sock, lambda: knock(address), **options) == ""


@pytest.mark.parametrize("tls", [False, True])
def test_a_unix_socket_is_reached(tmp_path: Path, tls: bool) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "main.sock"))
    sock.listen()
    address = Address(uds=str(tmp_path / "main.sock"), tls=tls)
    assert served(sock, lambda: knock(address), **(TLS if tls else {})) == ""


def test_a_server_that_has_no_cipher_of_ours_refuses_us_and_so_is_there() -> None:
    async def main() -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-SHA")  # for a kind of key that the certificate is not of
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await knock(Address("127.0.0.1", port, tls=True))

    assert asyncio.run(main()) == ""


def test_one_that_never_answers_is_reported_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = Address("127.0.0.1", sock.getsockname()[1])
        found = asyncio.run(knock(address, timeout_s=0.05))
    assert found == f"{address.url}: no answer within 0.05 s"


def test_tls_where_none_is_spoken_is_reported() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    address = Address("127.0.0.1", sock.getsockname()[1], tls=True)
    assert "https://" in served(sock, lambda: knock(address))


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1", "localhost", "::", "::1"])
def test_a_bound_address_is_looked_at_by_its_number(host: str) -> None:
    """A name may resolve to another address by the time it is asked for again."""

    async def main() -> str:
        binder = SocketBinder(lambda: Address(host, 0))
        sock = await binder.bind()
        assert binder.inside is not None
        assert binder.inside.host != "localhost"
        server = await asyncio.start_server(answer, sock=sock)
        async with server:
            found = await knock(binder.inside)
        await binder.release()
        return found

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    if ":" in host and not _has_ipv6():
        pytest.skip("no IPv6 here")
    assert asyncio.run(main()) == ""


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_of_vllms_middleware_only_that_stays_which_speaks_of_the_engine() -> None:
    class Middleware:
        def __init__(self, cls: type) -> None:
            self.cls = cls

    class App:
        def __init__(self) -> None:
            self.middleware_stack: Any = "built"
            self.user_middleware: list[Middleware] = []
            self.state = object()

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            raise NotImplementedError

    def named(name: str, module: str) -> Middleware:
        return Middleware(type(name, (), {"__module__": module}))

    scaling = named("ScalingMiddleware", "vllm.entrypoints.serve.elastic_ep.middleware")
    app = App()
    app.user_middleware = [
        named("ScalingMiddleware", "theirs"),
        named("AuthenticationMiddleware", "vllm.entrypoints.serve.middleware.authenticate"),
        scaling,
    ]
    inner: Any = below_middleware(app)
    assert inner.user_middleware == [scaling]
    assert inner.middleware_stack is None
    assert inner.state is app.state
    assert (len(app.user_middleware), app.middleware_stack) == (3, "built"), "left as it was"
    assert below_middleware(unauthorized) is unauthorized
