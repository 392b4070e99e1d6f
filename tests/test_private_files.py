"""Whatever the umask is, and whoever was there before: what we write is its user's alone."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle import beacon, private_files
from ichat_lifecycle.adapters.evidence import EvidenceFiles
from ichat_lifecycle.adapters.sockets import listening_socket
from ichat_lifecycle.beacon import token_file
from ichat_lifecycle.fleet.token import kept_token
from ichat_lifecycle.ports import Case
from ichat_lifecycle.start_history import Expected, StartHistory

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")


@pytest.fixture
def open_umask(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(private_files, "_given_umask", [])
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "deep" / "state"))
    return tmp_path / "deep" / "state" / "ichat-lifecycle"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def writable_by_others(root: Path) -> list[Path]:
    return [path for path in (root, *root.rglob("*")) if mode(path) & 0o022]


def test_a_whole_command_writes_nothing_that_others_may_write(tmp_path: Path) -> None:
    """With a library's file, as vLLM's compiled code is; and the warning."""
    program = """
import os, sys
from pathlib import Path
from structlog.testing import capture_logs
from ichat_lifecycle import environment
from ichat_lifecycle.adapters.evidence import EvidenceFiles
from ichat_lifecycle.fleet.token import kept_token
from ichat_lifecycle.ports import Case
from ichat_lifecycle.start_history import StartHistory
os.umask(0)
with capture_logs() as logs:
    environment.log_all(environment.prepare(os.environ))
assert [log["umask"] for log in logs if log["event"] == "umask_open"] == ["000"], logs
StartHistory().record("model", 1.0)
import asyncio
asyncio.run(EvidenceFiles().save(Case("engine_hung", "x"), [], {"a": ["line"]}))
with kept_token(None):
    Path(os.environ["HOME"], "library").mkdir()
    Path(os.environ["HOME"], "library", "compiled.so").touch()
    found = [p for p in Path(os.environ["HOME"]).rglob("*") if p.lstat().st_mode & 0o002]
    assert not found, found
    print(len(list(Path(os.environ["HOME"]).rglob("*"))))
"""
    home = tmp_path / "home"
    home.mkdir()
    variables = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=variables | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 10
    for name in (".cache", ".local"):
        assert writable_by_others(home / name) == []
        assert mode(home / name) == 0o700


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize(("given", "left"), [(0, 0o002), (0o022, 0o022), (0o077, 0o077)])
def test_a_umask_is_only_made_stricter(given: int, left: int) -> None:
    os.umask(given)
    assert private_files.restrict_umask() == (None if given & 2 else given)
    assert private_files.restrict_umask() is None
    assert os.umask(0) == left


@pytest.mark.usefixtures("open_umask")
def test_unix_sockets_of_a_main_port_are_open_as_their_user_wants_and_ours_are_not(
    tmp_path: Path,
) -> None:
    """vLLM's own is as the umask has it: a proxy of another user may have to connect."""
    private_files.restrict_umask()
    for name, private, expected in (("main", False, 0o777), ("fleet", True, 0o600)):
        path = tmp_path / name
        with contextlib.closing(listening_socket(None, 0, str(path), private=private)):
            assert mode(path) == expected
    assert os.umask(0) == 0o002, "it was that only for the moment of the bind"


def test_a_given_umask_without_a_restriction_is_the_process_own() -> None:
    with private_files.given_umask():
        pass


# --- the token of a fleet


@pytest.mark.usefixtures("open_umask")
def test_a_token_is_private_and_goes_with_its_fleet(state: Path) -> None:
    with kept_token(None) as token:
        path = token_file(os.getpid())
        assert path.read_text() == token
        assert (mode(path), mode(path.parent), mode(state)) == (0o600, 0o700, 0o700)
        assert mode(state.parent) == mode(state.parent.parent) == 0o700
        assert list(path.parent.iterdir()) == [path]
    assert not path.exists()


@pytest.mark.parametrize("planted", ["a link", "a hard link", "a file", "a dangling link"])
def test_what_is_planted_in_its_place_is_replaced_and_not_written_to(
    state: Path, tmp_path: Path, planted: str
) -> None:
    victim = tmp_path / "victim"
    path = token_file(os.getpid())
    path.parent.mkdir(parents=True, mode=0o700)
    victim.write_text("mine")
    if planted == "a link":
        path.symlink_to(victim)
    elif planted == "a hard link":
        path.hardlink_to(victim)
    elif planted == "a file":
        path.write_text("a token that somebody else knows")
        path.chmod(0o666)
    else:
        path.symlink_to(tmp_path / "made by us")
    with kept_token(None) as token:
        assert path.read_text() == token
        assert not path.is_symlink()
        assert mode(path) == 0o600
    assert victim.read_text() == "mine"
    assert not (tmp_path / "made by us").exists()


def unkept(token: str) -> bool:
    return bool(token) and not token_file(os.getpid()).exists()


@as_root
@pytest.mark.parametrize("whose", ["fleets", "state"])
def test_in_another_users_directory_no_token_is_kept(state: Path, whose: str) -> None:
    (state / "fleets").mkdir(parents=True)
    os.chown(state / "fleets" if whose == "fleets" else state, NOBODY, NOBODY)
    with capture_logs() as logs, kept_token(None) as token:
        assert unkept(token)
    (log,) = logs
    assert (log["event"], log["log_level"]) == ("token_not_kept", "warning")
    assert "another user" in log["error"]


