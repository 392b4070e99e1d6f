"""A worker that harms whoever supervises it, as far as that lets it. For tests of supervisors.

Run it in place of `serve`, as `python -m ichat_lifecycle.testing.hostile_worker`. HOSTILE_TRICKS
names what it does, with commas between; by default everything. It goes on until it is stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

VARIABLE = "HOSTILE_TRICKS"

_NEST = "[" * 15_000
# What a supervisor must not believe, nor stumble over.
NONSENSE = (
    '{"state": "READY", "reason": "text"}',
    '{"state": "READY", "reason": {"message": ' + _NEST,
    '{"state": {"a": []}}',
    '{"state": "READY", "fraction": NaN}',
    '{"state": "READY", "fraction": 1e999}',
    '{"state": "READY", "expected_s": "abc"}',
    '{"state": "READY", "expected_s": ' + "9" * 5000 + "}",
    '{"state": "READY", "control_url": "http://169.254.169.254:80"}',
    '{"state": "READY", "control_url": "file:///etc/passwd"}',
    '{"state": "READY", "phase": "' + "\\u001b]0;owned\\u0007" * 50 + '"}',
    '{"state": "HAPPY"}',
    "[1]",
    "\x00\xff",
    _NEST,
)
# What its control plane answers when it is asked for its document.
DOCUMENTS = (
    _NEST.encode(),
    b'{"state": NaN}',
    b'{"in_flight": ' + b"9" * 400 + b"}",
    b'{"restarts": 1e999, "reason": 5, "progress": []}',
    b'{"reason": {"message": {"a": 1}}, "in_flight": [], "gpu_ids": {}}',
    b"\xff\xfe",
    b"null",
)
ENDLESS = len(DOCUMENTS)  # as a last one: a document that never ends


class HostileWorker:
    """Its tricks, by their names."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._control_url = ""
        self.tricks: dict[str, Callable[[], None]] = {
            "control": self.answer_control,
            "nonsense": self.tell_nonsense,
            "flood": self.tell_without_end,
            "long": self.tell_long_words,
            "print": self.print_without_end,
        }

    def run(self, names: list[str]) -> None:
        """Do all of these at once, until SIGTERM."""
        signal.signal(signal.SIGTERM, _end)
        self.tell("READY")
        for name in names:
            threading.Thread(target=self.tricks[name], name=name, daemon=True).start()
        while True:
            time.sleep(1)

    def tell(self, state: str, message: str = "") -> None:
        """A message that is right."""
        reason = {"message": message} if message else None
        document = {"state": state, "reason": reason, "control_url": self._control_url or None}
        self.send(json.dumps(document))

    def send(self, document: str) -> None:
        """Whatever it is, as a state; with a sign of life, or the supervisor ends this soon."""
        with contextlib.suppress(OSError):
            text = f"WATCHDOG=1\nX_ICHAT_LIFECYCLE={document}"
            self._sock.sendto(text.encode(errors="replace"), self._address)

    def tell_nonsense(self) -> None:
        """All of NONSENSE, and datagrams that are no messages at all."""
        for text in itertools.cycle(NONSENSE):
            self.send(text)
            with contextlib.suppress(OSError):
                self._sock.sendto(os.urandom(100), self._address)

    def tell_without_end(self) -> None:
        """States, as fast as they go."""
        for state in itertools.cycle(("DEGRADED", "READY")):
            self.tell(state)

    def tell_long_words(self) -> None:
        """States with 30 KB of words, and with more than a message may have."""
        for number, size in enumerate(itertools.cycle((30_000, 150_000))):
            self.tell("DEGRADED" if number % 2 else "READY", f"{number} " + "x" * size)

    def print_without_end(self) -> None:
        """Lines that are no lines, forged ones, and what a terminal would obey."""
        forged = {"worker": "honest", "logger": "ichat_lifecycle.fleet", "level": "error"}
        parts = (
            json.dumps({**forged, "event": "worker_killed\u009b2J\nforged"}) + "\n",
            '{"event": "x", "a": ' + _NEST + "\n",
            '{"level": "error", "event": NaN, "n": 1e999}\n',
            "\x1b]0;owned\x07\x1b[2J\u009b2J\n",
            "\n" * 1000,
            "x" * 100_000 + "\n",
        )
        for part in itertools.cycle(parts):
            os.write(1, part.encode())

    def answer_control(self) -> None:
        """Each of DOCUMENTS in turn, and one that never ends."""
        server = socket.create_server(("127.0.0.1", 0))
        self._control_url = f"http://evil.example:{server.getsockname()[1]}"
        self.tell("READY")
        for number in itertools.count():
            connection, _ = server.accept()
            with contextlib.suppress(OSError), connection:
                connection.settimeout(5.0)
                connection.recv(65_536)
                for part in _answer(number % (len(DOCUMENTS) + 1)):
                    connection.sendall(part)


def _answer(number: int) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    if number != ENDLESS:
        body = DOCUMENTS[number]
        yield b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
        return
    yield b"Connection: close\r\n\r\n["
    while True:
        yield b"1," * 30_000


def _end(_: int, __: FrameType | None) -> None:
    """Its last words are too deep for a parser, and end with no line."""
    os.set_blocking(1, False)  # its pipe may be full
    with contextlib.suppress(OSError):
        os.write(1, _NEST.encode())
    os._exit(0)


def main() -> int:
    """Never returns."""
    worker = HostileWorker()
    names = os.environ.get(VARIABLE, "")
    worker.run(names.split(",") if names else list(worker.tricks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
