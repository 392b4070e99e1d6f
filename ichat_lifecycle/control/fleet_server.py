"""The supervisor's HTTP server, on its own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from ichat_lifecycle.adapters.http_connection import LimitedH11
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.control.server import CONTROL_LIMITS

GRACE_S = 1


@contextlib.asynccontextmanager
async def serving(app: Any, sock: socket.socket) -> AsyncIterator[None]:
    """While it lasts, the app answers on the socket, which is closed after it."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        h11_max_incomplete_event_size=CONTROL_LIMITS.head_bytes,
        workers=1,  # else WEB_CONCURRENCY is read, which may be no number
        proxy_headers=False,  # else FORWARDED_ALLOW_IPS is
        timeout_graceful_shutdown=GRACE_S,
    )
    server = PromptServer(config, CONTROL_LIMITS, LimitedH11)
    task = server.serving(sock)
    await server.begun(task)
    try:
        yield
    finally:
        server.should_exit = True
        server.wake()
        await asyncio.wait({task})
