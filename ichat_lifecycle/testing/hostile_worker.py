"""A worker that harms whoever supervises it, as far as that lets it. For tests of supervisors.

Run it in place of `serve`, with the same words, as
`python -m ichat_lifecycle.testing.hostile_worker`. By environment variables: HOSTILE_TRICKS names
what it does, with commas between, by default everything at once; HOSTILE_LIFE_S has it end by
itself after so many seconds, each life in another way, by default it goes on until it is stopped.

It does not signal its supervisor or write to its memory, which no process of the same user can be
kept from.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType

from ichat_lifecycle.adapters.sd_notify import ALIVE, LIFECYCLE, SOCKET_VARIABLE
from ichat_lifecycle.testing.hostile_plane import HostilePlane, in_turn

VARIABLE = "HOSTILE_TRICKS"
LIFE_VARIABLE = "HOSTILE_LIFE_S"
ORPHAN_S = 5

_NEST = "[" * 15_000
_COMMANDS = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;aGk=\x07\x9b5m\u202e\x1b[5m"  # to a terminal


def _ready(**fields: object) -> str:
    return json.dumps({"state": "READY", **fields})


# What a supervisor must not believe, nor stumble over: as a state, but for the last ones.
NONSENSE = (
    _ready(reason="text"),
    _ready(reason={"message": ["x"], "code": {}}),
    '{"state": "READY", "reason": {"message": ' + _NEST,
    '{"state": "READY", "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "{}",
    '{"state": "HAPPY"}',
    '{"state": {"a": []}}',
    '{"state": "READY", "fraction": NaN}',
    '{"state": "READY", "fraction": 1e999}',
    '{"state": "READY", "expected_s": Infinity}',
    '{"state": "READY", "expected_s": "abc"}',
    '{"state": "READY", "expected_s": ' + "9" * 5000 + "}",
    _ready(control_url="http://169.254.169.254:80"),
    _ready(control_url="http://127.0.0.1:1"),
    _ready(control_url="http://127.0.0.1:80@evil.example/"),
    _ready(control_url="file:///etc/passwd"),
    _ready(phase=_COMMANDS * 50, reason={"code": "x", "message": _COMMANDS}),
    _ready(reason={"code": "x", "message": "y" * 150_000}),
    "[1]",
    "\x00\xff",
    _NEST,
)
DATAGRAMS = (
    b"",
    b"\xff\xfe\x00" * 100,
    LIFECYCLE.encode(),
    b"\n".join([f"{LIFECYCLE}={{}}".encode()] * 1000),
    b"READY=1\nMAINPID=1\nFDSTORE=1\nBARRIER=1",
    *(f"{ALIVE}=1\n{LIFECYCLE}={text}".encode() for text in NONSENSE),
)
# What it prints, in pieces: some are no whole line.
PRINTED = (
    _COMMANDS.encode() + b"\r\n",
    json.dumps(
        {
            "worker": "honest",
            "logger": "ichat_lifecycle.fleet",
            "level": "error",
            "event": "worker_killed\u009b2J\nforged",
        }
    ).encode()
    + b"\n",
    b'{"level": "error", "event": "x\\nhonest: error: it burns"}\n',
    b'{"event": "x", "a": ' + _NEST.encode() + b"\n",
    b'{"level": "error", "event": NaN, "n": 1e999}\n',
    b'{"event": 1' + b"0" * 10_000 + b"}\n",
    b'{"event": {}, "level": ["error"], "logger": 7, "timestamp": null}\n',
    b"ichat-lifecycle: error: \x1b[31m" + b"y" * 100_000 + b"\n",
    b"\xff\xfe\x00\x00\n",
    "a\u2028b\u0085c\u2029d\n".encode(),
    b"\n" * 1000,
    b"1 %\r" * 1000,
    b"x" * 100_000 + b"\n",
)


def _of_itself() -> None:
    os._exit(70)


def _with_an_open_line(code: int = 1) -> None:
    """Its last words are too deep for a parser, and end with no line."""
    with contextlib.suppress(OSError):
        os.set_blocking(1, False)  # its pipe may be full
        os.write(1, _NEST.encode())
    os._exit(code)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stopped() -> None:
    """It neither ends nor tells anything."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _with_an_orphan() -> None:
    """Somebody goes on to print, and to hold what it had open."""
    program = (
        "import os, time\n"
        f"end = time.monotonic() + {ORPHAN_S}\n"
        "while time.monotonic() < end:\n"
        "    os.write(1, b'an orphan\\n' * 100)\n"
        "    time.sleep(0.01)\n"
    )
    subprocess.Popen([sys.executable, "-c", program], close_fds=False, start_new_session=True)
    os._exit(70)


