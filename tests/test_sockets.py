"""The listening socket, its errors and its release. Real sockets, on loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import structlog

from ichat_lifecycle.adapters import sockets
from ichat_lifecycle.adapters.sockets import (
    UDS_PATH_MAX,
    SocketBinder,
    check_listening,
    listening_socket,
    raise_nofile_limit,
)
from ichat_lifecycle.errors import AddressError, ArgumentsError, ExitCode
from ichat_lifecycle.ports import Address

LOOPBACKS = [
    ("127.0.0.1", socket.AF_INET),
    ("::1", socket.AF_INET6),
    # A name that has both addresses is IPv4, as in vLLM.
    ("localhost", socket.AF_INET),
]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 on which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refused(host: str | None, port: int, uds: str | None = None) -> AddressError:
    with pytest.raises(AddressError) as caught:
        listening_socket(host, port, uds).close()
    with pytest.raises(AddressError) as checked:
        check_listening(host, port, uds)
    assert checked.value.line() == caught.value.line(), "the check says what the bind says"
    assert caught.value.exit_code is ExitCode.ADDRESS_UNAVAILABLE
    assert "\n" not in caught.value.line()
    return caught.value


@pytest.mark.parametrize(("host", "family"), LOOPBACKS)
def test_it_listens(host: str, family: socket.AddressFamily) -> None:
    """A client gets through; the family is that of the host; engine processes do not inherit it."""
    with listening_socket(host, 0) as sock:
        assert sock.family is family
        assert not sock.get_inheritable()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        with socket.create_connection(sock.getsockname()[:2], timeout=5):
            pass


@pytest.mark.parametrize("host", [None, ""])
def test_no_host_is_every_ipv4_address(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's default. Loopback stands in for it here, so that no test opens a port to others."""
    monkeypatch.setattr(sockets, "_ANY", ("127.0.0.1", "::1"))
    with listening_socket(host, 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


def test_any_address_is_0_0_0_0() -> None:
    """What the test above put loopback in the place of."""
    assert sockets._ANY == ("0.0.0.0", "::")


def test_a_taken_port_names_its_holder(taken: int) -> None:
    """Whoever reads the error knows what to end."""
    error = refused("127.0.0.1", taken)
    name = psutil.Process().name()
    assert f"127.0.0.1:{taken} is taken by pid {os.getpid()} ({name})" in error.message
    assert error.code == "address_taken"


def test_a_port_that_is_bound_and_not_listening_is_not_shared() -> None:
    """SO_REUSEADDR lets two sockets bind one port: only one of them may listen."""
    with listening_socket("127.0.0.1", 0) as first:
        assert refused("127.0.0.1", first.getsockname()[1]).code == "address_taken"


@pytest.mark.parametrize(
    "denial", [psutil.AccessDenied(), PermissionError(), RuntimeError("/proc")]
)
def test_without_the_right_to_look_the_holder_is_left_out(
    taken: int, monkeypatch: pytest.MonkeyPatch, denial: Exception
) -> None:
    """The error stays the same error."""

    def denied(kind: str) -> list[Any]:
        raise denial

    monkeypatch.setattr(psutil, "net_connections", denied)
    assert refused("127.0.0.1", taken).message.endswith(f"127.0.0.1:{taken} is taken")


def test_the_holder_of_another_port_or_address_is_not_named(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only who listens, on that port, on that address or on all."""

    def connection(ip: str, port: int, status: str, pid: int | None) -> SimpleNamespace:
        return SimpleNamespace(laddr=SimpleNamespace(ip=ip, port=port), status=status, pid=pid)

    listen = psutil.CONN_LISTEN
    others = [
        connection("127.0.0.1", taken + 1, listen, os.getpid()),
        connection("127.0.0.9", taken, listen, os.getpid()),
        connection("127.0.0.1", taken, psutil.CONN_ESTABLISHED, os.getpid()),
        connection("127.0.0.1", taken, listen, None),
        SimpleNamespace(laddr=(), status=listen, pid=os.getpid()),
    ]
    monkeypatch.setattr(psutil, "net_connections", lambda kind: others)
    assert "pid" not in refused("127.0.0.1", taken).message
    others.append(connection("0.0.0.0", taken, listen, os.getpid()))
    assert f"pid {os.getpid()} " in refused("127.0.0.1", taken).message
    others[:] = [connection("127.0.0.1", taken, listen, os.getpid())]
    assert f"pid {os.getpid()} " in refused("0.0.0.0", taken).message


@pytest.mark.parametrize(
    ("host", "code", "part"),
    [
        # 192.0.2.0/24 is set aside for documentation: no machine has it.
        ("192.0.2.1", "address_not_local", "192.0.2.1 is not an address of this machine"),
        ("2001:db8::1", "address_not_local", "2001:db8::1 is not an address of this machine"),
        ("no-such-host.invalid", "address_not_resolved", "does not resolve"),
        ("a..b", "address_not_resolved", "does not resolve"),
        ("x" * 300, "address_not_resolved", "does not resolve"),
    ],
)
def test_an_address_that_cannot_be_had(host: str, code: str, part: str) -> None:
    """The error says which of the reasons it is."""
    error = refused(host, 0)
    assert (error.code, part in error.message, bool(error.hint)) == (code, True, True)


def found(*ips: str) -> list[Any]:
    """What getaddrinfo finds for a name with these addresses."""
    families = {ip: socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in ips}
    return [(family, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip, family in families.items()]


def test_ipv4_comes_first_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver's order is not vLLM's."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found("::1", "127.0.0.1"))
    with listening_socket("name", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "(Name or service not known)"),
        (UnicodeError("label too long"), "(label too long)"),
    ],
)
def test_why_a_name_does_not_resolve(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resolver's own words are passed on."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert words in refused("name", 0).message


def failing(number: int) -> type[socket.socket]:
    class Failing(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(number, os.strerror(number))

        def connect(self, address: Any) -> None:
            raise OSError(number, os.strerror(number))

    return Failing


@pytest.mark.parametrize(("host", "named"), [("localhost", "localhost"), (None, "127.0.0.1")])
def test_the_error_has_the_host_as_it_was_given(
    host: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the address that was tried for it."""
    monkeypatch.setattr(sockets, "_ANY", ("127.0.0.1", "::1"))
    monkeypatch.setattr(socket, "socket", failing(errno.EADDRNOTAVAIL))
    message = refused(host, 0).message
    assert message == f"--host {named}: 127.0.0.1 is not an address of this machine"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        # As root these do not happen by themselves.
        (errno.EACCES, "address_not_allowed"),
        (errno.EPERM, "address_not_allowed"),
        (errno.EAFNOSUPPORT, "address_not_local"),
        (errno.ENOBUFS, "address_unavailable"),
    ],
)
def test_what_the_system_refuses(number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal is an AddressError; pytest would report a socket that is left open."""
    monkeypatch.setattr(socket, "socket", failing(number))
    error = refused("127.0.0.1", 80)
    assert error.code == code
    assert "127.0.0.1" in error.message


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_a_bad_argument(port: int) -> None:
    """Not an address that could be free at another time."""
    with pytest.raises(ArgumentsError, match=f"--port {port}"):
        listening_socket("127.0.0.1", port)


# Unix sockets -------------------------------------------------------------------------------------


@pytest.fixture
def path() -> Iterator[Path]:
    # pytest's own directories can be too long for a Unix socket.
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory, "s")


def make_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


def test_a_unix_socket_listens(path: Path) -> None:
    """Host and port are ignored beside --uds."""
    with listening_socket("192.0.2.1", 70000, str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_stale_unix_socket_is_replaced_only_by_the_bind(path: Path) -> None:
    """What a killed worker has left is in nobody's way; the check leaves it there."""
    make_stale(path)
    check_listening(None, 0, str(path))
    assert path.exists()
    with listening_socket(None, 0, str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_the_check_makes_no_file(path: Path) -> None:
    """A free path is still free after it."""
    check_listening(None, 0, str(path))
    assert not path.exists()


def test_a_living_unix_socket_is_taken(path: Path) -> None:
    """It is neither removed nor shared."""
    with listening_socket(None, 0, str(path)):
        assert refused(None, 0, str(path)).code == "address_taken"
        assert path.exists()


def test_a_unix_socket_whose_owner_is_slow_is_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full backlog is no sign of death, and does not hold the check up."""
    monkeypatch.setattr(sockets, "UDS_CONNECT_TIMEOUT_S", 0.05)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        assert refused(None, 0, str(path)).code == "address_taken"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, "address_unavailable"), (errno.EPROTOTYPE, None)]
)
def test_a_unix_socket_that_cannot_be_asked(
    path: Path, number: int, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, or one of another type: not ours to remove."""
    make_stale(path)
    monkeypatch.setattr(socket, "socket", failing(number))
    error = refused(None, 0, str(path))
    assert os.strerror(number) in error.message
    assert error.code == (code or error.code)
    assert path.exists()


def test_a_unix_socket_that_goes_while_it_is_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner has just ended: the path is free."""
    make_stale(path)
    monkeypatch.setattr(socket, "socket", failing(errno.ENOENT))
    assert not sockets.check_unix_path(str(path))


@pytest.mark.parametrize(
    ("number", "code"),
    # Somebody may come between the check and the bind.
    [(errno.EADDRINUSE, "address_taken"), (errno.EROFS, "address_unavailable")],
)
def test_a_unix_socket_that_cannot_be_bound(
    path: Path, number: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AddressError; pytest would report a socket that is left open."""
    monkeypatch.setattr(socket, "socket", failing(number))
    with pytest.raises(AddressError, match=f"--uds {path}: ") as caught:
        listening_socket(None, 0, str(path))
    assert caught.value.code == code


def test_a_path_that_cannot_be_one() -> None:
    """Whatever the system says of it."""
    assert "null byte" in refused(None, 0, "/tmp/a\0b").message


def in_the_way(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious", encoding="utf-8")
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to("/nowhere")


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_another_file_in_the_way_stays(path: Path, kind: str) -> None:
    """Only stale sockets are ever removed."""
    in_the_way(path, kind)
    assert "a file that is not a socket" in refused(None, 0, str(path)).message
    assert os.path.lexists(path)


def test_a_missing_directory(tmp_path: Path) -> None:
    """It is named."""
    missing = tmp_path / "none"
    assert f"no such directory as {missing}" in refused(None, 0, str(missing / "s")).message


@pytest.mark.parametrize(("length", "fits"), [(UDS_PATH_MAX, True), (UDS_PATH_MAX + 1, False)])
def test_the_limit_on_a_paths_length(length: int, fits: bool) -> None:
    """It is the system's own: one byte less can be bound."""
    path = f"/tmp/{os.getpid()}".ljust(length - len("é".encode()), "x") + "é"  # bytes count
    assert len(os.fsencode(path)) == length
    if fits:
        listening_socket(None, 0, path).close()
        Path(path).unlink()
    else:
        assert (
            f"{length} bytes long, the system allows {UDS_PATH_MAX}"
            in refused(None, 0, path).message
        )


def test_a_directory_without_the_right_to_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said without a bind, which the check leaves out. Patched, as root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not allowed to write" in refused(None, 0, str(path)).message


# The limit on open files --------------------------------------------------------------------------


class FakeLimits:
    """RLIMIT_NOFILE of a pretended process."""

    def __init__(self, soft: int, hard: int, error: Exception | None = None) -> None:
        self.soft, self.hard, self.error = soft, hard, error

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.soft, self.hard

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        if self.error:
            raise self.error
        self.soft, self.hard = limits


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "error", "expected"),
    [
        (1024, 1_000_000, None, 65535),
        (1024, 4096, None, 4096),
        (1024, INFINITE, None, 65535),
        (100_000, 1_000_000, None, 100_000),
        (INFINITE, INFINITE, None, INFINITE),
        (1024, 4096, ValueError("not allowed"), 1024),
        (1024, 4096, PermissionError("not allowed"), 1024),
    ],
)
def test_the_limit_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, error: Exception | None, expected: int
) -> None:
    """Never lowered, the hard limit untouched, no error where the system says no."""
    limits = FakeLimits(soft, hard, error)
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)
    assert raise_nofile_limit() == expected
    assert (limits.soft, limits.hard) == (expected, hard)


