"""The headers that vLLM's own middleware adds to each answer, for the answers that are ours.

A browser shows a page an answer from another origin only if its headers allow that. A 503 without
them is a CORS error to the page, whatever its status and body.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ichat_lifecycle.adapters.refusal import App, Message, Receive, Scope, Send

REQUEST_ID = b"x-request-id"
LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
SWITCHES = ("allow_credentials", "enable_request_id_headers")


@dataclass(frozen=True, slots=True)
class AnswerHeaders:
    """vLLM's flags of the same names, with the effect that they have on vLLM's answers.

    `--middleware` is left out on purpose: it may refuse requests, and a refusal of ours has to
    arrive.

    Attributes:
        request_ids: `--enable-request-id-headers`.
    """

    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    request_ids: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> AnswerHeaders:
        """Return those that vLLM's parsed arguments ask for; of an unknown flag the default."""
        lists = {
            name: tuple(map(str, arguments[name]))
            for name in LISTS
            if arguments.get(name) is not None
        }
        return cls(
            **lists,
            allow_credentials=bool(arguments.get("allow_credentials")),
            request_ids=bool(arguments.get("enable_request_id_headers")),
        )

    def around(self, app: App) -> App:
        """Return the app behind the same middleware as vLLM's own, in the same order.

        A CORS preflight (OPTIONS) is answered by the middleware, so the browser goes on to the
        request that `app` answers.
        """
        # Not at the top: the import is not for the time before the port is bound.
        from starlette.middleware.cors import CORSMiddleware

        inner: Any = app  # Starlette's own names for the same types
        cors: Any = CORSMiddleware(
            inner,
            allow_origins=self.allowed_origins,
            allow_methods=self.allowed_methods,
            allow_headers=self.allowed_headers,
            allow_credentials=self.allow_credentials,
        )
        return _with_request_id(cors) if self.request_ids else cors


def _with_request_id(app: App) -> App:
    """As vLLM's XRequestIdMiddleware, whose module differs between versions."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)
        request_id = given if given is not None else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (REQUEST_ID, request_id)]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_with_id)

    return call
