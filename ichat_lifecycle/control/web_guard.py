"""What every answer of a control plane has against web pages, and which requests get none.

Pages of other sites can make a browser ask a port of this machine. They must not read the answer
(`host_names`), show it in a frame, have it taken for a script, or find it in a cache.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ichat_lifecycle.adapters.host_names import HostNames
from ichat_lifecycle.control.http import MISDIRECTED, HttpError, answer_of

# Of what is no page: nothing is loaded or run. Style, because the diagram has some.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class WebGuard:
    """The app, with HEADERS on each answer that has not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                given = {name.lower() for name, _ in headers}
                missing = [header for header in HEADERS if header[0] not in given]
                message = {**message, "headers": headers + missing}
            await send(message)

        await self._app(scope, receive, guarded_send)


class HostGuard:
    """The app, for requests that are for a name of this server.

    Args:
        setting: where further names are set, for the refusal's hint.
    """

    def __init__(self, app: ASGIApp, hosts: HostNames, setting: str = "http.hosts") -> None:
        self._app = app
        self._hosts = hosts
        self._refusal = WebGuard(answer_of(_misdirected(setting)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope["type"] == "http" and not self._hosts.allow(scope["headers"])
        await (self._refusal if refused else self._app)(scope, receive, send)


def _misdirected(setting: str) -> HttpError:
    return HttpError(
        MISDIRECTED,
        "misdirected_request",
        "the request's Host is no name of this server",
        f"ask by a loopback address, or add the name to {setting}",
        headers={"Connection": "close"},  # its body, if any, is not read
    )