# The port -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "warnings"), [(64, 1), (1024, 0), (resource.RLIM_INFINITY, 0)])
def test_too_few_open_files_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, limit: int, warnings: int
) -> None:
    monkeypatch.setattr(sockets, "raise_nofile_limit", lambda: limit)
    binder = SocketBinder(lambda: Address("127.0.0.1", 0))

    async def life() -> None:
        await binder.bind()
        await binder.release()

    with structlog.testing.capture_logs() as logs:
        asyncio.run(life())
    assert [entry["event"] for entry in logs] == ["few_open_files_allowed"] * warnings


def test_the_binder_knows_the_real_port_and_releases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 0 is resolved, TLS is carried over, the limit is raised, the release frees the port."""
    raised: list[bool] = []

    def raise_limit() -> int:
        raised.append(True)
        return 65535

    monkeypatch.setattr(sockets, "raise_nofile_limit", raise_limit)
    binder = SocketBinder(lambda: Address("127.0.0.1", 0, tls=True))

    async def life() -> None:
        assert binder.bound is None
        sock = await binder.bind()
        ip, port = sock.getsockname()
        assert ip == "127.0.0.1"
        assert binder.bound == Address("127.0.0.1", port, tls=True)
        await binder.release()
        assert binder.bound is None
        assert sock.fileno() == -1
        check_listening("127.0.0.1", port)

    asyncio.run(life())
    assert raised == [True]


def test_the_binder_asks_for_the_address_late() -> None:
    """It is composed before the arguments are parsed."""
    asked: list[bool] = []

    def address() -> Address:
        asked.append(True)
        return Address("127.0.0.1")

    async def life() -> None:
        binder = SocketBinder(address)
        assert not asked
        await binder.bind()
        await binder.release()

    asyncio.run(life())
    assert asked == [True]


def test_a_binder_without_a_host_binds_every_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which loopback stands in here again."""
    monkeypatch.setattr(sockets, "_ANY", ("127.0.0.1", "::1"))

    async def life() -> None:
        binder = SocketBinder(Address)
        sock = await binder.bind()
        assert sock.getsockname()[0] == "127.0.0.1"
        await binder.release()

    asyncio.run(life())


