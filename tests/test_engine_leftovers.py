"""What is left where an engine's owner and its guardian are killed, and the next start removes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from waiting import until

from ichat_lifecycle.adapters import engine_leftovers, guardian, run_directory
from ichat_lifecycle.adapters.engine_guard import SOCKETS
from ichat_lifecycle.adapters.engine_leftovers import Note, remove_leftovers
from ichat_lifecycle.adapters.run_directory import PREFIX, RunDirectory, dead_directories

pytestmark = pytest.mark.hostile

# Directories of a name of their own: /dev/shm is everybody's, and each start of an engine beside
# these tests removes what dead ones have left there. Logs go where no answer is read.
OWN_PREFIX = f"{PREFIX}{os.getpid()}-"
PROLOGUE = f"""
import sys, structlog
from ichat_lifecycle.adapters import run_directory
run_directory.PREFIX = {OWN_PREFIX!r}
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
"""

# An owner with an engine of one process, which has a socket, shared memory and a semaphore.
# Python's own tracker, which would remove these at its end, is killed, as with a container.
OWNER = """
import json, os, signal, socket, subprocess, sys, time
from ichat_lifecycle.adapters import engine_guard
from ichat_lifecycle.adapters.engine_guard import SOCKETS, EngineGuard
from ichat_lifecycle.adapters.engine_output import EngineOutput

ENGINE = '''
import multiprocessing, os, signal, sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=64)
semaphore = multiprocessing.get_context("spawn").Semaphore()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
os.write(int(sys.argv[1]), f"{memory.name} sem.{semaphore._semlock.name[1:]}".encode())
time.sleep(600)
'''
told = os.dup(1)
output = EngineOutput(sink=lambda line: None)
guard = EngineGuard(output.read_fd)
read_fd, write_fd = os.pipe()
with output.redirected(), guard.marking():
    socket.socket(socket.AF_UNIX).bind(os.environ[SOCKETS] + "/s")
    directory = os.environ[SOCKETS]
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, str(write_fd)], pass_fds=[write_fd],
        start_new_session=True)
names = os.read(read_fd, 100).decode().split()
document = {"engine": engine.pid, "guardian": guard.pid, "names": names, "directory": directory,
    "record": guard._record.path}
os.write(told, json.dumps(document).encode() + b"\\n")
"""
LIVES_ON = "time.sleep(600)\n"


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Only the test's own directories, and /dev/shm, which is the kernel's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # short enough for sockets
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr("tempfile.tempdir", directory)
        monkeypatch.delenv(SOCKETS, raising=False)
        monkeypatch.setattr(engine_leftovers, "SHORT", (guardian.SHARED,))
        monkeypatch.setattr(run_directory, "PREFIX", OWN_PREFIX)
        yield Path(directory)


def alive(pid: int) -> bool:
    return guardian.started(pid) is not None


class Owner:
    def __init__(self, process: subprocess.Popen[bytes], told: dict[str, Any]) -> None:
        self.process = process
        self.pids = [process.pid, told["guardian"], told["engine"]]
        _, self.guardian, self.engine = self.pids
        self.segments = [Path(guardian.SHARED) / name for name in told["names"]]
        self.directories = [Path(told["directory"]), Path(told["record"])]

    @property
    def left(self) -> list[Path]:
        return [path for path in (*self.segments, *self.directories) if path.exists()]

    def recorded(self) -> bool:
        text = (self.directories[1] / guardian.LIFE).read_text()
        return set(guardian.recorded(text)) == {path.name for path in self.segments}


@contextmanager
def owner(body: str = LIVES_ON) -> Iterator[Owner]:
    program = [sys.executable, "-c", PROLOGUE + OWNER + body]
    process = subprocess.Popen(program, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        one = Owner(process, json.loads(process.stdout.readline()))
    except ValueError:
        process.kill()
        process.wait()
        raise
    try:
        assert one.directories[0].parent == Path(os.environ["TMPDIR"])
        yield one
    finally:
        for pid in filter(alive, one.pids):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in filter(Path.exists, one.segments):
            path.unlink()
        for directory in one.directories:
            guardian.remove_directory(str(directory))


def kill_all_of(one: Owner, *, but_engine: bool = False) -> None:
    """At once: nobody has the time to clean up after the other."""
    pids = [pid for pid in one.pids if not (but_engine and pid == one.engine)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    one.process.wait()
    until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGSTOP)",  # and killed by the test
        "os._exit(124)",
        "raise RuntimeError",
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nos.kill(os.getpid(), signal.SIGTERM)",
        "os.killpg(0, signal.SIGKILL)",
        "os.kill(engine.pid, 9)\nengine.wait()\ntime.sleep(0.1)\nos._exit(75)",
        "guard.sweep()\nengine.wait()\nguard.end()\ntime.sleep(600)",
        "engine.kill()\nengine.wait()\nguard.end()\ntime.sleep(600)",
    ],
)
def test_nothing_is_left_of_an_owner_whose_guardian_lives(body: str) -> None:
    wait = """
