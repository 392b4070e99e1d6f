"""Whose process is asked, and who gets a token: this user's own, whatever others call theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_worker import Answer, LiveWorker, http_answer, lived, own_proc, something_else

from ichat_lifecycle.beacon import FLEET_THREAD, name_this_thread, token_file
from ichat_lifecycle.client import find, owners
from ichat_lifecycle.client.errors import ForeignError, UnreachableError
from ichat_lifecycle.client.find import find_workers
from ichat_lifecycle.client.fleets import Supervisor, _token_of, find_fleet, fleets_here
from ichat_lifecycle.client.transport import ControlClient

KEPT = "the-kept-token"
NOBODY = 65534
SOMEBODY = 12345
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="takes another user's id")

# A process of another user's that calls itself a fleet, and prints its port and what it is asked.
STRANGER = f"""
import http.server, os, sys
sys.path[:0] = {sys.path!r}
from ichat_lifecycle.beacon import name_this_thread

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        print(self.command, self.path, self.headers.get("Authorization"), flush=True)
        body = b'{{"fleet": %d, "started": [], "workers": []}}' % os.getpid()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = answer
    def log_message(self, *_): pass

class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "x", self.socket.getsockname()[1]

name_this_thread("{FLEET_THREAD}")
os.setgid({NOBODY})
os.setuid({NOBODY})
with Server(("127.0.0.1", 0), Handler) as server:
    print(server.server_port, flush=True)
    server.serve_forever()
"""


def another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this process is somebody else's to whoever looks."""
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but this process, and a directory of its own for tokens."""
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(find, "PROC", own_proc(tmp_path / "proc"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def token() -> Path:
    """Of the fleet in this process."""
    path = token_file(os.getpid())
    path.parent.mkdir(parents=True)
    path.write_text(KEPT)
    path.chmod(0o600)
    return path


@pytest.fixture
def named() -> Iterator[None]:
    """A thread of this process has the name of a fleet's."""
    ready, enough = threading.Event(), threading.Event()

    def run() -> None:
        name_this_thread(FLEET_THREAD)
        ready.set()
        enough.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    yield
    enough.set()
    thread.join()


def fleet(asked: list[str]) -> Answer:
    body = b'{"fleet": %d, "started": [], "workers": []}' % os.getpid()
    say = http_answer("200 OK", "application/json", body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        again = asyncio.StreamReader()
        again.feed_data(b"\r\n\r\n")
        await say(again, writer)

    return answer


async def post(supervisor: Supervisor) -> Any:
    async with supervisor.client(5) as client:
        return await client.post("/fleet/reload", None, supervisor.token)


# --- a connection


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "both", "unix"])
def test_who_has_accepted_a_connection_is_known_once_it_is_accepted(
    where: str, tmp_path: Path
) -> None:
    """Before that, the kernel shows it as root's."""

    async def scenario(listener: socket.socket, client: socket.socket) -> None:
        asking = asyncio.create_task(owners.peer_uid(client))
        if where != "unix":
            await asyncio.sleep(10 * owners.LOOK_S)
            assert not asking.done()
        with listener.accept()[0]:
            assert await asking == os.getuid()

    with contextlib.ExitStack() as stack:
        if where == "unix":
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(tmp_path / "s"))
        else:
            family = socket.AF_INET if where == "127.0.0.1" else socket.AF_INET6
            address = ("::" if where == "both" else where, 0)
            listener = stack.enter_context(
                socket.create_server(address, family=family, dualstack_ipv6=where == "both")
            )
            host = "127.0.0.1" if where == "both" else where
            port = listener.getsockname()[1]
            client = stack.enter_context(socket.create_connection((host, port)))
        lived(lambda: scenario(listener, client))


def test_a_connection_that_leaves_this_machine_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        monkeypatch.setattr(owners, "TABLES", Path("/proc/nothing"))
        assert asyncio.run(owners.peer_uid(client)) is None


def test_another_users_server_is_sent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def scenario() -> None:
        async with something_else(fleet(asked)) as url:
            another_user(monkeypatch)
            async with ControlClient(url, own_only=True) as client:
                with pytest.raises(ForeignError, match=f"a process of uid {os.getuid()}") as caught:
                    await client.status()
        assert caught.value.code == "another_user"
        assert asked == []

    lived(scenario)


# --- workers


def test_another_users_worker_is_not_asked_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            assert [w.url for w in (await find_workers()).workers] == [worker.url]
            another_user(monkeypatch)
            found = await find_workers()
        assert found.workers == ()
        assert found.others() == f"pid {os.getpid()} (another user's, uid {os.getuid()})"
        assert found.others() in found.nothing().line()

    lived(scenario)


