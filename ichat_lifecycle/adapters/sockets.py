"""The listening socket: bound before the engine starts, with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from ichat_lifecycle.adapters.threads import in_thread
from ichat_lifecycle.errors import (
    NO_DESCRIPTOR,
    OPEN_FILES_HINT,
    AddressError,
    ArgumentsError,
)
from ichat_lifecycle.ports import Address
from ichat_lifecycle.private_files import FILE, given_umask

BACKLOG = 2048  # connections that wait to be accepted, as Uvicorn has it
UDS_PATH_MAX = 107  # bytes: sun_path of sockaddr_un has 108, the last one is NUL
UDS_CONNECT_TIMEOUT_S = 1.0
FEW_FILES = 1024  # below it, clients are likely to be turned away
_ANY = ("0.0.0.0", "::")


def listening_socket(
    host: str | None, port: int, uds: str | None = None, *, private: bool = False
) -> socket.socket:
    """A socket that listens, not inherited by child processes, with SO_REUSEADDR.

    Args:
        host: IPv4 or IPv6 address or a name; None or "" is every IPv4 address of this machine.
        port: 0 takes any free one.
        uds: path of a Unix socket; host and port are then ignored. A stale one is removed.
        private: only this user may connect to the Unix socket; else the umask decides.

    Raises:
        AddressError: the address is taken, not allowed, not of this machine, or cannot be one.
        ArgumentsError: the port is not from 0 to 65535.
    """
    return _unix_socket(uds, private) if uds else _tcp_socket(host, port)


def check_listening(host: str | None, port: int, uds: str | None = None) -> None:
    """Raises what `listening_socket` would, and leaves nothing behind."""
    if uds:
        # Binding would make the file. What keeps it from being made can be seen.
        check_unix_path(uds)
    else:
        _tcp_socket(host, port).close()


# TCP ----------------------------------------------------------------------------------------------


def _tcp_socket(host: str | None, port: int) -> socket.socket:
    family, ip, scope = _resolve(host or _ANY[0])
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        # Without it a restart fails for a minute, while old connections are in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port, *scope))
        # With SO_REUSEADDR two sockets may bind one port; only listen() tells them apart.
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OverflowError):
            raise ArgumentsError(f"--port {port}: {error}") from error
        raise _tcp_error(error, host or ip, ip, port) from error
    return sock


def _resolve(host: str) -> tuple[socket.AddressFamily, str, tuple[int, ...]]:
    """Family, address, and IPv6's flow and scope. IPv4 first where a name has both, as in vLLM."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise _unresolved(host, error) from error
    first = next((f for f in found if f[0] == socket.AF_INET), found[0])
    ip, _port, *scope = first[4]
    return first[0], str(ip), tuple(int(s) for s in scope)


def _unresolved(host: str, error: Exception) -> AddressError:
    if hint := _hint(error):
        return AddressError(f"--host {host}: {_words(error)}", hint=hint, root_cause=str(error))
    return AddressError(
        f"--host {host}: the name does not resolve ({_words(error)})",
        code="address_not_resolved",
        hint="give an IP address of this machine, or 0.0.0.0 for all of them",
    )


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _tcp_error(error: OSError, host: str, ip: str, port: int) -> AddressError:
    where = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
    match error.errno:
        case errno.EADDRINUSE:
            return AddressError(
                f"--port {port}: {where} is taken{_holder(ip, port)}",
                code="address_taken",
                hint="choose another --port, or end the process that listens there",
            )
        case errno.EACCES | errno.EPERM:
            return AddressError(
                f"--port {port}: not allowed to listen on {where}",
                code="address_not_allowed",
                hint="choose a port from 1024 on, or give the process CAP_NET_BIND_SERVICE",
            )
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            return AddressError(
                f"--host {host}: {ip} is not an address of this machine",
                code="address_not_local",
                hint="give one of its addresses, or 0.0.0.0 for all of them",
            )
    what = f"cannot listen on {where}: {error.strerror}"
    return AddressError(what, hint=_hint(error), root_cause=str(error))


def _hint(error: Exception) -> str | None:
    lacks = isinstance(error, OSError) and error.errno in NO_DESCRIPTOR
    return OPEN_FILES_HINT if lacks else None


def _holder(ip: str, port: int) -> str:
    """Who listens there, as ` by pid 42 (python3)`; empty where the system does not tell."""
    try:
        for connection in psutil.net_connections("tcp"):
            at = connection.laddr
            if connection.status != psutil.CONN_LISTEN or not at or at.port != port:
                continue
            if connection.pid and (at.ip == ip or ip in _ANY or at.ip in _ANY):
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError, RuntimeError):
        pass  # without the right to look, the error stays true without the name
    return ""


# Unix sockets -------------------------------------------------------------------------------------