def test_a_binder_that_failed_or_never_bound_can_be_released(taken: int) -> None:
    """The release follows every bind, also one that failed, and does nothing twice."""

    async def life() -> None:
        binder = SocketBinder(lambda: Address("127.0.0.1", taken))
        await binder.release()
        with pytest.raises(AddressError, match="is taken"):
            await binder.bind()
        assert binder.bound is None
        await binder.release()
        await binder.release()

    asyncio.run(life())


def test_the_binder_removes_its_unix_socket(path: Path) -> None:
    """A worker that ended leaves no file."""

    async def life() -> None:
        binder = SocketBinder(lambda: Address(uds=str(path)))
        await binder.bind()
        assert binder.bound == Address(uds=str(path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        await binder.release()

    asyncio.run(life())
    assert not path.exists()


def test_the_binder_leaves_its_successors_unix_socket(path: Path) -> None:
    """Who took the path over meanwhile keeps it."""

    async def life() -> None:
        binder = SocketBinder(lambda: Address(uds=str(path)))
        await binder.bind()
        os.unlink(path)  # noqa: PTH108
        with listening_socket(None, 0, str(path)), socket.socket(socket.AF_UNIX) as client:
            await binder.release()
            client.connect(str(path))

    asyncio.run(life())


def test_a_slow_name_server_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved in another thread, and a bind that waits for it can be cancelled."""
    go = threading.Event()
    asked = threading.Event()
    resolve = socket.getaddrinfo

    def slow(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "slow.invalid":
            asked.set()
            go.wait(30)
            host = "127.0.0.1"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)

    async def life() -> None:
        binder = SocketBinder(lambda: Address("slow.invalid"))
        cancelled = asyncio.create_task(binder.bind())
        while not asked.is_set():
            await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await binder.release()
        go.set()
        await binder.bind()
        assert binder.bound is not None
        assert binder.bound.host == "slow.invalid"
        await binder.release()

    asyncio.run(life())
    assert asked.is_set()
