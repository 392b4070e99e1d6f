"""Whose a process is, and whose is the other end of a connection.

Anybody on this machine can name a thread as ours are named, and listen where one of ours has
listened a moment ago. So a process is ours by its user ids, and a connection by those of the socket
at its other end, which the kernel shows once it was accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

TABLES = Path("/proc/self/net")
LOOK_S = 0.005  # between two looks at a connection that waits to be accepted
# Of the other end's socket, in the kernel's numbers: open, or about to be.
_OPEN = ("01", "03")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def uid_of(pid: int) -> int:
    """The user id of a process that is not ours; our own where all of its ids are ours.

    All: a set-user-id program that somebody else runs has ours only in effect.

    Raises:
        psutil.Error: it has ended.
    """
    own = os.geteuid()
    return next((uid for uid in psutil.Process(pid).uids() if uid != own), own)


def shares_our_pids(pid: int) -> bool:
    """Whether its number is the one that it knows itself by: it is in no container."""
    try:
        here, there = (Path(f"/proc/{who}/ns/pid").stat() for who in ("self", pid))
    except OSError:
        return False
    return here.st_ino == there.st_ino


async def peer_uid(sock: Any) -> int | None:
    """The user id of who has accepted a connection of ours; None where it is not of this machine.

    Waits until it is accepted: bound it by a time-out.
    """
    if sock.family == socket.AF_UNIX:
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )
        return int(uid)
    there, here = sock.getpeername(), sock.getsockname()
    while (found := _accepted(there, here)) is not None:
        uid, inode = found
        if inode:  # until it is accepted it is nobody's, which the kernel shows as root's
            return uid
        await asyncio.sleep(LOOK_S)
    return None


def _accepted(there: tuple[Any, ...], here: tuple[Any, ...]) -> tuple[int, int] | None:
    """User id and inode of the socket at the other end."""
    for table, *ends in _spellings(there, here):
        with contextlib.suppress(OSError):
            for line in (TABLES / table).read_text(encoding="ascii").splitlines():
                words = line.split()
                if words[1:3] == ends and words[3] in _OPEN:
                    return int(words[7]), int(words[9])
    return None


def _spellings(there: tuple[Any, ...], here: tuple[Any, ...]) -> Iterator[tuple[str, str, str]]:
    """The table, and the two ends as they stand there.

    What listens on :: has IPv4's addresses among those of IPv6.
    """
    one, other = _address(there[0]), _address(here[0])
    if isinstance(one, ipaddress.IPv4Address):
        yield "tcp", _end(one, there[1]), _end(other, here[1])
        one, other = (ipaddress.IPv6Address(f"::ffff:{ip}") for ip in (one, other))
    yield "tcp6", _end(one, there[1]), _end(other, here[1])


def _address(text: str) -> Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _end(ip: Address, port: int) -> str:
    """Words of the machine's own byte order, in hexadecimal."""
    words = struct.unpack(f"={len(ip.packed) // 4}I", ip.packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"