import pathlib
from ichat_lifecycle.adapters import guardian
while len(guardian.recorded(guard._record.text())) < 2:
    time.sleep(0.01)
"""
    # In a group of its own: the whole of it is killed.
    with owner("os.setpgid(0, 0)\n" + wait + body) as one:
        if "SIGSTOP" in body:
            until(lambda: "T" in Path(f"/proc/{one.process.pid}/stat").read_text().split()[2])
            one.process.kill()
        until(lambda: not one.left, f"what is left to be removed, of {one.left}")
        assert not alive(one.engine)


def test_where_all_is_killed_at_once_the_next_start_removes_what_is_left() -> None:
    with owner() as one:
        until(one.recorded)
        kill_all_of(one)
        assert len(one.left) == 4
        with capture_logs() as logs:
            remove_leftovers()
        assert one.left == []
        (log,) = [log for log in logs if log["event"] == "leftovers_removed"]
        assert (log["directories"], log["memory"], log["ended"]) == (2, 2, 0)
        with capture_logs() as logs:
            remove_leftovers()
        assert logs == []


def test_where_guardian_and_owner_are_killed_the_next_start_ends_the_orphans() -> None:
    """They may hold the memory of a device, which the next start needs."""
    with owner() as one:
        until(one.recorded)
        kill_all_of(one, but_engine=True)
        assert alive(one.engine)
        remove_leftovers()
        assert not alive(one.engine)
        assert one.left == []


def test_orphans_that_show_no_marker_are_known_by_their_pipe() -> None:
    with owner() as one:
        until(one.recorded)
        text = (one.directories[0] / guardian.LIFE).read_text()
        note = Note.read(text)
        assert note is not None
        kill_all_of(one, but_engine=True)
        other = Note(note.boot, "no such marker", note.device, note.inode)
        assert {pid for pid, _ in other.processes()} == {one.engine}
        assert Note("another boot", note.marker, note.device, note.inode).processes() == set()


def test_what_is_alive_is_left_alone() -> None:
    with owner() as one, owner() as stopped:
        until(one.recorded)
        os.kill(stopped.process.pid, signal.SIGSTOP)
        os.kill(stopped.guardian, signal.SIGSTOP)
        with capture_logs() as logs:
            remove_leftovers()
        assert logs == []
        assert len(one.left) == len(stopped.left) == 4
        assert all(map(alive, (*one.pids, *stopped.pids)))
        os.kill(one.guardian, signal.SIGKILL)
        until(lambda: not alive(one.guardian))
        remove_leftovers()
        assert len(one.left) == 4, "the owner lives"


def test_an_owner_that_is_killed_before_its_guardian_is_there_leaves_nothing_for_long() -> None:
    body = """
