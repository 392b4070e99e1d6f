"""The address that a worker gives to the Gateway: one at which the Gateway can reach it.

A worker that listens on all interfaces has no single address. The one of the interface that leads
to the Gateway is right; the host's name, which is a Pod's name in Kubernetes, often resolves
nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import structlog

from ichat_lifecycle.redact import redact

log = structlog.get_logger("ichat_lifecycle.heartbeat")

GATEWAY_PORT = 80
_UNIX = "unix:"
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
Family = socket.AddressFamily


def advertisable(text: str) -> str:
    """A host as others may be given it: a name, or an address without brackets.

    Raises:
        ValueError: it is neither, or an address that means every interface.
    """
    host = text.strip().removeprefix("[").removesuffix("]")
    if not (_NAME.fullmatch(host) or _ip(host)):
        raise ValueError(f"{text!r}: expected a host name or an address, without a port")
    if is_wildcard(host):
        raise ValueError(f"{text} means every interface: expected one that others can reach")
    return host


def is_wildcard(host: str) -> bool:
    """Whether it means every interface of the machine."""
    ip = _ip(host)
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    if ip is not None:
        return ip.is_unspecified
    return not host or _is_zero(host)


def _is_zero(host: str) -> bool:
    """Whether it is another spelling of 0.0.0.0 that the system takes, such as `0` or `0x0`."""
    with contextlib.suppress(OSError, UnicodeError):
        return not any(socket.inet_aton(host))
    return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of a name only what can be seen without asking DNS."""
    ip = _ip(host)
    return host.lower() == "localhost" if ip is None else ip.is_loopback


def is_here(host: str) -> bool:
    """Whether a Gateway's host is clearly this machine, without asking DNS."""
    if is_loopback(host) or is_wildcard(host) or host.lower() == socket.gethostname().lower():
        return True
    if _ip(host) is None:
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))  # possible with an address of this machine alone
        return True
    return False


def gateway_host(gateway: str) -> tuple[str, int]:
    """The host and the port of a Gateway's address."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(gateway if "://" in gateway else f"http://{gateway}")
        return parts.hostname or "", parts.port or GATEWAY_PORT
    return "", GATEWAY_PORT


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0])
    return None


class Advertised:
    """Host and port as the Gateway gets them.

    Args:
        gateway: its address.
        listening: host, port and path of a Unix socket where the worker listens, asked each time.
        host: given by the user; None: the address of the interface that leads to the Gateway where
            the worker listens on every interface, else where it listens.
        port: given by the user; None: the one where it listens.
    """

    def __init__(
        self,
        gateway: str,
        listening: Callable[[], tuple[str, int, str | None]],
        host: str | None = None,
        port: int | None = None,
    ) -> None:
        self._gateway = gateway
        self._listening = listening
        self._host = host
        self._port = port
        self._found: str | None = None
        self._compared = False

    @property
    def where(self) -> tuple[str, int]:
        """Host and port; until `look` has found a better one, the host's name."""
        host, port, uds = self._listening()
        if uds and self._host is None:
            return f"{_UNIX}{uds}", 0
        if is_wildcard(host):
            host = self._found or socket.gethostname()
        return self._host or host, self._port or port

    async def look(self) -> None:
        """Finds the interface that leads to the Gateway; once it is found, does nothing.

        Logs a warning, once, if the Gateway is on another machine and cannot reach the worker.
        """
        host, _, uds = self._listening()
        wanted = self._host is None and not uds and is_wildcard(host) and self._found is None
        if not wanted and self._compared:
            return
        # 0.0.0.0 listens on no address of IPv6.
        only_v4 = wanted and ":" not in host
        family = socket.AF_INET if only_v4 else socket.AF_UNSPEC
        with contextlib.suppress(OSError, UnicodeError):
            here, there = await _route(*gateway_host(self._gateway), family)
            if wanted:
                self._found = here
            self._compare(here, there)

    def _compare(self, here: str, there: str) -> None:
        host, _ = self.where
        self._compared = True
        if is_loopback(there) or here == there:
            return
        if host.startswith(_UNIX) or is_loopback(host):
            log.warning(
                "advertised_unreachable",
                gateway=redact(self._gateway),
                host=host,
                hint="the Gateway is on another machine: listen with --host 0.0.0.0, or give the "
                "address at which it reaches this worker with --advertise-host",
            )


async def _route(host: str, port: int, family: Family) -> tuple[str, str]:
    """The addresses of both ends of the way to a host. Nothing is sent.

    Raises OSError.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
    kind, _, _, _, address = found[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as sock:
        sock.connect(address)  # of a datagram socket: only the kernel's table of routes is asked
        return str(sock.getsockname()[0]), str(sock.getpeername()[0])
