"""Fault 21: the control plane under attack."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator

import httpx
from harness import Worker

from .lab import TOKEN, Lab
from .measure import COMPLETE, Measured, Streams, all_are, outcomes

CONNECTIONS = 200
BODY_BYTES = 100 * 2**20
WRONG_TOKENS = 15
MALFORMED = (
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /lifecycle HTTP/9.9\r\n\r\n",
    b"POST /lifecycle/stop HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(5000)) + b"\r\n",
)


def attacked(lab: Lab) -> Measured:
    """Connections that never send, a huge body, malformed HTTP, and wrong tokens, all at once."""
    measured = Measured()
    server = lab.shared()
    seq = server.get("/lifecycle").json()["seq"]
    with _idle_connections(server), Streams(server.main, tokens=600) as streams:
        began = time.monotonic()
        measured.claim("/readyz answers", server.get("/readyz").status_code == httpx.codes.OK)
        measured.number("/readyz", time.monotonic() - began)
        statuses = _guess(server)
        measured.number("wrong tokens", " ".join(f"{statuses.count(s)}x{s}" for s in (401, 429)))
        measured.claim("wrong tokens get 401", statuses[0] == 401, statuses)
        measured.claim("and are rate-limited", statuses[-1] == 429, statuses)
        for bytes_sent in MALFORMED:
            _send_raw(server, bytes_sent)
        took = _send_huge_body(server)
        measured.number("100 MB body", took)
        measured.claim("a huge body is refused early", took < 5, took)
        measured.claim("/readyz still answers", server.get("/readyz").status_code == httpx.codes.OK)
        ended = streams.ended(120)
    measured.number("streams", outcomes(ended))
    measured.claim("serving is unaffected", all_are(ended, COMPLETE), ended)
    document = server.get("/lifecycle").json()
    measured.claim("still READY, without a transition", document["seq"] == seq, document["state"])
    return measured


@contextlib.contextmanager
def _idle_connections(server: Worker) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            address = ("127.0.0.1", server.control_port)
            stack.enter_context(socket.create_connection(address, timeout=10))
        yield


def _guess(server: Worker) -> list[int]:
    with httpx.Client(base_url=server.control, timeout=20) as client:
        return [
            client.post(
                "/lifecycle/stop", headers={"Authorization": f"Bearer {TOKEN[:-1]}{n}"}
            ).status_code
            for n in range(WRONG_TOKENS)
        ]


def _send_raw(server: Worker, data: bytes) -> None:
    address = ("127.0.0.1", server.control_port)
    with (
        contextlib.suppress(OSError),
        socket.create_connection(address, timeout=15) as client,
    ):
        client.sendall(data)
        client.recv(65536)


def _send_huge_body(server: Worker) -> float:
    """Seconds until the server has refused it, one way or the other."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", server.control_port, timeout=20)
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/lifecycle/stop", iter(_chunks()), {"Expect": ""})
        connection.getresponse().read()
    connection.close()
    return time.monotonic() - began


def _chunks() -> Iterator[bytes]:
    for _ in range(BODY_BYTES // 2**20):
        yield b"x" * 2**20
