"""Clients of the main port, in a simulated life: real requests through the real gate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.refusal import Message, Receive, Scope, Send
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.fakes import EngineGone, FakeWorld

RETRY_AFTER_S = 5
OK, BROKEN = 200, 500


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what came of it. Times are the loop's; None for what has not happened."""

    asked_s: float
    work_s: float
    accepted_s: float | None = None
    accepted_in: State | None = None
    status: int | None = None
    retry_after: bool = False
    body: bytes = b""
    ended_s: float | None = None
    broke: bool = False

    @property
    def answered(self) -> bool:
        """Whether the client has been told how it ended: in full, or by an explicit error."""
        if self.status is None:
            return False
        return self.status != OK or b"[DONE]" in self.body or b'"error"' in self.body


class Clients:
    """Asks, and keeps what was answered. The app that is asked works as long as a request says."""

    def __init__(self, world: FakeWorld, snapshot: Callable[[], Snapshot]) -> None:
        self.exchanges: list[Exchange] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._world = world
        self._snapshot = snapshot
        self.gate = Gate(snapshot, _own_app, lambda: RETRY_AFTER_S)
        world.gate, world.app, world.hang_up = self.gate, self._app, self.hang_up

    def ask(self, work_s: float) -> None:
        """Sends a request that takes the engine so many seconds."""
        task = asyncio.create_task(self._ask(work_s), name="client")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def hang_up(self) -> None:
        """The server closes every connection, and ends what runs on it."""
        for task in self.tasks:
            task.cancel()

    async def _ask(self, work_s: float) -> None:
        # Not before the first step: whom the server hangs up on before that has asked nothing.
        exchange = Exchange(self._now(), work_s)
        self.exchanges.append(exchange)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.retry_after = any(n == b"retry-after" for n, _ in message["headers"])
            else:
                exchange.body += message["body"]

        scope = {
            "type": "http",
            "path": "/v1/completions",
            "method": "POST",
            "headers": [],
            "exchange": exchange,
        }
        try:
            await self.gate(scope, receive, send)
        except Exception:
            exchange.broke = True  # what Uvicorn answers with 500, or a closed connection
        finally:
            exchange.ended_s = self._now()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.accepted_s = self._now()
        exchange.accepted_in = self._snapshot().state
        kind = (b"content-type", b"text/event-stream")
        await send({"type": "http.response.start", "status": OK, "headers": [kind]})
        try:
            await self._world.work(exchange.work_s)
            body = b"data: [DONE]\n\n"
        except EngineGone:  # as vLLM ends a stream
            body = b"data: " + json.dumps({"error": {"code": BROKEN}}).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _own_app(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("no client here asks for the worker's own routes")
