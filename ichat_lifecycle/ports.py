"""The ports: what the lifecycle needs of the world, as protocols. Fakes and vLLM stand behind them.

Every coroutine here may be cancelled at any await; what it had acquired by then is given back by
the matching release, which is called exactly once and must be safe after a start that failed half
way. All times are in seconds.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Address:
    """Where the main port listens: host and port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    uds: str | None = None
    tls: bool = False

    @property
    def url(self) -> str:
        """The address as a client on this machine would write it."""
        if self.uds:
            return f"unix:{self.uds}"
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        bracketed = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.tls else ''}://{bracketed}:{self.port}"


class VerdictKind(enum.StrEnum):
    """What one probe of the engine showed."""

    HEALTHY = "healthy"
    ASLEEP = "asleep"
    MISSED = "missed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One probe's outcome. `latency_s` is None for a probe that has not been answered."""

    kind: VerdictKind
    latency_s: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that ends service at once: `code` is `engine_died` or `server_exited`."""

    code: str
    message: str
    root_cause: str | None = None
    hint: str | None = None


PhaseReport = Callable[[str, float | None], None]
FaultReport = Callable[[Fault], None]
VerdictReport = Callable[[Verdict], None]


class Arguments(Protocol):
    """Validates the arguments; may take seconds, because vLLM's parser imports vLLM."""

    async def validate(self, on_phase: PhaseReport) -> None:
        """Raises ArgumentsError or another LifecycleError for a user's mistake."""
        ...


class Binder(Protocol):
    """The listening socket."""

    async def bind(self) -> socket.socket | None:
        """Binds and listens. Raises AddressError when the address is taken or not allowed."""
        ...

    async def release(self) -> None: ...


class Engine(Protocol):
    """The engine client and its processes."""

    @property
    def alive(self) -> bool: ...

    async def start(self, on_fault: FaultReport, on_phase: PhaseReport) -> None:
        """Loads the model. `on_fault` is called, once and from any thread, if the engine dies."""
        ...

    async def release(self, *, now: bool) -> None:
        """Ends the engine and all its processes; with `now`, by force."""
        ...

    def kill(self) -> None:
        """Makes a release that is under way end by force. Safe at any time, from any thread."""
        ...

    async def is_sleeping(self) -> bool:
        """One bounded-by-the-caller round trip to the engine's own process."""
        ...

    async def sleep(self, level: int) -> None: ...
    async def wake_up(self) -> None: ...
    async def reset_prefix_cache(self) -> None: ...

    async def describe(self) -> Mapping[str, Any]:
        """What the engine knows of itself, JSON-ready."""
        ...


class Server(Protocol):
    """The HTTP server on the socket. It answers 503 by itself until an app is attached."""

    @property
    def in_flight(self) -> int: ...

    async def open(self, sock: socket.socket | None, on_fault: FaultReport) -> None: ...

    async def attach(self) -> None:
        """Builds the engine's app and passes requests to it from now on."""
        ...

    async def detach(self) -> None: ...

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        ...

    async def cut(self) -> None:
        """Ends what is still in flight, each request with an explicit error."""
        ...

    async def close(self) -> None: ...


class Probe(Protocol):
    """Requests to ourselves, over the real socket, past the gate."""

    async def health(self) -> bool:
        """Whether `/health` answered 200."""
        ...

    async def warm_up(self) -> None:
        """One greedy request; its output becomes the canary's expected answer; may raise."""
        ...

    async def canary(self) -> None:
        """One greedy request. Raises when it is not answered."""
        ...


class Watchdog(Protocol):
    """Asks the engine for a sign of life, one probe at a time."""

    async def start(self, on_verdict: VerdictReport) -> None: ...

    def pace(self, interval_s: float) -> None:
        """Sets the time between probes, and probes at once."""
        ...

    async def stop(self) -> None: ...


class Companion(Protocol):
    """Something that lives as long as run(): the control plane, the heartbeat, the live view."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Clock(Protocol):
    """The time of day for people. Durations come from the event loop's own clock."""

    def now(self) -> datetime: ...


@dataclass(slots=True)
class Ports:
    """All of them, for one lifecycle."""

    arguments: Arguments
    binder: Binder
    engine: Engine
    server: Server
    probe: Probe
    watchdog: Watchdog
    clock: Clock
    companions: tuple[Companion, ...] = ()


Release = Callable[[], Awaitable[None]]
