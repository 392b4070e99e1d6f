"""Where a supervisor hears its workers: a socket for each, that no stranger and no flood closes."""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from descriptors import no_descriptor_left
from on_loop import eventually, open_files
from structlog.testing import capture_logs
from waiting import DEADLINE_S

from ichat_lifecycle.adapters import notify_socket
from ichat_lifecycle.adapters.notify_socket import AT_ONCE, NEWS_BURST, Inbox, NotifySockets
from ichat_lifecycle.adapters.sd_notify import DATAGRAM_LIMIT, LIFECYCLE
from ichat_lifecycle.fleet.told import Told
from ichat_lifecycle.states import State

ME = os.getpid()
# Tells once, from a process of its own.
TELLER = (
    "import socket, sys\n"
    "sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "sock.sendto(sys.argv[2].encode(), sys.argv[1].replace('@', '\\0', 1))"
)


def run(scenario: Callable[[NotifySockets], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        sockets = NotifySockets()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(sockets)
        finally:
            sockets.close()

    asyncio.run(main())


def tell(address: str, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, address.replace("@", "\0", 1))


async def tell_in_time(address: str, text: str) -> None:
    """As a Notifier does: what does not fit yet comes a moment later."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(text.encode(), address.replace("@", "\0", 1))
            except BlockingIOError:
                await asyncio.sleep(0.01)
            else:
                return


async def another_tells(inbox: Inbox, text: str) -> None:
    command = [sys.executable, "-c", TELLER, inbox.address, text]
    await asyncio.to_thread(subprocess.run, command, check=True, pass_fds=inbox.fds)


def says(state: str, **more: Any) -> str:
    return f"{LIFECYCLE}={json.dumps({'state': state, **more})}"


def states(heard: list[Told | None]) -> list[str]:
    return [told.state.value for told in heard if told is not None]


# --- who is heard


def test_only_the_process_of_the_worker_is_heard() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        await another_tells(inbox, says("STOPPED"))
        tell(inbox.address, says("READY"))
        await eventually(lambda: states(heard))
        assert states(heard) == ["READY"], "the other process is none of ours"

    run(scenario)


def test_what_was_told_before_its_end_is_heard_before_that() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        tell(inbox.address, says("BOUND"))
        tell(inbox.address, "WATCHDOG=1")
        inbox.close()
        assert states(heard) == ["BOUND"]
        assert heard[-1] is None
        with pytest.raises(OSError):
            tell(inbox.address, says("READY"))

    run(scenario)


def test_descriptors_that_come_with_a_message_are_not_kept() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        before = open_files()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        for _ in range(AT_ONCE):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(inbox.address)
                sock.sendmsg([says("READY").encode()], rights)
        await eventually(lambda: states(heard))
        await asyncio.sleep(0)
        assert open_files() == before

    run(scenario)


# --- nonsense and floods


def flooding(command: list[str], inbox: Inbox) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=inbox.fds
    )


def test_nonsense_is_told_once_and_counted_and_no_sign_of_life() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        with capture_logs() as logs:
            for text in ("[" * 15_000, '{"state": 5}', "{}"):
                tell(inbox.address, f"{LIFECYCLE}={text}")
            tell(inbox.address, says("READY") + "\n" + "x" * DATAGRAM_LIMIT)  # cut by us
            tell(inbox.address, b"\xff\xfe")
            inbox.close()
        assert heard == []
        first, last = [line for line in logs if line["event"] == "worker_told_nonsense"]
        assert first["worker"] == last["worker"] == "a"
        assert first["error"]
        assert last["count"] == 4

    run(scenario)


def test_a_hearer_that_fails_is_told_once_and_called_again() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        calls: list[Told | None] = []

        def fail(told: Told | None) -> None:
            calls.append(told)
            raise RuntimeError("a defect")

        inbox.hear(ME, fail)
        with capture_logs() as logs:
            for state in ("BOUND", "READY"):
                tell(inbox.address, says(state))
            inbox.close()
        assert states(calls) == ["BOUND", "READY"]
        assert len([line for line in logs if line["event"] == "hearer_failed"]) == 1

    run(scenario)


def test_a_flood_is_slowed_and_what_was_told_last_arrives() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        for number in range(300):
            await tell_in_time(inbox.address, says("DEGRADED" if number % 2 else "BOUND"))
        await tell_in_time(inbox.address, says("READY"))
        await eventually(lambda: states(heard)[-1:] == ["READY"])
        assert len(states(heard)) <= NEWS_BURST + 50, "others were left out"

    run(scenario)


def test_a_flood_holds_up_no_other_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is full, and stays so: others' are not."""
    monkeypatch.setattr(notify_socket, "READS_BURST", 5.0)
    monkeypatch.setattr(notify_socket, "READS_PER_S", 0.001)

    async def scenario(sockets: NotifySockets) -> None:
        flooded, calm = sockets.open("a"), sockets.open("b")
        heard: list[Told | None] = []
        flooded.hear(ME, lambda _: None)
        calm.hear(ME, heard.append)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                for number in range(10_000):
                    sock.sendto(b"WATCHDOG=1", flooded.address)
                    if not number % 5:
                        await asyncio.sleep(0)
        tell(calm.address, says("READY"))
        await eventually(lambda: states(heard))

    run(scenario)


def test_an_endless_flood_at_its_end_does_not_hold_it_up() -> None:
    """Children that have outlived it may go on with what it had."""
    program = (
        "import socket, sys\n"
        "print(flush=True)\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "sock.connect(sys.argv[1])\n"
        "while True: sock.send(b'X' * 1000)\n"
    )

    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        command = [sys.executable, "-c", program, inbox.address]
        with flooding(command, inbox) as child:
            assert child.stdout is not None
            await asyncio.to_thread(child.stdout.readline)
            inbox.hear(child.pid, lambda _: None)
            inbox.close()  # returns
            child.kill()

    run(scenario)


# --- where it is


def is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


def test_a_socket_has_no_name_that_anybody_could_take_or_tidy_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that could not reach its socket was silent, and was killed for that."""
    monkeypatch.setattr(notify_socket, "PLACES", (str(tmp_path), None))
    before = open_files()

    async def scenario(sockets: NotifySockets) -> None:
        inboxes = [sockets.open(name) for name in "ab"]
        assert is_empty(tmp_path)
        assert len({inbox.address for inbox in inboxes}) == 2
        heard: list[Told | None] = []
        inboxes[0].hear(ME, heard.append)
        tell(inboxes[0].address, says("READY"))
        await eventually(lambda: states(heard))

    run(scenario)
    assert open_files() == before


def test_what_a_process_has_inherited_is_enough_to_be_heard() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        command = ["-c", f"input(); {TELLER}", inbox.address, says("READY")]
        child = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdin=subprocess.PIPE, pass_fds=inbox.fds
        )
        inbox.hear(child.pid, heard.append)
        await child.communicate(b"\n")
        await eventually(lambda: states(heard))

    run(scenario)


def test_another_user_does_not_reach_it_by_the_supervisor() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")

    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        (fd,) = inbox.fds
        command = ["test", "-S", f"/proc/{ME}/fd/{fd}"]
        for user, found in ((None, 0), (65534, 1)):
            done = await asyncio.to_thread(subprocess.run, command, user=user, check=False)
            assert done.returncode == found

    run(scenario)


@pytest.mark.parametrize("length", [10, 200])
def test_a_long_temporary_directory_is_a_place_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    place = tmp_path / ("x" * length)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(notify_socket, "PLACES", ("/proc/none", None))

    async def scenario(sockets: NotifySockets) -> None:
        assert sockets.open("a").fds

    run(scenario)
    assert is_empty(place)


def test_without_a_place_for_it_workers_are_heard_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify_socket, "PLACES", ("/proc/none",))

    async def scenario(sockets: NotifySockets) -> None:
        sockets.open("b")
        inbox = sockets.open("a")
        assert inbox.address.startswith("@")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        tell(inbox.address, says("READY"))
        await eventually(lambda: states(heard))

    before = open_files()
    with capture_logs() as logs:
        run(scenario)
    assert [line["event"] for line in logs] == ["notify_not_private"], "told once"
    assert open_files() == before


@pytest.mark.parametrize("left", [0, 1, 2])
def test_without_a_descriptor_there_is_no_socket_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    monkeypatch.setattr(notify_socket, "PLACES", (str(tmp_path), None))

    async def scenario(sockets: NotifySockets) -> None:
        with no_descriptor_left(spare=left), pytest.raises(OSError) as caught:
            sockets.open("a")
        assert caught.value.errno == errno.EMFILE

    with capture_logs() as logs:
        run(scenario)
    assert logs == []
    assert is_empty(tmp_path)


def test_told_is_what_was_told() -> None:
    async def scenario(sockets: NotifySockets) -> None:
        inbox = sockets.open("a")
        heard: list[Told | None] = []
        inbox.hear(ME, heard.append)
        tell(inbox.address, says("SERVING", phase="warming_up", fraction=0.25, expected_s=3))
        await eventually(lambda: states(heard))
        (told,) = [one for one in heard if one is not None]
        assert (told.state, told.phase) == (State.SERVING, "warming_up")
        assert (told.fraction, told.expected_s) == (0.25, 3)

    run(scenario)
