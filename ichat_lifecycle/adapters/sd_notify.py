"""Tells a service manager how the worker's life goes: systemd, or the supervisor of a fleet.

The protocol is sd_notify(3): datagrams of NAME=VALUE lines to the socket in $NOTIFY_SOCKET. Beside
systemd's own names there is X_ICHAT_LIFECYCLE, a JSON object for a supervisor that wants to know
more; systemd ignores names that begin with X_.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.printable import plain
from ichat_lifecycle.states import STARTING_STATES, State

log = structlog.get_logger("ichat_lifecycle")

SOCKET_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_VARIABLE, WATCHDOG_PID_VARIABLE = "WATCHDOG_USEC", "WATCHDOG_PID"
# How often a start or a stop asks for more time, and for how much: once the event loop is blocked
# for good nobody asks any more, and the manager's own limit holds again.
EXTEND_EVERY_S = 10.0
EXTEND_BY_S = 30.0
# A manager's watchdog is fed so many times within its limit, as sd_watchdog_enabled(3) advises.
FEEDS = 2
# Linux lets as few as 10 messages wait (net.unix.max_dgram_qlen); a busy manager reads them later.
AGAIN_S = 0.05

LIFECYCLE = "X_ICHAT_LIFECYCLE"
ALIVE = "WATCHDOG"
# A supervisor takes no more than so many bytes at once. Words are cut to so many characters, so
# that all of a message fits, whatever it is about.
DATAGRAM_LIMIT = 32_768
WORDS_LIMIT = 1000


class Notifier:
    """A listener of the lifecycle's.

    READY=1 comes with the first READY. A worker that is DEGRADED later is none that the manager
    should start again, as it recovers by itself: STATUS says so.

    Args:
        snapshot: gives the worker's snapshot.
        describe: what X_ICHAT_LIFECYCLE holds: JSON-ready, with the `state`, and without anything
            that changes by itself, such as an age.
        environment: where the manager has left its address and its watchdog's limit.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        describe: Callable[[], Mapping[str, Any]],
        environment: Mapping[str, str],
    ) -> None:
        self._snapshot = snapshot
        self._describe = describe
        self._address = _address(environment)
        self._watchdog_s = _watchdog_s(environment)
        self._told: Mapping[str, Any] = {}
        self._unsent: Mapping[str, str] = {}
        self._failed = False
        self._again: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None

    @property
    def wanted(self) -> bool:
        """Whether somebody wants to be told."""
        return self._address is not None

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Tells how it is now, and as long as this lasts regularly that the loop turns."""
        if self.wanted:
            self.changed(self._snapshot())
            self._feed()
        try:
            yield
        finally:
            for timer in (self._beat, self._again):
                if timer is not None:
                    timer.cancel()

    def changed(self, snapshot: Snapshot) -> None:
        """Tells what is new; a listener of the lifecycle's, on its loop."""
        described = dict(self._describe())
        if described == self._told:
            return
        lines = {"STATUS": _status(snapshot), LIFECYCLE: _as_json(described)}
        if described["state"] != self._told.get("state"):
            lines |= self._news(snapshot)
        self._told = described
        self._send(lines)

    def _news(self, snapshot: Snapshot) -> Mapping[str, str]:
        """What a new state means to a service manager."""
        match snapshot.state:
            case State.READY:
                return {"READY": "1"}
            case State.STOPPING:
                return {"STOPPING": "1", **_more_time()}
            case _:
                return _more_time() if snapshot.state in STARTING_STATES else {}

    def _feed(self) -> None:
        """From the loop that serves: once it does not turn, the manager is not told to wait."""
        lines = {ALIVE: "1"} if self._watchdog_s else {}
        if self._snapshot().state in (*STARTING_STATES, State.STOPPING):
            lines |= _more_time()
        if lines or self._unsent:
            self._send(lines)
        pause_s = min(EXTEND_EVERY_S, self._watchdog_s / FEEDS or EXTEND_EVERY_S)
        self._beat = asyncio.get_running_loop().call_later(pause_s, self._feed)

    def _send(self, lines: Mapping[str, str]) -> None:
        """What cannot be sent now, as to a busy manager, comes with what is sent next.

        A manager that is gone harms nobody.
        """
        if self._address is None:
            return
        lines = {**self._unsent, **lines}
        self._unsent = {}
        text = "\n".join(f"{name}={value}" for name, value in lines.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                # A path may hold bytes that are no text: what is told of it does.
                sock.sendto(text.encode(errors="replace"), self._address)
        except BlockingIOError:
            self._unsent = lines
            if self._again is None:
                self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._send_again)
        except OSError as error:  # it has gone for a while, or no descriptor is left
            self._unsent = lines
            if not self._failed:
                log.warning("service_manager_not_told", error=str(error))
            self._failed = True
        else:
            self._failed = False

    def _send_again(self) -> None:
        self._again = None
        if self._unsent:
            self._send({})


def _address(environment: Mapping[str, str]) -> str | None:
    """A path, or after an @ a name of Linux' abstract namespace, which begins with NUL."""
    path = environment.get(SOCKET_VARIABLE, "")
    if path.startswith("@"):
        return "\0" + path[1:]
    return path if path.startswith("/") else None


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """The limit of the manager's watchdog in seconds; 0 where there is none for this process."""
    if environment.get(WATCHDOG_PID_VARIABLE, str(os.getpid())) != str(os.getpid()):
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0, int(environment.get(WATCHDOG_VARIABLE, "0"))) / 1e6
    return 0.0


def _as_json(described: Mapping[str, Any]) -> str:
    """Without characters that JSON would write with six, and in words that have room."""
    return json.dumps({name: _cut(value) for name, value in described.items()}, ensure_ascii=False)


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value[:WORDS_LIMIT]).replace("\n", " ")
    if isinstance(value, Mapping):
        return {name: _cut(inner) for name, inner in value.items()}
    return value


def _more_time() -> Mapping[str, str]:
    return {"EXTEND_TIMEOUT_USEC": str(int(EXTEND_BY_S * 1e6))}


def _status(snapshot: Snapshot) -> str:
    """One line for `systemctl status`, such as `BOUND: loading_weights, 43 %`."""
    progress = snapshot.progress
    if snapshot.state in STARTING_STATES:
        fraction = "" if progress.fraction is None else f", {progress.fraction:.0%}"
        return f"{snapshot.state}: {progress.phase}{fraction}"
    if snapshot.reason is not None:
        return f"{snapshot.state}: {' '.join(snapshot.reason.message[:WORDS_LIMIT].split())}"
    return str(snapshot.state)
