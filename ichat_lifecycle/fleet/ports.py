"""What a supervisor needs of the world, as protocols. Times are in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.fleet.told import Told
from ichat_lifecycle.gpus import GpuId

# A worker has a bound on its stop, and a last resort behind that: after both it is killed.
KILL_MARGIN_S = 5.0


_NAMES = {"localhost": "127.0.0.1", "": "0.0.0.0"}


@dataclass(frozen=True, slots=True)
class Listener:
    """Where somebody listens: a port, 0 for any free one; or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    uds: str | None = None

    def collides(self, other: Listener) -> bool:
        """Whether the kernel would have only one of them."""
        if self.uds is not None or other.uds is not None:
            return self.uds == other.uds
        if self.port != other.port or not self.port:
            return False
        hosts = {_NAMES.get(one.host, one.host) for one in (self, other)}
        every_v4 = "0.0.0.0" in hosts and not any(":" in host for host in hosts)
        return len(hosts) == 1 or "::" in hosts or every_v4


@dataclass(frozen=True, slots=True)
class Plan:
    """How a worker is run.

    Attributes:
        host, port, uds: where its main port listens; `uds` is the path of a Unix socket instead.
        argv: what `serve` gets, without --fd and what is secret.
        secret_argv: words that are not to stand in the process list.
        env: variables besides the supervisor's own.
        stop_bound_s: after which a stop is a failure of the worker's own deadlines.
        control: where its control plane listens.
        certificate: of its TLS, and the key (None: it is in the same file); None without TLS.
        certificate_digest: of what is in the files of its TLS; "" without TLS. A change of it alone
            is no reason to replace the worker.
        answer_headers: what vLLM's own middleware adds to the worker's answers.
        hosts: its `http.hosts`.
        replace: "before" where its successor becomes READY before it is stopped.
    """

    name: str
    model: str
    host: str
    port: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    stop_bound_s: float
    secret_argv: tuple[str, ...] = field(default=(), repr=False)
    uds: str | None = None
    control: Listener = Listener()
    certificate: tuple[str, str | None] | None = None
    certificate_digest: str = field(default="", compare=False)
    answer_headers: AnswerHeaders = field(default_factory=AnswerHeaders)
    hosts: tuple[str, ...] = ()
    replace: str = "after"
    gpu_ids: tuple[GpuId, ...] | None = None

    @property
    def address(self) -> str:
        """One for each listening socket."""
        return f"unix:{self.uds}" if self.uds else f"{self.host}:{self.port}"

    @property
    def listener(self) -> Listener:
        """Its main port."""
        return Listener(self.host, self.port, self.uds)

    @property
    def listeners(self) -> tuple[Listener, Listener]:
        """All of its own: no other worker can have them at the same time."""
        return self.listener, self.control


# Gets what a worker tells of itself; None for a sign of life.
Hearer = Callable[[Told | None], None]


class Process(Protocol):
    """A worker's process."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Its exit code; of a death by a signal, the signal's number with a minus."""
        ...

    def terminate(self) -> None:
        """SIGTERM: a graceful stop."""
        ...

    def hurry(self) -> None:
        """After that: a stop at once. SIGINT: of two equal signals one may never arrive."""
        ...

    def kill(self) -> None: ...

    def renew_certificate(self) -> None:
        """SIGHUP: read the files of its TLS again, for new connections."""
        ...

    @property
    def last_words(self) -> str:
        """The error that it ended with, as it has told it; "" where it has told none."""
        ...

    @property
    def token(self) -> str:
        """What commands to its control plane need. Of no use with any other worker."""
        ...


class Launcher(Protocol):
    """Starts processes."""

    def launch(
        self, plan: Plan, *, accept_from: str, watchdog_s: float, on_news: Hearer
    ) -> Process:
        """Starts a worker on its socket.

        Args:
            accept_from: the state from which on it accepts connections: "bound" or "ready".
            watchdog_s: within which the worker has to tell something; 0: it need not.
            on_news: gets what the worker tells.

        Raises:
            OSError: no process could be started.
        """
        ...


class Socket(Protocol):
    """A listening socket that outlives the workers that serve on it.

    While nobody does, connections get 503 from the supervisor.
    """

    def served_by(self, who: object) -> None:
        """`who` accepts connections from now on."""
        ...

    def left_by(self, who: object) -> None:
        """Not any more. Saying so again is safe."""
        ...

    def certify(self, certificate: tuple[str, str | None] | None, digest: str = "") -> None:
        """Speak TLS with the worker's certificate and its key from now on, or none.

        Args:
            digest: of what is in the files; another one has them read again.

        Raises:
            ArgumentsError: they cannot be used. Nothing was changed.
        """
        ...

    async def close(self) -> None: ...

    def close_now(self) -> None:
        """Of one that nobody has served on."""
        ...


class Clock(Protocol):
    """The time of day for people."""

    def now(self) -> datetime: ...
