"""A held socket that a worker shuts down: it listens again, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from on_loop import DEADLINE_S, eventually, open_files, run
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import lasting_socket
from ichat_lifecycle.adapters.held_socket import Absence, HeldSocket
from ichat_lifecycle.ports import Address

pytestmark = pytest.mark.hostile

LOOPBACK = "127.0.0.1"

# What a worker, or a library that it has loaded, may do with the descriptor that it was handed.
TRICKS = {
    "shutdown": "sock.shutdown(socket.SHUT_RDWR)",
    "shutdown of one direction": "sock.shutdown(socket.SHUT_RD)",
}
TCP_TRICKS = TRICKS | {
    # As connect() with AF_UNSPEC, for which Python has no name.
    "disconnect": "ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)",
}
HOSTILE = "import ctypes, socket, sys; sock = socket.socket(fileno=int(sys.argv[1])); "


async def play(trick: str, fd: int) -> None:
    command = [sys.executable, "-c", HOSTILE + trick, str(fd)]
    code = await asyncio.to_thread(subprocess.call, command, pass_fds=[fd])
    assert code == 0


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


async def ask(address: Address) -> int:
    uds = httpx.AsyncHTTPTransport(uds=address.uds) if address.uds else None
    url = "http://x" if address.uds else address.url
    async with httpx.AsyncClient(transport=uds, timeout=DEADLINE_S) as client:
        return (await client.get(url)).status_code


def listens(held: HeldSocket) -> bool:
    with socket.socket(fileno=os.dup(held.fd)) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@pytest.mark.parametrize("trick", TCP_TRICKS.values(), ids=TCP_TRICKS)
def test_a_port_that_a_worker_shuts_down_answers_again(trick: str) -> None:
    async def scenario() -> None:
        before = open_files()
        address = Address(LOOPBACK, free_port())
        lost: list[None] = []
        held = HeldSocket(address, lambda: Absence("", "", 1), lambda: lost.append(None))
        assert await ask(address) == 503
        with capture_logs() as logs:
            await play(trick, held.fd)
            await eventually(lambda: listens(held))
        assert [log["address"] for log in logs if log["event"] == "socket_shut_down"] == [
            address.url
        ]
        assert await ask(address) == 503
        assert not lost, "the workers' copies listen again as well"
        await held.close()
        assert open_files() == before

    run(scenario())


def test_a_worker_that_serves_on_a_port_goes_on_without_a_new_start() -> None:
    async def scenario() -> None:
        address = Address(LOOPBACK, free_port())
        held = HeldSocket(address, lambda: Absence("", "", 1))
        with socket.socket(fileno=os.dup(held.fd)) as handed:
            held.served_by(handed)
            await play(TRICKS["shutdown"], held.fd)
            await eventually(lambda: listens(held))
            with socket.create_connection((LOOPBACK, address.port)):
                loop = asyncio.get_running_loop()
                connection, _ = await loop.sock_accept(handed)
                connection.close()
        await held.close()

    run(scenario())


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_a_unix_socket_that_a_worker_shuts_down_is_made_anew(
    tmp_path: Path, trick: str, served: bool
) -> None:
    """The former one never listens again, so whoever serves on it has to get another one."""

    async def scenario() -> None:
        before = open_files()
        address = Address(uds=str(tmp_path / "a.sock"))
        lost: list[None] = []
        held = HeldSocket(address, lambda: Absence("", "", 1), lambda: lost.append(None))
        if served:
            held.served_by(object())
        else:
            assert await ask(address) == 503
        await play(trick, held.fd)
        await eventually(lambda: lost)
        assert await ask(address) == 503
        await held.close()
        assert open_files() == before

    run(scenario())
    assert not any(tmp_path.iterdir())


def test_connections_that_wait_for_a_worker_do_not_wake_the_supervisor() -> None:
    async def scenario() -> None:
        address = Address(LOOPBACK, free_port())
        held = HeldSocket(address, lambda: Absence("", "", 1))
        held.served_by(object())
        await asyncio.sleep(0.1)
        watch = held._listener._watch
        fired: list[None] = []
        watch._on_shut_down = lambda: fired.append(None)
        with socket.create_connection((LOOPBACK, address.port)):
            await asyncio.sleep(0.2)
        assert not fired
        await held.close()

    run(scenario())


def test_shutting_down_in_a_loop_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        address = Address(LOOPBACK, free_port())
        held = HeldSocket(address, lambda: Absence("", "", 1))
        held.served_by(object())
        revived: list[None] = []
        listen_again = held._listener._listen_again

        def counted() -> None:
            revived.append(None)
            listen_again()

        monkeypatch.setattr(held._listener, "_listen_again", counted)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + 2 * lasting_socket.FIRST_DELAY_S
        with capture_logs() as logs:
            while loop.time() < end_s:
                with socket.socket(fileno=os.dup(held.fd)) as handed:
                    if listens(held):
                        handed.shutdown(socket.SHUT_RDWR)
                await asyncio.sleep(0.001)
        assert 1 <= len(revived) <= 3
        assert len([log for log in logs if log["event"] == "socket_shut_down"]) == 1
        await held.close()

    run(scenario())


def test_a_port_that_somebody_else_has_taken_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lasting_socket, "FIRST_DELAY_S", 0.02)

    async def scenario() -> None:
        address = Address(LOOPBACK, free_port())
        held = HeldSocket(address, lambda: Absence("", "", 1))
        other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with capture_logs() as logs, socket.socket(fileno=os.dup(held.fd)) as handed:
            handed.shutdown(socket.SHUT_RDWR)
            other.bind((LOOPBACK, address.port))
            other.listen()  # within the same turn of the loop: it is faster
            await eventually(lambda: any(log["event"] == "socket_not_revived" for log in logs))
        other.close()
        await eventually(lambda: listens(held))
        assert await ask(address) == 503
        await held.close()

    run(scenario())
