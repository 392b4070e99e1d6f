"""Which proxy of the environment leads to a URL.

Not left to httpx, which fails for a NO_PROXY with an IPv6 network in it, even where no proxy would
be used, and which asks a proxy for this machine's own ports. Nor to Python's own NO_PROXY alone,
which knows no networks, no `*.corp`, and no `[fd00::1]`, as curl and Go do: that of a Pod names its
cluster's networks.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_PORTS = {"http": 80, "https": 443}


def proxy_for(url: str) -> str | None:
    """The proxy's URL by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; None for none."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme)
    proxies = getproxies()
    direct = (_fits(entry, host, port) for entry in re.split(r"[,\s]+", proxies.get("no", "")))
    if _is_loopback(host) or any(direct) or proxy_bypass(host):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _fits(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of NO_PROXY, a name or a network, perhaps with a port, has this host."""
    name = entry
    if _network(entry) is None:  # a bare IPv6 address has colons, too
        before, _, digits = entry.rpartition(":")
        if before and digits.isdecimal():
            if int(digits) != port:
                return False
            name = before
    network, address = _network(name), _address(host)
    if network is not None:
        return address is not None and address in network
    name = name.lower().removeprefix("*").lstrip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """A single address is a network of one."""
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    if address is not None:
        return address.is_loopback
    return host == "localhost" or host.endswith(".localhost")
