"""The ports: what the lifecycle needs of the world, as protocols. Fakes and vLLM stand behind them.

Every coroutine here may be cancelled at any await; what it had acquired by then is given back by
the matching release, which is called exactly once and must be safe after a start that failed half
way. All times are in seconds.
"""

from __future__ import annotations

import enum
import random
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
    def local_host(self) -> str:
        """The host that a client on this machine connects to."""
        return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        """The address as a client on this machine would write it."""
        if self.uds:
            return f"unix:{self.uds}"
        host = self.local_host
        bracketed = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.tls else ''}://{bracketed}:{self.port}"


class VerdictKind(enum.StrEnum):
    """What the signs of an engine's life say of it; see verdicts.py."""

    IDLE = "idle"
    BUSY = "busy"
    ASLEEP = "asleep"
    HUNG = "hung"
    LOOP_BLOCKED = "loop_blocked"  # our own loop: the engine could not be heard


@dataclass(frozen=True, slots=True)
class Signs:
    """What a verdict rests on.

    Attributes:
        answered_s: how long the RPC's answer took; None where there is none.
        silent_s: how long the RPC has been without an answer, and the engine without progress.
        token_silent_s: the same of a token that an idle engine was asked for.
        progressed: vLLM's own counters have changed since the last verdict.
        in_flight: requests under way.
        asleep: what the RPC's answer says.
        loop_lag_s: how much too late our own loop was.
        compiling: the compiler at work in an engine that is silent; "" for none.
        admin_request: the administrative request that an engine is silent for; "" for none.
        ranks: the data-parallel ranks that are silent or failed, of an engine that has several.
        error: what the RPC failed with.
    """

    answered_s: float | None = None
    silent_s: float = 0.0
    token_silent_s: float = 0.0
    progressed: bool = False
    in_flight: int = 0
    asleep: bool = False
    loop_lag_s: float = 0.0
    compiling: str = ""
    admin_request: str = ""
    ranks: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the watchdog found, and why."""

    kind: VerdictKind
    signs: Signs = Signs()

    @property
    def answered(self) -> bool:
        """Whether the engine answered, and was awake."""
        fine = self.kind in (VerdictKind.IDLE, VerdictKind.BUSY)
        return fine and self.signs.answered_s is not None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that ends service at once.

    `code` is `engine_died`, `server_exited`, or `watchdog_failed`.

    `category` is one of errors.Category where it is the engine's death, else None.
    """

    code: str
    message: str
    root_cause: str | None = None
    hint: str | None = None
    category: str | None = None


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

    def progress(self, rank: int = 0) -> Any:
        """Something that changes while a rank works; None where it does not report."""
        ...

    async def is_sleeping(self, rank: int = 0) -> bool:
        """One bounded-by-the-caller round trip to the own process of a rank."""
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


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """What a look at `/health` and at the main port found: `problem` is "" where all is well."""

    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning that stands while the worker serves: `/lifecycle` and the page show it.

    `code` is in snake_case; a later notice of the same code takes the place of the earlier one.
    """

    code: str
    message: str
    root_cause: str | None = None
    hint: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "root_cause": self.root_cause,
            "hint": self.hint,
        }


class Probe(Protocol):
    """Questions of the worker to itself, which do not depend on who is let in from outside."""

    async def health(self) -> HealthCheck:
        """Whether `/health` answers 200, and the main port is served."""
        ...

    async def inspect(self) -> Sequence[Notice]:
        """What clients of this engine will meet, although it is well; asked before the warm-up.

        An error is logged, and does not keep the worker from being READY.
        """
        ...

    async def warm_up(self) -> None:
        """One greedy request; its output becomes the canary's expected answer; may raise."""
        ...

    async def request(self, path: str, body: Mapping[str, Any]) -> None:
        """One request as a client would make it. Raises when it is not answered with 200.

        Args:
            body: as JSON; `model` is filled in.
        """
        ...

    async def canary(self) -> None:
        """One greedy request. Raises when it is not answered."""
        ...

    async def token(self, rank: int = 0) -> None:
        """A request for one token, to a rank. Raises where the answer shows no working engine."""
        ...


class Watchdog(Protocol):
    """Gathers the signs of an engine's life, one question at a time."""

    async def start(self, on_verdict: VerdictReport, on_fault: FaultReport) -> None:
        """Start to watch. `on_fault` is called if the watch ends without having been stopped."""
        ...

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


@dataclass(frozen=True, slots=True)
class Case:
    """What an evidence bundle is about.

    `code` is that of the fault or error: `engine_hung`, `engine_died`, `engine_start_failed`,
    `loop_blocked` and the like. `probes` are the last verdicts with what they rest on, JSON-ready,
    oldest first.
    """

    code: str
    message: str
    root_cause: str | None = None
    hint: str | None = None
    probes: tuple[Mapping[str, Any], ...] = ()


class Evidence(Protocol):
    """Keeps what can be seen of an engine before it is ended."""

    async def save(self, case: Case) -> str | None:
        """Saves what can still be seen; bounded, and raises nothing but CancelledError.

        Returns:
            the path of the bundle, or None where nothing could be saved, which is logged.
        """
        ...


class Clock(Protocol):
    """The time of day for people. Durations come from the event loop's own clock."""

    def now(self) -> datetime: ...


@dataclass(slots=True)
class Ports:
    """All of them, for one lifecycle.

    `scrub` takes secrets out of a text that others are to see.
    """

    arguments: Arguments
    binder: Binder
    engine: Engine
    server: Server
    probe: Probe
    watchdog: Watchdog
    clock: Clock
    companions: tuple[Companion, ...] = ()
    evidence: Evidence | None = None
    random: Callable[[], float] = random.random
    scrub: Callable[[str], str] = str


Release = Callable[[], Awaitable[None]]
