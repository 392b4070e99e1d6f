"""Which names a request's `Host` may have: what keeps web pages from reading a loopback port.

A page of evil.example can have its name resolve to 127.0.0.1 once it is loaded (DNS rebinding), and
then reads what listens there as its own origin. The one trace of that is the `Host` header, which
the browser sends and the page cannot change. `X-Forwarded-Host` and its kin are never looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

ANY = "*"
# A name or an address, with or without a port. What is not of this form is no name that is allowed.
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{0,5})?")
_SCHEME = re.compile(rb"[a-z][a-z0-9+.-]{0,31}://")
_LOCALHOST = "localhost"


class HostNames:
    """The names for one listening socket.

    Args:
        bound: the host or address it is bound to; None or "" for a Unix socket, which no browser
            reaches, and on which any name passes.
        names: further ones, without a port; "*" for any.

    On a loopback address only names of loopback and `names` pass. On any other one every name
    passes, unless there are `names`; then they do, those of loopback, and addresses: a page whose
    own address is that of the server has been loaded from it.
    """

    def __init__(self, bound: str | None, names: Iterable[str] = ()) -> None:
        given = {_plain(name) for name in names}
        local = bool(bound) and _is_loopback(_plain(bound or ""))
        self._any_page = ANY in given or not bound
        self._any = self._any_page or not (local or given)
        self._addresses = not local
        self._names = given | ({_plain(bound)} if bound else set())

    def allow(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request with these ASGI headers passes.

        Every `Host` has to. One without it does: it is HTTP/1.0, which browsers do not speak.
        """
        return self._any or all(self._allows(value) for name, value in headers if name == b"host")

    def allow_page(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the page that asks, if one of another origin does, is of one of these names.

        Where an answer's CORS headers let any page read it, this tells the pages apart, whatever
        the address is: a browser on this machine reaches it by loopback. A page that has been
        loaded from here passes, by whatever name that was.
        """
        values = list(headers)
        hosts = {value.lower() for name, value in values if name == b"host"}
        origins = [value.lower() for name, value in values if name == b"origin"]
        return self._any_page or all(self._allows_origin(origin, hosts) for origin in origins)

    def _allows_origin(self, origin: bytes, hosts: Collection[bytes]) -> bool:
        scheme = _SCHEME.match(origin)  # none in "null", as a page in a sandbox sends it
        if scheme is None:
            return False
        place = origin[scheme.end() :]
        name = _name_in(place)
        return name is not None and (place in hosts or self._is_ours(name))

    def _allows(self, header: bytes) -> bool:
        name = _name_in(header)
        if name is None:
            return False
        return self._is_ours(name) or (self._addresses and _address(name) is not None)

    def _is_ours(self, name: str) -> bool:
        return name in self._names or _is_loopback(name)


def _name_in(header: bytes) -> str | None:
    found = _HOST.fullmatch(header.decode("latin-1").strip())
    return None if found is None else _plain(found["name"])


def _plain(name: str) -> str:
    """In the one form in which names are compared."""
    name = name.strip().lower().removeprefix("[").removesuffix("]")
    return name.removesuffix(".")


def _is_loopback(name: str) -> bool:
    """Browsers resolve all names below localhost to loopback themselves."""
    if name == _LOCALHOST or name.endswith(f".{_LOCALHOST}"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
