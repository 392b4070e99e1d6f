"""Forks within and outside of `start_method`, in a process of their own with all that ours has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from ichat_lifecycle.adapters import engine_fork

# Prints one JSON document: what the child of each kind of fork saw, and what the parent saw of it.
SCRIPT = """
import json, multiprocessing, os, signal, socket, sys, tempfile, threading
from pathlib import Path

from ichat_lifecycle.adapters import engine_fork
from ichat_lifecycle.adapters.births import Births
from ichat_lifecycle.adapters.engine_fork import METHOD, start_method

context = multiprocessing.get_context("fork")
os.environ[METHOD] = "as before"

# What a worker has: listeners and connections of each kind, a pair of its own as each event loop
# has one, a client's end, handlers, a wake-up fd.
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
accepted, _ = listener.accept()
directory = tempfile.TemporaryDirectory()
os.chdir(directory.name)
OURS = {"listener": listener, "client": client, "accepted": accepted}
UNIX = {"absolute": str(Path(directory.name) / "main.sock"), "relative": "relative.sock",
        "abstract": "\\0ichat-lifecycle-test-%d" % os.getpid()}
for name, path in UNIX.items():
    unix = socket.socket(socket.AF_UNIX); unix.bind(path); unix.listen()
    OURS[name] = unix
def connect(name):
    "A client's end, and ours of it."
    end = socket.socket(socket.AF_UNIX); end.connect(UNIX[name])
    return end, OURS[name].accept()[0]
for name in UNIX:
    OURS[name + "_client"], OURS[name + "_accepted"] = connect(name)
unix_client, unix_accepted = OURS["absolute_client"], OURS["absolute_accepted"]
OURS["pair"], OURS["pair_peer"] = socket.socketpair()
DURING = {}
def meanwhile():
    "What comes during a load: a client of ours, and the engine client's own."
    for name in UNIX:
        DURING[name + "_client"], DURING[name + "_accepted"] = connect(name)
    DURING["tcp_client"] = socket.create_connection(listener.getsockname())
    DURING["tcp_accepted"], _ = listener.accept()
    DURING["for_the_engine"], DURING["for_the_engine_peer"] = socket.socketpair()
wake_read, wake_write = os.pipe()
os.set_blocking(wake_write, False); os.set_blocking(wake_read, False)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
signal.set_wakeup_fd(wake_write)
null = os.stat(os.devnull).st_rdev
births = Births(lambda pid: False)

births_pipe = os.fstat(births.write_fd)
def has_births_pipe(fd):
    try:
        return os.path.samestat(os.fstat(fd), births_pipe)
    except OSError:
        return False

def is_open(sock):
    return os.fstat(sock.fileno()).st_rdev != null

def child(connection):
    report = {
        "has_births_pipe": has_births_pipe(births.write_fd),
        "group_leader": os.getpgid(0) == os.getpid(),
        "same_session": os.getsid(0) == os.getsid(os.getppid()),
        "method": os.environ.get(METHOD),
        "open": sorted(n for n, s in OURS.items() if is_open(s)),
        "open_of_load": sorted(n for n, s in DURING.items() if is_open(s)),
        "handlers": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    # As vLLM's EngineCore does; with the parent's wake-up descriptor both would hear of it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    print("hello from the child")
    print("and its errors", file=sys.stderr, flush=True)
    connection.send(report)
    connection.recv()  # until the signal comes

def prepare():
    global ours, process
    meanwhile()
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))

def observe(within):
    if within == "start_method":
        with start_method("fork", workers="spawn", births_fd=births.write_fd):
            during = os.environ[METHOD]
            prepare()
            process.start()
    elif within == "another thread's":
        began, go = threading.Event(), threading.Event()
        def hold():
            with start_method("fork", workers="spawn", births_fd=births.write_fd):
                began.set(); go.wait(30)
        thread = threading.Thread(target=hold); thread.start(); began.wait(30)
        during = os.environ[METHOD]
        prepare()
        process.start()
        go.set(); thread.join()
    else:
        during = os.environ[METHOD]
        prepare()
        process.start()
    report = ours.recv()
    births.read()
    report["known"] = process.pid in births.pids
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    report |= {
        "pid": process.pid, "exitcode": process.exitcode, "during": during,
        "after": os.environ[METHOD], "wakeup": wake(),
    }
    return report

def wake():
    try:
        return list(os.read(wake_read, 100))
    except BlockingIOError:
        return []

