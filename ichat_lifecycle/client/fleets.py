"""Finds the supervisor of a fleet: by its thread's name, its user, its sockets, and its answer.

A supervisor that is found is this user's own: a token that is kept for it goes to nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from ichat_lifecycle.beacon import FLEET_THREAD, token_file
from ichat_lifecycle.client import find
from ichat_lifecycle.client.address import UNIX, fleet_url
from ichat_lifecycle.client.errors import SeveralWorkersError, UnreachableError
from ichat_lifecycle.client.find import ElsewhereError, listening_urls, processes_with
from ichat_lifecycle.client.fleet_client import FleetClient
from ichat_lifecycle.client.owners import shares_our_pids, uid_of
from ichat_lifecycle.credentials import header_value
from ichat_lifecycle.errors import LifecycleError

ASK_TIMEOUT_S = 2.0
TOKEN_LIMIT = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Where it answers.

    Attributes:
        own: it was found to be this user's; nobody else's process is asked in its place.
        token: the one that it keeps for this user's commands; None where there is none.
    """

    url: str
    own: bool = False
    token: str | None = None

    def client(self, timeout_s: float) -> FleetClient:
        """Raises ArgumentsError: the certificates that the environment names cannot be loaded."""
        return FleetClient(self.url, timeout_s, own_only=self.own)


async def find_fleet(url: str | None) -> Supervisor:
    """The one at this URL, or the only one of this user on this machine.

    Raises:
        ArgumentsError: it is no URL.
        UnreachableError: there is none.
        SeveralWorkersError: there are several.
    """
    if url is not None:
        asked = fleet_url(url)
        return next(iter(await _supervisors(asked)), Supervisor(asked))
    found = await _supervisors()
    if not found:
        raise UnreachableError(
            "no fleet of this user's runs on this machine",
            code="no_fleet",
            hint="start one with ichat-lifecycle up FILE, or give --fleet URL",
        )
    if len(found) > 1:
        urls = ", ".join(one.url for one in found)
        raise SeveralWorkersError(f"there are several fleets: {urls}", hint="give --fleet URL")
    return found[0]


async def fleets_here() -> list[Mapping[str, Any]]:
    """The documents of all fleets of this user on this machine."""
    documents = await asyncio.gather(*map(_document, await _supervisors()))
    return [document for document in documents if document is not None]


async def _document(fleet: Supervisor) -> Mapping[str, Any] | None:
    with contextlib.suppress(LifecycleError):
        async with fleet.client(ASK_TIMEOUT_S) as client:
            return await client.get("/fleet")
    return None


async def _supervisors(url: str | None = None) -> list[Supervisor]:
    """This user's; with a URL, the one that listens there."""
    places = [
        (pid, where)
        for pid in processes_with(FLEET_THREAD, find.PROC)
        for where in _addresses(pid)
        if url in (None, where)
    ]
    answers = await asyncio.gather(*(_pid_at(where) for _, where in places))
    # It also holds its workers' ports: who answers there is somebody else.
    found = (place for place, told in zip(places, answers, strict=True) if place[0] == told)
    return [Supervisor(where, own=True, token=_token_of(pid)) for pid, where in found]


async def _pid_at(url: str) -> int | None:
    """Of this user's fleet that answers there, as it says; None where none does."""
    with contextlib.suppress(LifecycleError):
        async with Supervisor(url, own=True).client(ASK_TIMEOUT_S) as client:
            told = (await client.get("/livez")).get("fleet")
            return told if isinstance(told, int) else None
    return None


def _addresses(pid: int) -> Iterator[str]:
    """Where a process of this user's listens; nothing where it is another's, or has ended."""
    with contextlib.suppress(psutil.Error, ElsewhereError):
        if uid_of(pid) != os.geteuid():
            return
        here = psutil.Process(pid).net_connections("unix")
        yield from {f"{UNIX}{one.laddr}" for one in here if str(one.laddr).startswith("/")}
        yield from listening_urls(pid, find.PROC)


def _token_of(pid: int) -> str | None:
    """The one that it keeps, in a file that only this user can have written and can read."""
    if not shares_our_pids(pid):
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError, LifecycleError):
        fd = os.open(token_file(pid), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, encoding="ascii") as file:
            seen = os.fstat(fd)
            private = stat.S_ISREG(seen.st_mode) and not seen.st_mode & 0o077
            if private and seen.st_uid == os.geteuid():
                return header_value("the fleet's token", file.read(TOKEN_LIMIT)) or None
    return None