def _unix_socket(path: str, private: bool) -> socket.socket:
    if check_unix_path(path):
        _remove(path)
    sock: socket.socket | None = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if private:
            os.fchmod(sock.fileno(), FILE)  # before it has a name: the file is made with this
        with given_umask():
            sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:  # somebody came between the check and the bind
            raise _unix_taken(path) from error
        what = f"--uds {path}: {error.strerror}"
        raise AddressError(what, hint=_hint(error), root_cause=str(error)) from error
    return sock


def check_unix_path(path: str) -> bool:
    """Whether a stale socket lies at `path`, to be removed before it can be bound.

    Raises:
        AddressError: somebody accepts connections there, another kind of file is in the way, the
            directory is missing or not writable, or the path is too long.
    """
    length = len(os.fsencode(path))
    if length > UDS_PATH_MAX:
        raise AddressError(
            f"--uds {path}: the path is {length} bytes long, the system allows {UDS_PATH_MAX}",
            hint="choose a shorter one, for example below /tmp or /run",
        )
    parent = Path(path).parent
    try:
        if not parent.is_dir():
            raise AddressError(f"--uds {path}: no such directory as {parent}", hint="make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise AddressError(f"--uds {path}: not allowed to write to {parent}")
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise AddressError(f"--uds {path}: {_words(error)}") from error
    if not stat.S_ISSOCK(mode):
        raise AddressError(
            f"--uds {path}: a file that is not a socket is there",
            hint="choose another path, or remove the file",
        )
    return _is_stale(path)


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(UDS_CONNECT_TIMEOUT_S)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:
            return False  # its owner has removed it meanwhile
        except (TimeoutError, BlockingIOError):
            pass  # a full backlog: somebody listens, and is slow
        except OSError as error:
            raise AddressError(f"--uds {path}: {error.strerror}", root_cause=str(error)) from error
    raise _unix_taken(path)


def _unix_taken(path: str) -> AddressError:
    return AddressError(
        f"--uds {path}: somebody listens there",
        code="address_taken",
        hint="choose another path, or end the process that listens there",
    )


# Limits -------------------------------------------------------------------------------------------


def raise_nofile_limit(target: int = 65535) -> int:
    """Raises the soft limit on open files to `target`, or as far as the hard limit allows.

    Never lowers it, never raises an error. Returns the soft limit that now holds;
    `resource.RLIM_INFINITY` is none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = target if hard == resource.RLIM_INFINITY else min(target, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def prepare_for_clients() -> None:
    """Raises the limit on open files, and warns of one that stays low.

    Each connection takes one, and the engine some fifty.
    """
    limit = raise_nofile_limit()
    if limit != resource.RLIM_INFINITY and limit < FEW_FILES:
        import structlog  # not at the top: the checks before the start need none

        structlog.get_logger("ichat_lifecycle").warning(
            "few_open_files_allowed",
            limit=limit,
            hint=f"raise the hard limit on open files (ulimit -n) to {FEW_FILES} or more",
        )


# The port -----------------------------------------------------------------------------------------


class SocketBinder:
    """The listening socket of one worker (ports.Binder).

    Args:
        address: asked at bind(), because it is known only once the arguments are.
        private: see listening_socket().

    Attributes:
        bound: the address it listens on, with the real port where 0 was asked for; None while it
            does not.
        inside: the same as a numeric address: where the worker looks at itself. A name may resolve
            elsewhere by now.
    """

    def __init__(self, address: Callable[[], Address], *, private: bool = False) -> None:
        self._address = address
        self._private = private
        self._sock: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self.bound: Address | None = None
        self.inside: Address | None = None

    async def bind(self) -> socket.socket:
        """Raises AddressError when the address is taken or not allowed."""
        address = self._address()
        prepare_for_clients()
        host = "" if address.uds else await _numeric(address.host)
        # No await from here on: a cancelled bind leaves either nothing or a socket to release.
        return self.bind_now(address, host)

    def bind_now(self, address: Address, host: str) -> socket.socket:
        """The same, with a host that needs no name server. Raises AddressError."""
        self._sock = listening_socket(host, address.port, address.uds, private=self._private)
        if address.uds:
            self._inode = _inode(address.uds)
            self.bound = self.inside = address
        else:
            ip, port, *_ = self._sock.getsockname()
            self.bound = replace(address, port=port)
            self.inside = replace(self.bound, host=ip)
        return self._sock

    async def release(self) -> None:
        """Closes the socket and removes its file, if that is still ours. Safe without a bind."""
        sock, bound, self._sock, self.bound = self._sock, self.bound, None, None
        self.inside = None
        if bound is not None and bound.uds and _inode(bound.uds) == self._inode:
            # Before the close: an open socket keeps its inode number from being used again.
            _remove(bound.uds)
        if sock is not None:
            sock.close()


async def _numeric(host: str) -> str:
    """A name as an address, resolved off the loop, which a slow name server would block."""
    try:
        ipaddress.ip_address(host or _ANY[0])
    except ValueError:
        return (await in_thread(lambda: _resolve(host), "resolve"))[1]
    return host


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