def in_thread(within):
    result = []
    thread = threading.Thread(target=lambda: result.append(observe(within)))
    thread.start(); thread.join()
    return result[0]

reports = {
    "outside": observe("nothing"),
    "within": observe("start_method"),
    "within, in a thread": in_thread("start_method"),
    "within another thread's": observe("another thread's"),
}
# The parent's own connections still work.
client.sendall(b"x"); unix_client.sendall(b"y")
reports["parent"] = [accepted.recv(1).decode(), unix_accepted.recv(1).decode()]
reports["all"] = [sorted(OURS), sorted(DURING)]
os.chdir("/")
directory.cleanup()
print(json.dumps(reports), flush=True)
"""

WITHIN = ["within", "within, in a thread"]
OUTSIDE = ["outside", "within another thread's"]


@cache
def observed() -> tuple[dict[str, Any], str, str]:
    """The script's document, and what its processes printed besides."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    *printed, document = done.stdout.splitlines()
    return json.loads(document), "\n".join(printed), done.stderr


@pytest.mark.parametrize("kind", WITHIN)
def test_an_engine_process_has_a_group_of_its_own(kind: str) -> None:
    """Ctrl-C is for us; we decide when the engine ends."""
    assert observed()[0][kind]["group_leader"]
    assert observed()[0][kind]["same_session"]


@pytest.mark.parametrize("kind", WITHIN)
def test_an_engine_process_keeps_no_socket_of_ours(kind: str) -> None:
    """Whatever the address is, and also what has come during the load, is /dev/null in it.

    What stays are the pipes that the load makes for the engine, which are socket pairs.
    """
    child = observed()[0][kind]
    assert child["open"] == []
    assert child["open_of_load"] == ["for_the_engine", "for_the_engine_peer"]


@pytest.mark.parametrize("kind", WITHIN)
def test_a_signal_to_an_engine_process_is_its_own(kind: str) -> None:
    """It begins without our handlers; and what its own then hear does not appear in our loop."""
    child = observed()[0][kind]
    assert child["handlers"]
    assert child["exitcode"] == 7
    assert child["wakeup"] == []


@pytest.mark.parametrize("kind", WITHIN)
def test_the_method_is_forks_during_and_spawn_within(kind: str) -> None:
    """EngineCore is forked, its workers are spawned; our own environment is as before."""
    child = observed()[0][kind]
    assert (child["during"], child["method"], child["after"]) == ("fork", "spawn", "as before")


@pytest.mark.parametrize("kind", WITHIN)
def test_an_engine_process_reports_itself_and_can_print(kind: str) -> None:
    """On the pipe of its load, which it gives up; its own streams work from the first line on."""
    reports, printed, errors = observed()
    assert reports[kind]["known"]
    assert not reports[kind]["has_births_pipe"]
    assert printed.count("hello from the child") == len(WITHIN + OUTSIDE)
    assert errors.count("and its errors") == len(WITHIN + OUTSIDE)
    assert "engine process" not in errors


@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_fork_of_somebody_elses_is_untouched(kind: str) -> None:
    """Also one that happens in another thread while an engine is being forked."""
    child = observed()[0][kind]
    assert not child["group_leader"]
    ours, during = observed()[0]["all"]
    assert (child["open"], child["open_of_load"]) == (ours, during)
    assert child["method"] == child["during"]
    assert not child["known"]
    assert not child["handlers"]
    assert child["wakeup"] == [15], "which shows what is closed for engine processes"


def test_the_parent_keeps_its_connections() -> None:
    assert observed()[0]["parent"] == ["x", "y"]


@pytest.mark.parametrize("before", [None, "forkserver"])
@pytest.mark.parametrize("core", ["fork", "spawn"])
def test_the_environment_is_put_back(
    monkeypatch: pytest.MonkeyPatch, before: str | None, core: str
) -> None:
    """Also after an error; and only a fork is noted, because a spawn inherits nothing."""
    if before is None:
        monkeypatch.delenv(engine_fork.METHOD, raising=False)
    else:
        monkeypatch.setenv(engine_fork.METHOD, before)
    with pytest.raises(RuntimeError), engine_fork.start_method(core, workers="spawn"):
        assert os.environ[engine_fork.METHOD] == core
        assert bool(engine_fork._forking) is (core == "fork")
        raise RuntimeError
    assert os.environ.get(engine_fork.METHOD) == before
    assert engine_fork._forking == {}
