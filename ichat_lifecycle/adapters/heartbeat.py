"""The heartbeat to iChat's gateway. A gateway that is slow or dead never harms the worker."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import structlog

from ichat_lifecycle.adapters.proxies import proxy_for
from ichat_lifecycle.bounds import error_of
from ichat_lifecycle.certificates import client_context
from ichat_lifecycle.config import PERIOD_MIN
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.redact import redact
from ichat_lifecycle.short_heads import ShortHeads
from ichat_lifecycle.slept import overslept
from ichat_lifecycle.states import State

log = structlog.get_logger("ichat_lifecycle.heartbeat")

PORT_MAX = 65535
EAGER_S = 0.5
CONFLICT_RETRY_S = 2.0  # between two tries while another worker has the model name
CONFLICT_MARGIN = 1.5  # times the Gateway's time-out, in which it forgets a worker that is dead
LAST_BEAT_TIMEOUT_S = 0.8  # within the 1 s that a stop gives to a companion
DETAIL_LENGTH_MAX = 200  # characters of a gateway's answer that are worth repeating
ANSWER_LIMIT = 16 << 10  # bytes of it that are read; the Gateway's own has a few hundred
PAGES = ("text/html", "application/xhtml+xml")

GATEWAY_STATES: Mapping[State, str] = {
    State.PARSED: "initializing",
    State.BOUND: "initializing",
    State.ENGINE_UP: "initializing",
    State.SERVING: "initializing",
    State.READY: "ready",
    State.DEGRADED: "initializing",
    State.STOPPING: "terminating",
    State.STOPPED: "terminating",
}


def gateway_url(gateway: str) -> str:
    """The gateway's address with a scheme and without a trailing slash; http:// by default.

    Raises:
        ArgumentsError: it is not the address of an HTTP server.
    """
    text = gateway.strip()
    url = text if "://" in text else f"http://{text}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _not_an_address(gateway, str(error)) from error
    port_is_valid = parsed.port is None or 0 < parsed.port <= PORT_MAX
    if parsed.scheme not in ("http", "https") or not parsed.host or not port_is_valid:
        raise _not_an_address(gateway, "expected HOST:PORT or http://HOST:PORT")
    return url.rstrip("/")


def _not_an_address(gateway: str, why: str) -> ArgumentsError:
    return ArgumentsError(f"--gateway-address {redact(gateway)}: {why}")


@dataclass(frozen=True, slots=True)
class Timing:
    """How often a heartbeat beats, and how long it waits. All in seconds.

    Attributes:
        interval_s: between two beats while nothing changes.
        timeout_s: until a beat is given up.
        succeeds_s: of a worker that succeeds another of the same worker_id: it is silent until it
            is READY, and then beats every half second for so long, because the other one says
            goodbye in the meantime. 0: it succeeds nobody.
        gateway_timeout_s: after which the gateway takes a silent worker for dead.
    """

    interval_s: float = 10.0
    timeout_s: float = 5.0
    succeeds_s: float = 0.0
    gateway_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is of interest in the answer of whoever listens at the gateway's address."""

    status: int
    media_type: str
    location: str
    text: str

    @property
    def is_registered(self) -> bool:
        return httpx.codes.is_success(self.status) and not self.is_page

    @property
    def is_page(self) -> bool:
        """That of a login portal, say: the Gateway's own are JSON, or empty."""
        return self.media_type in PAGES

    @property
    def detail(self) -> str:
        return f"{self.status}: {self.text}" if self.text else str(self.status)

    @property
    def trouble(self) -> str:
        told = f"answered {self.status}"
        if self.is_page:
            told += f" with a page ({self.media_type}): is this the Gateway?"
        return told + (f"; it is at {self.location}" if self.location else "")


