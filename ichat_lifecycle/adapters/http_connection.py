"""An HTTP connection of Uvicorn's with limits, whose refusals reach their clients.

A request has to arrive within its time (see `connections.Limits`); an answer may take any time, and
so may a WebSocket. An answer may come before the request's body has been read, such as a refusal of
a large upload. A connection that is closed then is reset by the kernel, and the client loses the
answer. So the rest of the body is read and discarded first, for LINGER_S at most.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from ichat_lifecycle.adapters.calm_log import CALM_LOGGER
from ichat_lifecycle.adapters.connections import Crowd, Stage
from ichat_lifecycle.adapters.refusal import CROWDED, refusal_bytes
from ichat_lifecycle.adapters.request_rules import (
    BAD_REQUEST,
    TOO_LARGE,
    checked,
    headers_too_large,
)

# How long the rest of a body is read that nobody wants: in all, and without a byte. As in nginx.
LINGER_S, LINGER_SILENCE_S = 30.0, 5.0

TURN_BYTES = 32 * 1024  # asyncio's own 256 KiB may be 40,000 chunks
DISCARDED_BYTES = 256 * 1024  # read at once of what nobody parses

# Requests that are parsed and wait behind one that is not answered. Uvicorn has no limit: with
# httptools each 18 bytes become some kilobytes, and more are read after each answer.
PIPELINED_MAX = 64


class Limited:
    """The limits, for one of Uvicorn's HTTP protocols, which has to be the next base class.

    Args:
        crowd: where the server's connections are counted.
        crowded: it is one too many while all others have an answer under way.
        on_made: called once it is counted.
    """

    def __init__(
        self,
        *args: Any,
        crowd: Crowd,
        crowded: bool = False,
        on_made: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._crowd = crowd
        self._on_made = on_made
        self._limits = crowd.limits
        self._real: Any = None  # the transport
        self._due_s = math.inf  # when the client has had its time
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = self._body_bytes = 0
        self._begun_s = 0.0  # when the connection, or a request on it, began
        self._idle = False  # after an answer, until the first byte of the next request
        self._discards_until_s: float | None = None
        self._lingers_until_s: float | None = None
        self._unsent: int | None = None  # of the answer, when that was looked at last
        self.logger = CALM_LOGGER
        if crowded:
            self.app_state = {**self.app_state, CROWDED: True}
        self.app = checked(self.app, self._limits.head_count)

    # Of Uvicorn's protocols.
    app: Any
    app_state: dict[str, Any]
    logger: logging.Logger
    timeout_keep_alive: float
    connections: set[Any]
    cycle: Any
    flow: Any
    loop: asyncio.AbstractEventLoop
    transport: Any

    # --- what the transport reports

    def connection_made(self, transport: Any) -> None:
        self._real = transport
        self._begun_s = self.loop.time()
        self._on_made()
        super().connection_made(_PoliteTransport(self, transport))  # type: ignore[misc]
        self._give(self._limits.head_s)
        self._crowd.place(self, Stage.WAITING)

    def data_received(self, data: bytes) -> None:
        if self._lingers_until_s is not None:
            self._give(LINGER_SILENCE_S, until_s=self._lingers_until_s)
            self._pace(len(data))
            return
        if self._idle:
            self._idle, self._begun_s = False, self.loop.time()
        super().data_received(data)  # type: ignore[misc]
        if self._real is not None and self._lingers_until_s is None:
            self._look(len(data))
        if self._discards_until_s is not None:
            self._pace(len(data))

    def _pace(self, discarded: int) -> None:
        """Read on later, where more than enough has been read for nothing."""
        wait_s = self._crowd.discards.spend(self.loop.time(), discarded)
        if self._real is not None and wait_s > 0:
            self._real.pause_reading()
            self.loop.call_later(wait_s, self._read_on)

    def _read_on(self) -> None:
        if self._real is not None and not self._real.is_closing():
            self._real.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if not self.transport.is_closing():
            self._look(0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)  # type: ignore[misc]

    def handle_websocket_upgrade(self, *args: Any) -> None:
        """Uvicorn's WebSocket takes over; it has limits of its own."""
        self._leave()
        self.transport, self._real = self._real, None
        super().handle_websocket_upgrade(*args)  # type: ignore[misc]

    def send_400_response(self, msg: str) -> None:
        if not self._can_refuse():
            self.drop()  # an answer is under way or sent: a second one would be a part of it
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its app waits for a body that never ends
            self.cycle.message_event.set()
        self._refuse(BAD_REQUEST, msg)

    def _can_refuse(self) -> bool:
        """Whether the next bytes to the client may be an answer of ours."""
        raise NotImplementedError

    # --- time

    @property
    def _stage(self) -> Stage:
        if self.cycle is None or self.cycle.response_complete:
            return Stage.WAITING
        # A request that waits behind another one is not read before that is answered.
        if getattr(self, "pipeline", None) or not self.cycle.more_body:
            return Stage.ANSWERED
        return Stage.SENDING

    def _discards(self) -> bool:
        """Whether the rest of a body comes in whose request is answered already."""
        raise NotImplementedError

    def _look(self, received: int) -> None:
        """Set the time that is left, after something has come or was answered."""
        stage = self._stage
        self._crowd.place(self, stage)
        if stage is not Stage.WAITING:
            self._head_bytes = 0
        self._body_bytes = self._body_bytes + received if stage is Stage.SENDING else 0
        if self._body_bytes > (self._limits.body_bytes or math.inf):
            self.drop()  # its app has refused it by now: it sends chunks of a byte
            return
        if stage is Stage.ANSWERED:
            self._due_s = math.inf
        elif stage is Stage.SENDING:
            self._give(self._limits.silence_s, until_s=self._request_end_s)
        elif self._discards():
            if self._discards_until_s is None:
                self._discards_until_s = self.loop.time() + LINGER_S
            self._give(LINGER_SILENCE_S, until_s=self._discards_until_s)
        elif self._discards_until_s is not None:
            self._discards_until_s, self._idle = None, True
            self._give(self.timeout_keep_alive)  # Uvicorn's own timer has been stopped
        elif received:
            self._count_head(received)
        else:
            self._idle, self._due_s = True, math.inf  # Uvicorn's own timer ends it

    @property
    def _request_end_s(self) -> float:
        return self._begun_s + (self._limits.request_s or math.inf)

    def _count_head(self, received: int) -> None:
        """A head that is not complete; its time counts from its first byte."""
        self._head_bytes += received
        if self._head_bytes > self._limits.head_bytes:
            self._refuse(TOO_LARGE, headers_too_large(f"over {self._limits.head_bytes} bytes"))
        else:
            self._give(self._limits.head_s, until_s=self._begun_s + self._limits.head_s)

    def _refuse(self, status: int, message: str) -> None:
        """Answer by hand what is no request, or not yet one.

        Uvicorn's parsers would frame the answer by the request: h11 raises where that was a HEAD.
        """
        self._linger()  # who sends nonsense may send more of it
        self._real.write(refusal_bytes(status, message))
        self.transport.close()

    def _give(self, seconds: float, *, until_s: float = math.inf) -> None:
        """Give the client time, from now on; less where `until_s` is sooner.

        The timer is moved when it fires, not with each piece that comes.
        """
        self._due_s = min(self.loop.time() + seconds, until_s)
        if self._timer is not None and self._timer.when() > self._due_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._due_s, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if self._real is None or self._due_s == math.inf:
            return
        if self.loop.time() < self._due_s:
            self._timer = self.loop.call_at(self._due_s, self._on_time)
        elif self._unsent is not None and self._real.get_write_buffer_size() < self._unsent:
            self._watch_flush()  # slow, and it reads
        elif self._stage is Stage.SENDING and self._waits_for_us():
            self._give(self._limits.silence_s)
        else:
            self.drop()

    def _waits_for_us(self) -> bool:
        """Whether it is not the client's fault that nothing comes."""
        if self._limits.request_s is not None:
            return False
        return bool(self.flow.read_paused or self.cycle.waiting_for_100_continue)

    # --- ends

    def drop(self) -> None:
        """Close the connection now. Not `close`: that waits for a client that does not read."""
        self.connections.discard(self)  # not in connection_lost(): others are counted before that
        if self._real is not None:
            self._real.abort()

    def close_politely(self) -> None:
        """Close it once the client has the answer: what `transport.close` does here."""
        if self._lingers_until_s is None and self._sends_still():
            self._linger()
        if self._lingers_until_s is None:
            self._real.close()
            if self._real.get_write_buffer_size():
                self._watch_flush()
            return
        if self._real.can_write_eof():
            self._real.write_eof()  # not with TLS: there `Connection: close` has to do
        self.flow.resume_reading()

    @property
    def streams(self) -> bool:
        cycle = self.cycle
        return cycle is not None and cycle.response_started and not cycle.response_complete

    @property
    def lingers(self) -> bool:
        return self._lingers_until_s is not None

    def _linger(self) -> None:
        """Read and discard what comes until the client closes."""
        if self._lingers_until_s is None and not self._real.is_closing():
            self._lingers_until_s = self.loop.time() + LINGER_S
            self._give(LINGER_SILENCE_S, until_s=self._lingers_until_s)
            _read_at_once(self._real, DISCARDED_BYTES)
            self._crowd.place(self, Stage.WAITING)

    def _sends_still(self) -> bool:
        cycle = self.cycle
        return cycle is not None and bool(cycle.more_body) and not cycle.disconnected

    def _watch_flush(self) -> None:
        """A client has to read on what is left of its answer."""
        self._unsent = self._real.get_write_buffer_size()
        self._give(self._limits.unread_s)

    def _leave(self) -> None:
        self._due_s = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._crowd.remove(self)