import subprocess
subprocess.Popen = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
EngineGuard(output.read_fd)
"""
    script = PROLOGUE + OWNER.split("guard = ", maxsplit=1)[0] + body
    process = subprocess.run([sys.executable, "-c", script], check=False)
    assert process.returncode == -signal.SIGKILL
    remove_leftovers()
    assert not list(Path(os.environ["TMPDIR"]).iterdir())


def test_starts_at_the_same_time_share_the_work() -> None:
    with owner() as one, owner() as other, owner() as living:
        until(lambda: one.recorded() and other.recorded())
        kill_all_of(one)
        kill_all_of(other)
        script = PROLOGUE + "from ichat_lifecycle.adapters import engine_leftovers as e\n"
        script += "e.remove_leftovers()"
        starts = [
            subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        for start in starts:
            assert start.stderr is not None
            _, errors = start.communicate(timeout=60)
            assert start.returncode == 0, errors
        assert one.left == other.left == []
        assert len(living.left) == 4


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=64)
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    yield memory
    memory.close()
    (Path(guardian.SHARED) / memory.name).unlink(missing_ok=True)


def test_memory_that_is_in_use_or_another_one_stays(segment: SharedMemory) -> None:
    path = Path(guardian.SHARED) / segment.name
    inode = path.stat().st_ino
    assert guardian.remove_memory({segment.name: inode}) == 0, "this very process uses it"
    segment.close()
    assert guardian.remove_memory({segment.name: inode + 1}) == 0
    assert path.exists()
    assert guardian.remove_memory({segment.name: inode}) == 1


def test_only_the_memory_that_the_engine_maps_is_recorded(segment: SharedMemory) -> None:
    there = guardian.names_of(guardian.segments())
    before = guardian.Memory(lambda: {(os.getpid(), 0)}, -1, there)
    before.look()
    assert before.found == {}, "it was there before the engine"
    looks: list[None] = []

    def nobody() -> set[guardian.Process]:
        looks.append(None)
        return set()

    memory = guardian.Memory(nobody, -1)
    for _ in range(10):
        memory.look()
    assert memory.found == {}
    assert len(looks) <= guardian._MEMORY_LOOKS + 3, "a stranger's is not looked at for ever"


@pytest.mark.parametrize(
    "line", ["psm_../../x 1", "passwd 1", "psm_a", "psm_a -1", "", "psm_a b c"]
)
def test_a_record_names_nothing_but_segments(line: str) -> None:
    assert guardian.recorded(f"note\n{line}\npsm_ok 7\n") == {"psm_ok": 7}


def age(path: Path) -> None:
    old = time.time() - 3600
    os.utime(path, (old, old))


def test_directories_that_are_not_known_to_be_dead_stay(temporary: Path) -> None:
    def made(name: str, mode: int = 0o700) -> Path:
        path = temporary / f"{OWN_PREFIX}{name}"
        path.mkdir()
        path.chmod(mode)
        return path

    made("new")
    full = made("full")
    (full / "somebody's").touch()
    age(full)
    opened = made("open", 0o777)
    (opened / guardian.LIFE).touch()
    fifo = made("fifo")
    os.mkfifo(fifo / guardian.LIFE)
    link = made("link")
    (link / guardian.LIFE).symlink_to("/etc/passwd")
    (temporary / f"{OWN_PREFIX}elsewhere").symlink_to(full)
    (temporary / f"{OWN_PREFIX}file").touch()
    (temporary / "ichat-of-others").mkdir()
    before = sorted(temporary.iterdir())
    age(made("killed while it was made"))
    remove_leftovers()
    assert sorted(temporary.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_another_users_directory_stays(temporary: Path) -> None:
    theirs = temporary / f"{OWN_PREFIX}theirs"
    theirs.mkdir(mode=0o700)
    (theirs / guardian.LIFE).touch()
    os.chown(theirs, 65534, 65534)
    remove_leftovers()
    assert theirs.exists()


def test_a_directory_is_private_whatever_the_umask(temporary: Path) -> None:
    before = os.umask(0)
    try:
        directory = RunDirectory(None, "note")
    finally:
        os.umask(before)
    path = Path(directory.path)
    assert path.parent == temporary
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / guardian.LIFE).stat().st_mode) == 0o600
    assert dead_directories(str(temporary)) == [], "it is alive"
    directory.remove()
    directory.remove()
    assert not path.exists()


def test_what_a_dead_one_has_written_is_only_data(temporary: Path) -> None:
    path = temporary / f"{OWN_PREFIX}x"
    path.mkdir(mode=0o700)
    (path / guardian.LIFE).write_bytes(b"\xff\0 1 2 3\n" + b"psm_\xff 1\n" * 100_000)
    remove_leftovers()
    assert not path.exists()