async def _read(response: httpx.Response) -> _Answer:
    """At most ANSWER_LIMIT bytes: whoever answers may be anybody, and have no end."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) >= ANSWER_LIMIT:
            break
    return _Answer(
        response.status_code,
        response.headers.get("content-type", "").partition(";")[0].strip().lower(),
        _place(response.headers.get("location", "")),
        _words(body[:ANSWER_LIMIT].decode(errors="replace")),
    )


def _place(location: str) -> str:
    """Where a redirect leads, without the query, in which a portal may have put a secret."""
    return _words(redact(re.split(r"[?#]", location)[0]))


def _words(text: str) -> str:
    words = " ".join(text.split())[:DETAIL_LENGTH_MAX]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)


class Heartbeat:
    """Tells the gateway who we are and how we are (ports.Companion).

    Args:
        gateway: its address; without a scheme http:// is meant.
        identity: worker_id, model_name, model_path, backend, host and port; asked at each beat.
        snapshot: where the worker is in its life; asked at each beat.
        on_rejected: called, once, if the gateway still refuses to register us after
            1.5 times its time-out: another live worker serves this model name. The heartbeat has
            ended then. Before that it may be the entry of one that was killed a moment ago.
        timing: how often, and how long.
        look: awaited before each beat: finds what `identity` wants from the network.
        transport: httpx's transport, for tests.

    Raises:
        ArgumentsError: the gateway's address is not one, or the interval is too short.
    """

    name = "heartbeat"

    def __init__(
        self,
        gateway: str,
        identity: Callable[[], Mapping[str, Any]],
        snapshot: Callable[[], Snapshot],
        on_rejected: Callable[[str], None],
        timing: Timing | None = None,
        look: Callable[[], Awaitable[None]] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._gateway = gateway_url(gateway)
        self._identity = identity
        self._snapshot = snapshot
        self._on_rejected = on_rejected
        timing = timing or Timing()
        if not timing.interval_s >= PERIOD_MIN:  # NaN, too
            raise ArgumentsError(f"the heartbeat's interval has to be at least {PERIOD_MIN} s")
        self._interval_s = timing.interval_s
        self._timeout_s = timing.timeout_s
        self._succeeds_s = timing.succeeds_s
        self._silent = timing.succeeds_s > 0
        self._refused_for_s = timing.gateway_timeout_s * CONFLICT_MARGIN
        self._refused_at_s: float | None = None  # the last time of a run of refusals
        self._waited_s = 0.0  # while they lasted
        self._look = look
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._sent: State | None = None
        self._registered = False
        self._rejected = False
        self._stopping = False
        self._failing = False

    async def start(self) -> None:
        """Starts to beat, and does not wait for the gateway."""
        self._task = asyncio.create_task(self._run(), name="heartbeat")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log an end that nobody asked for: the Gateway would forget the worker without a word."""
        error = error_of(task)
        if task is self._task and error is not None:
            log.error("heartbeat_ended", gateway=redact(self._gateway), error=repr(error))

    def changed(self, _snapshot: Snapshot | None = None) -> None:
        """Beats at once if the state is another than last sent. To be called on the loop."""
        self._wake.set()

    async def stop(self) -> None:
        """Says goodbye with the current state, for at most 0.8 s. Safe if start() never ran."""
        task, self._task = self._task, None
        if task is None:
            return
        self._stopping = True
        try:
            async with asyncio.timeout(LAST_BEAT_TIMEOUT_S):
                # A beat that hangs gives way to the last one: never two at a time.
                task.cancel()
                await asyncio.wait([task])
                # Nobody is registered by this id while another worker has the name.
                if not (self._rejected or self._silent or self._refused_at_s is not None):
                    await self._beat()
        except TimeoutError:
            self._failed("gateway_unreachable", error="no answer to the last beat")
        finally:
            client, self._client = self._client, None
            if client is not None:
                await client.aclose()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        await self._place()
        eager_until = loop.time() + self._succeeds_s
        while not self._rejected:
            eager = loop.time() < eager_until
            began = loop.time()
            await self._beat()
            due = began + self._until_next_s(eager=eager)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._state_changed()

    def _until_next_s(self, *, eager: bool) -> float:
        if eager:
            return min(EAGER_S, self._interval_s)
        if self._refused_at_s is not None:
            return min(CONFLICT_RETRY_S, self._interval_s)
        return self._interval_s

    async def _place(self) -> None:
        """Waits until the worker's place at the gateway is its own."""
        while self._silent and self._snapshot().state is not State.READY:
            self._wake.clear()
            await self._wake.wait()
        self._silent = False

    async def _state_changed(self) -> None:
        # Many changes come together as one; those of the progress or a verdict are not news.
        while self._snapshot().state is self._sent:
            self._wake.clear()
            await self._wake.wait()

    async def _beat(self) -> None:
        """One beat. Raises nothing but cancellation, and the TimeoutError of an outer deadline."""
        self._sent = self._snapshot().state
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._post(self._sent)
        except TimeoutError:
            if overslept(due_s, loop.time()):  # nothing is known of the gateway: ask again
                self._sent = None
                return
            self._failed("gateway_unreachable", error=f"no answer within {self._timeout_s:g} s")
        except Exception as error:
            # Whatever it is, also in what we were given to call: the worker lives on.
            self._failed("gateway_unreachable", error=_words(str(error) or repr(error)))
        else:
            self._answered(answer)

    async def _post(self, state: State) -> _Answer:
        if self._look is not None:
            await self._look()
        if self._client is None:
            self._client = self._made_client()
        url, beat = f"{self._gateway}/v1/workers/heartbeat", dict(self._identity())
        beat["state"] = GATEWAY_STATES[state]
        plain = {"accept-encoding": "identity"}  # a little that is compressed may be very much
        async with self._client.stream("POST", url, json=beat, headers=plain) as response:
            return await _read(response)

    def _made_client(self) -> httpx.AsyncClient:
        # Certificates take 50 ms of the loop to load, and plain HTTP has none to verify.
        verify = client_context() if self._gateway.startswith("https:") else False
        proxy = proxy_for(self._gateway) if self._transport is None else None
        own = self._transport or (ShortHeads(verify) if proxy is None else None)
        return httpx.AsyncClient(
            transport=own,
            timeout=None,  # httpx's are per read; ours is for the whole beat
            verify=verify,
            proxy=proxy,
            trust_env=False,
        )

    def _answered(self, answer: _Answer) -> None:
        if answer.is_registered:
            self._registered = True
            if self._failing or self._refused_at_s is not None:
                log.info("gateway_back", gateway=redact(self._gateway))
            self._failing, self._refused_at_s, self._waited_s = False, None, 0.0
        elif answer.status != httpx.codes.CONFLICT or answer.is_page:
            self._failed("gateway_unreachable", error=answer.trouble)
        elif self._registered or self._stopping:
            self._failed("gateway_conflict", error=answer.detail)
        else:
            self._refused(answer)

    def _failed(self, event: str, *, error: str) -> None:
        """Logs the first failure of a run of them; the others would only repeat it."""
        if not self._failing:
            log.warning(event, gateway=redact(self._gateway), error=error)
        self._failing = True

    def _refused(self, answer: _Answer) -> None:
        """Keeps trying for a while: the Gateway forgets a worker that was killed."""
        now_s = asyncio.get_running_loop().time()
        if self._refused_at_s is None:
            log.warning(
                "gateway_conflict",
                gateway=redact(self._gateway),
                error=answer.detail,
                retry_for_s=self._refused_for_s,
            )
        else:
            # A process that was frozen meanwhile has not asked: that was no refusal.
            round_s = min(CONFLICT_RETRY_S, self._interval_s) + self._timeout_s
            self._waited_s += min(now_s - self._refused_at_s, round_s)
        self._refused_at_s = now_s
        if self._waited_s >= self._refused_for_s:
            self._reject(answer)

    def _reject(self, answer: _Answer) -> None:
        self._rejected = True
        message = (
            f"the gateway {redact(self._gateway)} has refused to register this worker for "
            f"{self._refused_for_s:g} s: another live worker serves its model name "
            f"({answer.detail})"
        )
        try:
            self._on_rejected(message)
        except Exception:
            log.exception("on_rejected_failed")