def _read_at_once(transport: Any, limit: int) -> None:
    """So many bytes at most; uvloop's transports have their own number."""
    if hasattr(transport, "max_size"):
        transport.max_size = limit


class _PoliteTransport:
    """A transport whose close() waits until the client has the answer."""

    __slots__ = ("_connection", "_real", "write")

    def __init__(self, connection: Limited, real: Any) -> None:
        self._connection = connection
        self._real = real
        self.write = real.write  # once for each token: without a detour

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_closing(self) -> bool:
        return self._connection.lingers or bool(self._real.is_closing())

    def close(self) -> None:
        self._connection.close_politely()


class LimitedH11(Limited, H11Protocol):  # type: ignore[misc]
    """With h11: strict, and slower."""

    def connection_made(self, transport: Any) -> None:
        # Tiny chunks take h11 microseconds for each byte: others have their turn.
        _read_at_once(transport, TURN_BYTES)
        super().connection_made(transport)

    def _can_refuse(self) -> bool:
        return self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    def _discards(self) -> bool:
        return self.cycle is not None and self.conn.their_state is h11.SEND_BODY

    def _sends_still(self) -> bool:
        return super()._sends_still() and self.conn.their_state is h11.SEND_BODY


class LimitedHttpTools(Limited, AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """With httptools, as vLLM has it."""

    _in_body = False  # or in its trailers
    _framing_bytes = 0  # that have come since the last content of a body

    def data_received(self, data: bytes) -> None:
        self._framing_bytes += len(data)
        super().data_received(data)
        too_many = self._framing_bytes > self._limits.head_bytes
        if self._in_body and too_many and self._real is not None and not self.lingers:
            self.drop()  # trailers or extensions of chunks without end: the parser keeps them

    def on_message_begin(self) -> None:
        self._in_body = False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else a trailer, which Uvicorn would add to the headers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body, self._framing_bytes = True, 0
        if len(self.pipeline) >= PIPELINED_MAX:
            raise _TooManyError  # the parser stops, and Uvicorn calls send_400_response()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()
        if self.cycle is not None:
            self.cycle.more_body = False  # Uvicorn leaves it where the answer came first

    def _can_refuse(self) -> bool:
        cycle = self.cycle
        if cycle is None or (cycle.response_complete and not self._discards()):
            return True
        return not (cycle.response_started or self.pipeline)

    def _discards(self) -> bool:
        return self.cycle is not None and bool(self.cycle.more_body)


class _TooManyError(Exception):
    """Too many requests wait on one connection."""


# What Uvicorn takes by default: httptools where it is installed, else h11.
LimitedAuto: Any = LimitedH11 if AutoHTTPProtocol is H11Protocol else LimitedHttpTools