def test_a_directory_that_is_a_link_keeps_no_token(state: Path, tmp_path: Path) -> None:
    state.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (state / "fleets").symlink_to(tmp_path / "elsewhere")
    with capture_logs() as logs, kept_token(None) as token:
        assert unkept(token)
    assert [log["event"] for log in logs] == ["token_not_kept"]
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_state_directory_that_its_user_has_put_elsewhere_is_fine(
    state: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    state.parent.mkdir(parents=True)
    state.symlink_to(tmp_path / "disk")
    with kept_token(None) as token:
        assert token_file(os.getpid()).read_text() == token


def test_a_directory_that_is_open_already_is_closed(state: Path) -> None:
    for path in (state, state / "fleets"):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
    with capture_logs() as logs, kept_token(None):
        assert mode(state) == mode(state / "fleets") == 0o755
    assert [log["event"] for log in logs] == ["directory_was_open"] * 2
    assert {log["mode"] for log in logs} == {"777"}


def test_the_tokens_of_the_dead_go_and_those_of_the_living_stay(state: Path) -> None:
    """Also where the pid is another process's by now, and across containers: 1 may be several."""
    directory = state / "fleets"
    directory.mkdir(parents=True, mode=0o700)
    stale = directory / f"{os.getpid()}-1.token"
    stale.write_text("of a dead one")
    elsewhere = directory / "1-5.token"
    elsewhere.write_text("of a living one in another container")
    with elsewhere.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with kept_token(None):
            assert not stale.exists()
            assert elsewhere.exists()
    (directory / "fifo.token").unlink(missing_ok=True)
    os.mkfifo(directory / "fifo.token")
    with kept_token(None) as token:
        assert token_file(os.getpid()).read_text() == token
        assert not elsewhere.exists()


def test_a_token_file_is_of_one_process_and_not_of_a_pid(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = token_file(os.getpid())
    monkeypatch.setattr(beacon, "_started", lambda pid: 1)
    assert token_file(os.getpid()) != first
    assert first.parent == state / "fleets"


# --- directories of another user


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(private_files, "_foreign", set())
    return tmp_path / "cache" / "ichat-lifecycle"


@as_root
def test_what_is_kept_in_another_users_directory_is_a_warning_once(
    cache: Path, state: Path
) -> None:
    for path in (cache, state, state / "evidence"):
        path.mkdir(parents=True, mode=0o700)
        os.chown(path, NOBODY, NOBODY)
    with capture_logs() as logs:
        for _ in range(2):
            StartHistory().record("model", 1.0)
            asyncio.run(EvidenceFiles().save(Case("engine_hung", "x"), [], {"a": ["line"]}))
    told = [log for log in logs if log["event"] == "directory_not_own"]
    assert [log["path"] for log in told] == [str(cache), str(state), str(state / "evidence")]
    assert {(log["log_level"], log["uid"]) for log in told} == {("warning", NOBODY)}
    assert all("XDG_STATE_HOME" in log["hint"] for log in told)
    assert StartHistory().expected("model") == Expected(1.0, 2), "it is only told"


@pytest.mark.parametrize(("of_root", "warned"), [(0o755, 0), (0o1777, 0), (0o777, 1)])
def test_roots_directory_is_a_warning_where_all_may_write(
    cache: Path, monkeypatch: pytest.MonkeyPatch, of_root: int, warned: int
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has directories of root's")
    cache.mkdir(parents=True)
    cache.chmod(of_root)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with capture_logs() as logs:
        private_files.close_to_all(cache)
    assert [log["event"] for log in logs] == ["directory_not_own"] * warned
    assert mode(cache) == of_root


# --- the history of starts


def test_a_history_is_private_and_its_writing_follows_no_link(
    tmp_path: Path, open_umask: None
) -> None:
    path = tmp_path / "cache" / "ichat-lifecycle" / "starts.json"
    StartHistory(path).record("model", 2.0)
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.unlink()
    path.symlink_to(victim)
    StartHistory(path).record("model", 3.0)
    assert victim.read_text() == "mine"
    assert StartHistory(path).expected("model") == Expected(3.0, 1)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"model": ' + "[" * 100_000,
        '{"model": [NaN]}',
        '{"model": [Infinity, -1]}',
        '{"model": [true]}',
        '{"model": []}',
        '{"model": [' + "9" * 400 + "]}",
        json.dumps({"model": [1.0], "x": "y" * 2_000_000}),
        "\ud800",
    ],
    ids=range(9),
)
def test_a_history_that_somebody_has_written_does_no_harm(tmp_path: Path, text: str) -> None:
    path = tmp_path / "starts.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert StartHistory(path).expected("model") is None
    StartHistory(path).record("model", 3.0)
    assert StartHistory(path).expected("model") == Expected(3.0, 1)


@pytest.mark.parametrize("kind", ["a fifo", "a socket", "a device", "a directory"])
def test_a_history_that_is_no_file_holds_up_no_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "starts.json"
    with contextlib.ExitStack() as stack:
        if kind == "a fifo":
            os.mkfifo(path)
        elif kind == "a socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        assert StartHistory(path).expected("model") is None
