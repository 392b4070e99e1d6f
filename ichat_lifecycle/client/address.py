"""Where a worker or a fleet is to be asked, as a person writes it."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from ichat_lifecycle.errors import ArgumentsError

LOOPBACK = "127.0.0.1"
UNIX = "unix:"


def base_url(text: str) -> str:
    """`text` as the URL below which a worker's routes are. HOST:PORT, :PORT, and PORT are taken.

    Raises:
        ArgumentsError: it is no such URL.
    """
    hint = "give the control plane's, such as http://127.0.0.1:18000"
    return _base(text, "/lifecycle", "worker", hint)


def fleet_url(text: str) -> str:
    """As base_url, for a fleet's supervisor. unix:PATH is taken, too.

    localhost is 127.0.0.1, where a supervisor listens by default: whose process listens there is
    looked up before it is asked, and ::1 may be another user's.

    Raises:
        ArgumentsError: it is no such URL.
    """
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if not path or "\0" in path:
            raise ArgumentsError(f"{text!r} is no URL of a fleet: it has no path")
        return f"{UNIX}{os.path.abspath(path)}"  # noqa: PTH100  # links stay as they are written
    hint = "give the supervisor's, such as http://127.0.0.1:14000 or unix:PATH"
    url = _base(text, "/fleet", "fleet", hint)
    scheme, _, rest = url.partition("://")
    if urlsplit(url).hostname == "localhost":
        rest = LOOPBACK + rest[len("localhost") :]
    return f"{scheme}://{rest}"


def _base(text: str, route: str, of_what: str, hint: str) -> str:
    def wrong(why: str) -> ArgumentsError:
        return ArgumentsError(f"{text!r} is no URL of a {of_what}: {why}", hint=hint)

    port_alone = f":{text}" if text.isascii() and text.isdigit() else text
    host = LOOPBACK if port_alone.startswith(":") else ""
    full = text if "://" in text else f"http://{host}{port_alone}"
    try:
        parts = urlsplit(full)
        _ = parts.port  # raises where it is none
    except ValueError as error:
        raise wrong(str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise wrong("it is neither http nor https, or has no host")
    if parts.netloc.endswith(":"):
        raise wrong("it has no port")
    if parts.query or parts.fragment or "@" in parts.netloc or not full.isprintable():
        raise wrong("only a host, a port and a path are taken")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix(route)}"
