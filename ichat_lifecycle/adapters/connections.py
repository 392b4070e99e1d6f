"""Limits on connections, and which one is closed to make room for a new one.

A server without them is blocked by clients that connect and send nothing: each holds a file
descriptor, and without one no probe gets in. Here a request has to arrive within its time, and the
newcomer always gets in: the connection that has been without a request for longest makes room.
"""

from __future__ import annotations

import enum
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ichat_lifecycle.token_bucket import TokenBucket

# File descriptors that are left to the engine, the log, and files of the process.
RESERVED = 128
FEWEST, FEWEST_OF_HELD, MOST_OF_CONTROL = 16, 4, 256
UNLIMITED = 2**20

DISCARD_BURST = 64 * 2**20  # bytes: a large upload, whose client then has its answer at once


@dataclass(frozen=True)
class Limits:
    """What a client may take. An answer under way has no limit.

    Attributes:
        connections: how many at a time; asked for each new one.
        head_s: seconds from the connection's start, or from the first byte after an answer, to the
            end of a request's head, and for a TLS handshake.
        silence_s: seconds between two pieces of a request's body.
        request_s: seconds for a whole request, its body included; None for no such limit.
        head_bytes: of a request's head.
        body_bytes: of a request's body, what frames its chunks included; None for any number.
        head_count: header lines of a request; None for any number.
        unread_s: seconds in which a client has to read something of an answer that is complete.
        cut_busy: whether a connection with an answer under way makes room where each has one;
            streams do so first, and those above half of all before anything else.
        spare: file descriptors that are kept, so that connections are accepted when the process has
            no other left.
        discard_bytes_s: of what nobody wants, such as the body of a request that is refused, so
            much is read in a second, of all connections together.
    """

    connections: Callable[[], int]
    head_s: float = 20.0
    silence_s: float = 60.0
    request_s: float | None = None
    head_bytes: int = 64 * 1024
    body_bytes: int | None = None
    head_count: int | None = None
    unread_s: float = 30.0
    cut_busy: bool = False
    spare: int = 0
    discard_bytes_s: int = 8 * 2**20


def connections_of_control() -> int:
    """Return how many connections a control plane takes: an eighth of the open files, 16 to 256."""
    return min(MOST_OF_CONTROL, max(FEWEST, _open_files() // 8))


def connections_of_main(wanted: int = 0) -> int:
    """Return how many connections the main port takes: what the others leave of the open files.

    Args:
        wanted: at most so many; 0 for no limit of its own.
    """
    room = max(FEWEST, _open_files() - connections_of_control() - RESERVED)
    return min(room, wanted) if wanted else room


def connections_of_held(sockets: int = 1) -> int:
    """Return how many connections one socket of a fleet takes while no worker serves on it.

    Args:
        sockets: how many there are: all together leave most of the open files to the workers.
    """
    share = _open_files() // 4 // max(4, sockets)
    return min(MOST_OF_CONTROL, max(FEWEST_OF_HELD, share))


def _open_files() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


class Stage(enum.Enum):
    """How far a connection's request is, in the order in which connections make room."""

    WAITING = enum.auto()  # no complete head
    SENDING = enum.auto()  # a body that is not complete
    ANSWERED = enum.auto()  # whole, and its answer is not


class Client(Protocol):
    """A connection.

    Attributes:
        streams: whether its answer has begun and not ended, as an event stream's does for long.
    """

    @property
    def streams(self) -> bool: ...

    def drop(self) -> None:
        """Close it now. It does not count from then on."""
        ...


class Crowd:
    """The connections of one server, by stage, the longest in each first.

    Args:
        count: how many there are, WebSockets included.
    """

    def __init__(self, limits: Limits, count: Callable[[], int]) -> None:
        self.limits = limits
        self._count = count
        self._stages: dict[Stage, dict[Client, None]] = {stage: {} for stage in Stage}
        self._stage_of: dict[Client, Stage] = {}
        self.discards = TokenBucket(limits.discard_bytes_s, DISCARD_BURST)

    def place(self, client: Client, stage: Stage) -> None:
        """Note the stage of a client, as the newest in it."""
        before = self._stage_of.get(client)
        if before is stage:
            return
        if before is not None:
            del self._stages[before][client]
        self._stage_of[client] = stage
        self._stages[stage][client] = None

    def remove(self, client: Client) -> None:
        """Idempotent."""
        stage = self._stage_of.pop(client, None)
        if stage is not None:
            del self._stages[stage][client]

    @property
    def full(self) -> bool:
        """Whether one has to make room for the next one."""
        return self._count() >= self.limits.connections()

    def make_room(self) -> bool:
        """Make room for one more; return False if every connection has an answer under way."""
        while self.full:
            if not self.drop_one():
                return False
        return True

    def drop_one(self) -> bool:
        """Close the connection that can be spared best; return False if there is none."""
        client = self._to_be_spared()
        if client is None:
            return False
        self.remove(client)
        client.drop()
        return True

    def _to_be_spared(self) -> Client | None:
        """The oldest of the first stage that has any; where answers are cut, streams come first.

        Where more than half are streams, they come before anybody else: a flood of them must not
        cost those who have only just connected, and ask for a document or a stop.
        """
        cut = self.limits.cut_busy
        streams = [c for c in self._stages[Stage.ANSWERED] if c.streams] if cut else []
        if len(streams) > self.limits.connections() // 2:
            return streams[0]
        for stage, clients in self._stages.items():
            if clients and stage is not Stage.ANSWERED:
                return next(iter(clients))
        return next(iter(streams or self._stages[Stage.ANSWERED]), None) if cut else None


class SpareDescriptors:
    """File descriptors that are held in order to have some when the process has no other left."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: list[int] = []

    def refill(self) -> None:
        """Open what is missing, as far as that is possible."""
        while len(self._held) < self._count:
            try:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return

    def release_one(self) -> bool:
        """Close one, so that another can be opened; return False if none is held."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def close(self) -> None:
        """Close all. Idempotent."""
        self._count = 0
        while self.release_one():
            pass