def _deaf() -> None:
    """It hears no signal that can be ignored, and goes on until it is killed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


ENDS: Mapping[str, Callable[[], None]] = {
    "of itself": _of_itself,
    "with an open line": _with_an_open_line,
    "killed": _killed,
    "stopped": _stopped,
    "with an orphan": _with_an_orphan,
    "deaf": _deaf,
}


class HostileWorker:
    """Its tricks, by their names.

    Args:
        handed: the descriptor of the listening socket that it was handed.
        control_port: where its control plane answers; 0: on any free port.
    """

    def __init__(self, handed: int, control_port: int) -> None:
        self._address = os.environ.get(SOCKET_VARIABLE, "").replace("@", "\0", 1)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._handed = handed
        self._control_port = control_port
        self._control_url = ""
        self.tricks: Mapping[str, Callable[[], None]] = {
            "control": self.answer_control,
            "nonsense": self.tell_nonsense,
            "flood": self.tell_without_end,
            "long": self.tell_long_words,
            "print": self.print_without_end,
            "socket": self.misuse_socket,
            "shutdown": self.shut_socket_down,
        }

    def run(self, names: list[str], life_s: float) -> None:
        """Do all of these at once, for so many seconds, or until SIGTERM where that is 0."""
        signal.signal(signal.SIGTERM, _end)
        self.tell("READY")
        for name in names:
            threading.Thread(target=self.tricks[name], name=name, daemon=True).start()
        if life_s:
            time.sleep(life_s)
            random.choice(tuple(ENDS.values()))()
        while True:
            time.sleep(1)

    def tell(self, state: str, message: str = "") -> None:
        """A message that is right."""
        reason = {"code": "x", "message": message} if message else None
        document = {"state": state, "reason": reason, "control_url": self._control_url or None}
        # With a sign of life, or the supervisor ends this soon.
        self.send(f"{ALIVE}=1\n{LIFECYCLE}={json.dumps(document)}".encode())

    def send(self, datagram: bytes) -> None:
        with contextlib.suppress(OSError):  # more than the kernel takes
            self._sock.sendto(datagram, self._address)

    def tell_nonsense(self) -> None:
        """All of DATAGRAMS, and noise."""
        for datagram in itertools.cycle(DATAGRAMS):
            self.send(datagram)
            self.send(os.urandom(100))

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
        for piece in itertools.cycle(PRINTED):
            os.write(1, piece)

    def misuse_socket(self) -> None:
        """The listening socket is its supervisor's, too; so are the flags of a shared one."""
        handed = socket.socket(fileno=self._handed)
        while True:
            handed.setblocking(True)
            handed.listen(0)
            time.sleep(0.01)

    def shut_socket_down(self) -> None:
        """For all that hold it, as often as it listens again."""
        handed = socket.socket(fileno=os.dup(self._handed))
        while True:
            with contextlib.suppress(OSError):  # it is shut down still
                handed.shutdown(socket.SHUT_RDWR)
            time.sleep(0.5)

    def answer_control(self) -> None:
        """Each trick of testing.hostile_plane in turn."""
        asyncio.run(self._answer_control())

    async def _answer_control(self) -> None:
        async with HostilePlane(in_turn(), self._control_port).serving() as plane:
            self._control_url = plane.url.replace("127.0.0.1", "evil.example")
            self.tell("READY")
            await asyncio.Event().wait()


def _end(_: int, __: FrameType | None) -> None:
    _with_an_open_line(0)


def main() -> int:
    """Lives once."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--control-port", type=int, default=0)
    args, _ = parser.parse_known_args()
    worker = HostileWorker(args.fd, args.control_port)
    names = os.environ.get(VARIABLE, "")
    life_s = float(os.environ.get(LIFE_VARIABLE, "0"))
    worker.run(names.split(",") if names else list(worker.tricks), life_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