def test_a_crowd_of_strangers_is_counted() -> None:
    found = find.Found((), tuple(find.Skipped(pid, "x") for pid in range(10_000)))
    assert found.others() == (
        "pid 0 (x), pid 1 (x), pid 2 (x), pid 3 (x), pid 4 (x), and 9995 more"
    )


# --- fleets


@pytest.mark.usefixtures("token", "named")
def test_this_users_own_fleet_gets_the_token_that_it_keeps() -> None:
    asked: list[str] = []

    async def scenario() -> None:
        async with something_else(fleet(asked)) as url:
            for where in (None, url, url.rpartition(":")[2], url.replace("127.0.0.1", "localhost")):
                assert await find_fleet(where) == Supervisor(url, own=True, token=KEPT)
            assert len(await fleets_here()) == 1
            await post(await find_fleet(None))
        assert f"Bearer {KEPT}" in asked[-1]

    lived(scenario)


@pytest.mark.usefixtures("token", "named")
def test_another_users_fleet_gets_no_token_and_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def scenario() -> None:
        async with something_else(fleet(asked)) as url:
            another_user(monkeypatch)
            with pytest.raises(UnreachableError, match="no fleet of this user's"):
                await find_fleet(None)
            assert await fleets_here() == []
            assert asked == []
            assert await find_fleet(url) == Supervisor(url)

    lived(scenario)


@pytest.mark.usefixtures("token", "named")
def test_whoever_takes_the_port_after_the_look_gets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name, the user, and the port were right a moment ago."""
    asked: list[str] = []

    async def scenario() -> None:
        async with something_else(fleet(asked)) as url:
            found = await find_fleet(url)
            assert found.token == KEPT
            count = len(asked)
            another_user(monkeypatch)
            with pytest.raises(ForeignError, match="not by this user's fleet"):
                await post(found)
        assert len(asked) == count

    lived(scenario)


def test_a_worker_in_the_fleets_process_list_is_not_the_fleet(named: None) -> None:
    """A supervisor holds its workers' ports: what answers there says another number."""

    async def scenario() -> None:
        other = http_answer("200 OK", "application/json", b'{"fleet": 1}')
        async with something_else(other) as url:
            assert await find_fleet(url) == Supervisor(url)

    lived(scenario)


def unreadable(token: Path) -> None:
    token.chmod(0o644)


def linked(token: Path) -> None:
    token.rename(token.with_suffix(".real"))
    token.symlink_to(token.with_suffix(".real"))


def piped(token: Path) -> None:
    token.unlink()
    os.mkfifo(token, 0o600)


@pytest.mark.parametrize(
    "spoil",
    [
        unreadable,
        linked,
        piped,
        Path.unlink,
        lambda token: token.write_bytes(b"\xff"),
        lambda token: token.write_text("a\nb"),
        lambda token: token.write_text(""),
    ],
)
def test_a_token_that_others_could_have_put_there_is_none(spoil: Any, token: Path) -> None:
    assert _token_of(os.getpid()) == KEPT
    spoil(token)
    assert _token_of(os.getpid()) is None


@AS_ROOT
def test_another_users_token_is_none(token: Path) -> None:
    os.chown(token, NOBODY, NOBODY)
    assert _token_of(os.getpid()) is None


@AS_ROOT
def test_a_stranger_who_calls_himself_a_fleet_gets_nothing_of_roots(tmp_path: Path) -> None:
    """With the whole machine to look at, and with a token of root's that names his process."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ichat_lifecycle", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=environment
        )

    with subprocess.Popen(
        [sys.executable, "-c", STRANGER], stdout=subprocess.PIPE, text=True
    ) as stranger:
        assert stranger.stdout is not None
        port = stranger.stdout.readline().strip()
        kept = tmp_path / f"ichat-lifecycle/fleets/{stranger.pid}.token"
        kept.parent.mkdir(parents=True)
        kept.write_text(KEPT)
        kept.chmod(0o600)
        assert f"127.0.0.1:{port}" not in run("reload").stderr
        for where in (f":{port}", f"http://127.0.0.1:{port}/", f"localhost:{port}"):
            done = run("reload", "--fleet", where)
            assert (done.returncode, done.stdout) == (2, "")
            assert "there is no token for" in done.stderr
        done = run("reload", "--fleet", port, "--token", "given")
        assert done.returncode == 0, "who is named gets what is given"
        stranger.kill()
        asked = stranger.stdout.read()
    assert KEPT not in asked
    assert "Bearer given" in asked
