"""Workers are found by the name of a thread and by what they answer, with no file in between."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from client_worker import LiveWorker, lived, own_proc, something_else
from on_loop import eventually

from ichat_lifecycle import beacon
from ichat_lifecycle.beacon import CONTROL_THREAD
from ichat_lifecycle.client import find
from ichat_lifecycle.client.choose import choose_url
from ichat_lifecycle.client.errors import SeveralWorkersError, UnreachableError
from ichat_lifecycle.client.find import find_workers, processes_with
from ichat_lifecycle.errors import ExitCode

TESTS = Path(__file__).parent

# A worker in a process of its own, until its stdin ends.
OTHER = """
import asyncio, sys
from client_worker import LiveWorker

async def main():
    async with LiveWorker(model="other") as worker:
        print(worker.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    return own_proc(tmp_path)


@contextmanager
def another_process() -> Iterator[tuple[int, str]]:
    """The pid of a worker's process, and its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    ) as process:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
        process.communicate()


def thread_names() -> set[str]:
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def test_the_control_planes_thread_has_its_name_while_it_runs(proc: Path) -> None:
    async def scenario() -> None:
        assert list(processes_with(CONTROL_THREAD, proc)) == []
        async with LiveWorker():
            assert beacon.CONTROL_THREAD in thread_names()
            assert list(processes_with(CONTROL_THREAD, proc)) == [os.getpid()]
        await eventually(lambda: beacon.CONTROL_THREAD not in thread_names())
        assert list(processes_with(CONTROL_THREAD, proc)) == []

    lived(scenario)


def test_a_thread_that_cannot_be_named_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "get_native_id", lambda: 0)  # there is no such thread
    beacon.name_this_thread("nobody")
    assert "nobody" not in thread_names()


def test_a_worker_is_found_with_what_it_says(proc: Path) -> None:
    async def scenario() -> None:
        assert (await find_workers(proc)).workers == ()
        async with LiveWorker(model="mine") as worker:
            found = await find_workers(proc)
            assert [(w.url, w.status.model) for w in found.workers] == [(worker.url, "mine")]
            assert found.skipped == ()
            assert await choose_url(worker.url + "/") == worker.url

    lived(scenario)


def test_a_worker_in_another_process_is_found(tmp_path: Path) -> None:
    with another_process() as (pid, url):

        async def scenario() -> None:
            assert pid in list(processes_with(CONTROL_THREAD, find.PROC)), "in the real /proc"
            found = await find_workers(own_proc(tmp_path, pid))
            assert [(w.url, w.status.model) for w in found.workers] == [(url, "other")]

        lived(scenario)


@pytest.mark.parametrize(("host", "loopback"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_one_that_listens_everywhere_is_asked_on_loopback(
    proc: Path, host: str, loopback: str
) -> None:
    async def scenario() -> None:
        async with LiveWorker(host) as worker:
            (found,) = (await find_workers(proc)).workers
            assert found.url == worker.url == f"http://{loopback}:{worker.port}"

    lived(scenario)


def test_the_main_port_is_not_taken_for_the_control_plane(proc: Path) -> None:
    """It answers the same document, of another address."""

    async def scenario() -> None:
        async with LiveWorker() as worker:
            body = json.dumps(worker.story.document()).encode()

            async def main_port(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                asked.append(await reader.readuntil(b"\r\n\r\n"))
                head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()

            asked: list[bytes] = []
            async with something_else(main_port):
                (found,) = (await find_workers(proc)).workers
            assert found.url == worker.url
            assert len(asked) == 1, "it was asked, and not taken"

    lived(scenario)


def test_a_port_that_never_answers_holds_nobody_up_for_long(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "ASK_TIMEOUT_S", 0.5)

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario() -> None:
        async with LiveWorker() as worker, something_else(never):
            assert [w.url for w in (await find_workers(proc)).workers] == [worker.url]

    lived(scenario)


def denied(*_: Any, **__: Any) -> Any:
    raise psutil.AccessDenied(1)


def test_another_users_worker_is_told_where_nothing_else_is_found(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil.Process, "net_connections", denied)

    async def scenario() -> None:
        async with LiveWorker():
            found = await find_workers(proc)
        assert found.workers == ()
        assert [one.pid for one in found.skipped] == [os.getpid()]
        error = found.nothing()
        assert error.exit_code == ExitCode.ADDRESS_UNAVAILABLE
        assert f"pid {os.getpid()} (another user's" in error.line()

    lived(scenario)


def test_a_container_with_a_network_of_its_own_is_told(
    proc: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 127.0.0.1 is not ours: who is asked there is somebody else."""
    monkeypatch.setattr(find, "uid_of", lambda pid: os.geteuid())
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "ns").mkdir()
    (elsewhere / "ns/net").touch()
    (elsewhere / "task").symlink_to("/proc/self/task")
    (proc / "1234567").symlink_to(elsewhere)

    async def scenario() -> None:
        async with LiveWorker() as worker:
            found = await find_workers(proc)
        assert [w.url for w in found.workers] == [worker.url]
        assert [(one.pid, "network" in one.why) for one in found.skipped] == [(1234567, True)]

    lived(scenario)


def test_a_process_that_ends_meanwhile_is_none(proc: Path, tmp_path: Path) -> None:
    (proc / "1234567").symlink_to(tmp_path / "gone")
    (proc / "7654321").mkdir()

    async def scenario() -> None:
        found = await find_workers(proc)
        assert (found.workers, found.skipped) == ((), ())
        assert "no worker runs on this machine" in found.nothing().line()

    lived(scenario)


def test_a_command_for_one_worker_names_all_where_there_are_several(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "PROC", proc)

    async def scenario() -> None:
        with pytest.raises(UnreachableError):
            await choose_url(None)
        async with LiveWorker(model="one") as one:
            assert await choose_url(None) == one.url
            async with LiveWorker(model="two") as two:
                with pytest.raises(SeveralWorkersError) as caught:
                    await choose_url(None)
        line = caught.value.line()
        assert caught.value.exit_code == ExitCode.BAD_ARGUMENTS
        assert f"{one.url} (one, PARSED)" in line
        assert f"{two.url} (two, PARSED)" in line

    lived(scenario)
