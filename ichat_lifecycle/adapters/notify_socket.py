"""The other end of sd_notify: where a supervisor hears what its workers tell."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
from collections.abc import Mapping
from typing import Any

from ichat_lifecycle.adapters.sd_notify import LIFECYCLE
from ichat_lifecycle.fleet.ports import Hearer

DATAGRAM_LIMIT = 1 << 18
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7)


class NotifySocket:
    """One datagram socket for all workers. For one event loop.

    Its name is in the kernel's abstract namespace, so that nothing is left of it whatever ends us.
    Anybody on the machine can send to it: a message counts only if the kernel says that it comes
    from the process of a worker.
    """

    def __init__(self) -> None:
        self._hearers: dict[int, Hearer] = {}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.setblocking(False)
        name = f"ichat-lifecycle-{os.getpid()}-{secrets.token_hex(4)}"
        self._sock.bind("\0" + name)
        self.address = "@" + name
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._read)

    def hear(self, pid: int, hearer: Hearer) -> None:
        """From now on `hearer` gets what this process tells of its life."""
        self._hearers[pid] = hearer

    def forget(self, pid: int) -> None:
        self._read()  # what it has told before its end comes before that
        self._hearers.pop(pid, None)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()

    def _read(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(
                    DATAGRAM_LIMIT, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return
            hearer = self._hearers.get(_sender(ancillary))
            if hearer is not None:
                hearer(_lifecycle(data))


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return 0


def _lifecycle(data: bytes) -> Mapping[str, Any] | None:
    """What a message says of a life; None where it says nothing that we understand."""
    for line in data.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        if name == LIFECYCLE:
            try:
                told = json.loads(value)
            except json.JSONDecodeError:
                return None
            return told if isinstance(told, dict) and "state" in told else None
    return None
