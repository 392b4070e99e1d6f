"""The supervisor's HTTP server, on its own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvicorn

from ichat_lifecycle.adapters.host_names import HostNames
from ichat_lifecycle.adapters.http_connection import LimitedH11
from ichat_lifecycle.adapters.prompt_server import PromptServer
from ichat_lifecycle.control.server import CONTROL_LIMITS
from ichat_lifecycle.control.web_guard import HostGuard

GRACE_S = 1


@contextlib.asynccontextmanager
async def serving(app: Any, sock: socket.socket, hosts: Sequence[str] = ()) -> AsyncIterator[None]:
    """While it lasts, the app answers on the socket, which is closed after it.

    Args:
        hosts: names besides those of loopback that requests may be for; see HostNames.
    """
    bound = None if sock.family == socket.AF_UNIX else sock.getsockname()[0]
    config = uvicorn.Config(
        HostGuard(app, HostNames(bound, hosts), "fleet.hosts"),
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
