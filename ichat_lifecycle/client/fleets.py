"""Finds the supervisor of a fleet: by its thread's name, its sockets, and what they answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from ichat_lifecycle.beacon import FLEET_THREAD, token_file
from ichat_lifecycle.certificates import client_context
from ichat_lifecycle.client.errors import SeveralWorkersError, UnreachableError
from ichat_lifecycle.client.find import PROC, ElsewhereError, listening_urls, processes_with

ASK_TIMEOUT_S = 2.0
UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Where it answers; its token, where this user may read it."""

    url: str
    token: str | None = None

    def client(self, timeout_s: float) -> httpx.Client:
        """Raises ArgumentsError: the certificates that the environment names cannot be loaded."""
        if self.url.startswith(UNIX):
            path = self.url.removeprefix(UNIX)
            # Else certificates are loaded for a socket that has none to verify.
            transport = httpx.HTTPTransport(uds=path, verify=False, trust_env=False)
            url = "http://fleet"
            return httpx.Client(
                base_url=url, transport=transport, timeout=timeout_s, trust_env=False
            )
        verify = client_context() if self.url.startswith("https:") else False
        return httpx.Client(base_url=self.url, verify=verify, timeout=timeout_s, trust_env=False)

    def pid(self) -> int | None:
        """Of the fleet that answers there, as it says; None where none does."""
        try:
            with self.client(ASK_TIMEOUT_S) as client:
                told = client.get("/livez").json()["fleet"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return told if isinstance(told, int) else None

    def unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(f"{self.url} does not answer: {error}", code="no_fleet")


def find_fleet(url: str | None) -> Supervisor:
    """The one at this URL, or the only one of this machine.

    Raises:
        UnreachableError: there is none.
        SeveralWorkersError: there are several.
    """
    if url is not None:
        return _at(_whole(url))
    found = list(_supervisors())
    if not found:
        raise UnreachableError(
            "no fleet runs on this machine, as far as this user can see",
            code="no_fleet",
            hint="start one with ichat-lifecycle up FILE, or give --fleet URL",
        )
    if len(found) > 1:
        urls = ", ".join(one.url for one in found)
        raise SeveralWorkersError(f"there are several fleets: {urls}", hint="give --fleet URL")
    return found[0]


def fleets_here() -> list[Mapping[str, Any]]:
    """The documents of all fleets of this machine."""
    documents = []
    for one in _supervisors():
        with contextlib.suppress(httpx.HTTPError, ValueError), one.client(ASK_TIMEOUT_S) as client:
            documents.append(client.get("/fleet").json())
    return [document for document in documents if isinstance(document, Mapping)]


def _whole(url: str) -> str:
    whole = "://" in url or url.startswith(UNIX)
    url = (url if whole else f"http://{url}").rstrip("/")
    # As it listens by default. Who is looked at must be who is asked: ::1 may be another user's.
    return url.replace("//localhost:", "//127.0.0.1:")


def _at(url: str) -> Supervisor:
    """With its token, where it is one of this machine's: a stranger gets none."""
    told = Supervisor(url).pid()
    if told is not None and told in processes_with(FLEET_THREAD, PROC):
        with contextlib.suppress(psutil.Error, ElsewhereError):
            if url in _addresses(told):
                return Supervisor(url, _token_of(told))
    return Supervisor(url)


def _supervisors() -> Iterator[Supervisor]:
    for pid in processes_with(FLEET_THREAD, PROC):
        try:
            urls = _addresses(pid)
        except (psutil.Error, ElsewhereError):
            continue
        for url in urls:
            # It also holds its workers' ports: who answers there is somebody else.
            if Supervisor(url).pid() == pid:
                yield Supervisor(url, _token_of(pid))


def _addresses(pid: int) -> set[str]:
    """Where it listens. Raises psutil.Error, ElsewhereError."""
    here = psutil.Process(pid).net_connections("unix")
    paths = {f"{UNIX}{one.laddr}" for one in here if str(one.laddr).startswith("/")}
    return set(listening_urls(pid, PROC)) | paths


def _token_of(pid: int) -> str | None:
    """The one that it keeps; None where there is none that this user may read."""
    try:
        return token_file(pid).read_text(encoding="ascii") or None
    except (OSError, UnicodeDecodeError):
        return None
