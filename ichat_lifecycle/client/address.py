"""Where a worker is to be asked, as a person writes it."""

from __future__ import annotations

from urllib.parse import urlsplit

from ichat_lifecycle.errors import ArgumentsError

LOOPBACK = "127.0.0.1"


def base_url(text: str) -> str:
    """`text` as the URL below which the routes are. HOST:PORT and :PORT are taken too.

    Raises:
        ArgumentsError: it is no such URL.
    """
    full = text if "://" in text else f"http://{LOOPBACK if text.startswith(':') else ''}{text}"
    try:
        parts = urlsplit(full)
        _ = parts.port  # raises where it is none
    except ValueError as error:
        raise _wrong(text, str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _wrong(text, "it is neither http nor https, or has no host")
    if parts.query or parts.fragment or "@" in parts.netloc or not full.isprintable():
        raise _wrong(text, "only a host, a port and a path are taken")
    path = parts.path.rstrip("/").removesuffix("/lifecycle")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _wrong(text: str, why: str) -> ArgumentsError:
    return ArgumentsError(
        f"{text!r} is no URL of a worker: {why}",
        hint="give the control plane's, such as http://127.0.0.1:18000",
    )
