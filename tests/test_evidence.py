"""Evidence of an engine: what a bundle holds, what bounds it, and that it never fails."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import evidence, process_view
from ichat_lifecycle.adapters.evidence import (
    BUNDLES_KEPT,
    FILE_LIMIT,
    EngineEvidence,
    EvidenceFiles,
)
from ichat_lifecycle.adapters.process_view import find_py_spy, kernel_view, numbers
from ichat_lifecycle.ports import Case, Evidence
from ichat_lifecycle.redact import Secrets

DEADLINE_S = 60.0
CASE = Case("engine_hung", "no answer to 3 probes", "RPC timed out", "start again", ({"n": 1},))
NOON = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
# Says that it is up, and then waits in a function of a name to look for, until its input ends.
STUCK = """
import sys
def stuck_here():
    print("up", flush=True)
    sys.stdin.read()
stuck_here()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A Python process that waits; it is ended in whatever state the test leaves it."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, "--api-key", "sk-secret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == "up\n"
        yield made
        made.kill()


def stop(child: subprocess.Popen[str]) -> None:
    """As the tests of a hung engine do it."""
    child.send_signal(signal.SIGSTOP)
    found, status = os.waitpid(child.pid, os.WUNTRACED)
    assert found == child.pid and os.WIFSTOPPED(status)


def save(
    directory: Path, *pids: int, case: Case = CASE, lines: Any = None, **more: Any
) -> Path | None:
    """A bundle's path, or None."""
    files = EvidenceFiles(directory, **{"deadline_s": DEADLINE_S, "now": lambda: NOON, **more})
    port: Evidence = EngineEvidence(files, lambda: pids, lambda: lines or {})
    path = asyncio.run(port.save(case))
    return Path(path) if path else None


def saved(directory: Path, *pids: int, **more: Any) -> Path:
    path = save(directory, *pids, **more)
    assert path is not None
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def script(path: Path, text: str) -> str:
    """A program to use in py-spy's place."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o700)
    return str(path)


# --- what a bundle holds


def test_a_bundle_of_a_stopped_process(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """All that is asked for, with the real py-spy on a process that SIGSTOP holds."""
    stop(child)
    lines = {"EngineCore": ["one", "two"], "Worker_TP0": ["three"]}
    path = saved(tmp_path, child.pid, lines=lines)
    assert path == tmp_path / f"20261122T120000Z-engine_hung-{os.getpid()}"
    assert {file.name for file in path.iterdir()} == {
        "case.json",
        "probes.json",
        "processes.json",
        "log-EngineCore.txt",
        "log-Worker_TP0.txt",
        f"stack-{child.pid}.txt",
    }
    assert (path / "log-EngineCore.txt").read_text() == "one\ntwo\n"
    stack = (path / f"stack-{child.pid}.txt").read_text()
    kernel, _, python = stack.partition("== py-spy\n")
    assert "State:\tT (stopped)" in kernel
    assert f"== thread {child.pid} 'python" in kernel
    assert "\nstate: T\n" in kernel and "\nwchan: " in kernel
    assert "stuck_here" in python
    row = read(path / "processes.json")[0]
    assert (row["pid"], row["gone"], row["status"]) == (child.pid, False, "stopped")
    assert row["threads"] == 1 and row["open_fds"] >= 3 and row["memory_bytes"]["rss"] > 0
    assert row["cpu_times_s"]["user"] >= 0 and "stuck_here" in row["cmdline"]


def test_the_process_goes_on_as_before(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """To look at it must not stop it, nor leave a tracer behind."""
    path = saved(tmp_path, child.pid)
    assert "State:\tS" in (path / f"stack-{child.pid}.txt").read_text()
    assert "TracerPid:\t0" in Path(f"/proc/{child.pid}/status").read_text()
    child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0


def test_what_a_case_says(tmp_path: Path) -> None:
    path = saved(tmp_path)
    document = read(path / "case.json")
    told = {key: document[key] for key in ("code", "message", "root_cause", "hint", "at", "pid")}
    assert told == {
        "code": "engine_hung",
        "message": "no answer to 3 probes",
        "root_cause": "RPC timed out",
        "hint": "start again",
        "at": "2026-11-22T12:00:00+00:00",
        "pid": os.getpid(),
    }
    assert document["python"] == sys.version
    assert document["versions"]["ichat-lifecycle"]
    assert document["platform"]
    assert read(path / "probes.json") == [{"n": 1}]
    assert read(path / "processes.json") == []


def test_the_name_is_in_utc_and_safe(tmp_path: Path) -> None:
    """A code or a child's name cannot lead out of the directory."""
    later = datetime(2026, 11, 22, 23, 0, 0, tzinfo=timezone(timedelta(hours=5)))
    path = saved(
        tmp_path, case=Case("../Odd code", "x"), now=lambda: later, lines={"../../x y": ["z"]}
    )
    assert path == tmp_path / f"20261122T180000Z-___odd_code-{os.getpid()}"
    assert (path / "log-.._.._x_y.txt").read_text() == "z\n"


def test_two_of_the_same_second(tmp_path: Path) -> None:
    first, second = saved(tmp_path), saved(tmp_path)
    assert second == first.with_name(f"{first.name}-2")


def test_our_own_process(tmp_path: Path) -> None:
    """A blocked loop is looked at by another thread of ours, and needs no right to trace."""
    path = saved(tmp_path, os.getpid(), case=Case("loop_blocked", "x"), py_spy="/nowhere/py-spy")
    stack = (path / f"stack-{os.getpid()}.txt").read_text()
    assert "== our own Python stacks" in stack
    assert "test_our_own_process" in stack
    assert "py-spy: No such file or directory" in stack


# --- secrets


def test_secrets_are_scrubbed_from_every_file(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """In all of these, a process's command line and py-spy's echo of it among them."""
    secrets = Secrets()
    secrets.add("sk-secret", 'odd"secret')
    case = Case("engine_hung", "sk-secret", "sk-secret", "x", ({"detail": 'odd"secret'},))
    path = saved(
        tmp_path, child.pid, case=case, lines={"Worker": ["key sk-secret"]}, scrub=secrets.scrub
    )
    texts = {file.name: file.read_text() for file in path.iterdir()}
    hidden = {name for name, text in texts.items() if "***" in text}
    assert hidden == set(texts)
    assert not any("sk-secret" in text or "odd" in text for text in texts.values())


def test_a_cut_does_not_show_half_a_secret(
    tmp_path: Path, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scrubber does not know half a secret: it comes before the cut."""
    secrets = Secrets()
    secrets.add("sk-secret")
    begun = " ".join([sys.executable, "-c", STUCK, "--api-key", "sk-"])
    monkeypatch.setattr(evidence, "COMMAND_LIMIT", len(begun))
    monkeypatch.setattr(evidence, "TEXT_LIMIT", len("key sk-"))
    case = Case("x", "key sk-secret")
    path = saved(tmp_path, child.pid, case=case, scrub=secrets.scrub)
    assert read(path / "processes.json")[0]["cmdline"].endswith("--api-key ***")
    assert read(path / "case.json")["message"] == "key ***"


def test_what_cannot_be_scrubbed_is_not_written(tmp_path: Path) -> None:
    def fail(text: str) -> str:
        raise ValueError("a scrubber's bug")

    assert save(tmp_path, scrub=fail) is None
    assert list(tmp_path.iterdir()) == []


def test_only_we_may_read_it(tmp_path: Path) -> None:
    """Logs can hold prompts."""
    path = saved(tmp_path / "deep" / "evidence", os.getpid())
    for place, mode in ((path.parent, 0o700), (path, 0o700)):
        assert stat.S_IMODE(place.stat().st_mode) == mode
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


# --- bounds


def test_only_the_newest_bundles_are_kept(tmp_path: Path) -> None:
    """The oldest go; what is not one of ours stays, whatever it is."""
    names = [f"202611{day:02}T120000Z-engine_died-{day}" for day in range(1, 16)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.json").write_text("{}")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (tmp_path / "20200101T000000Z-link-1").symlink_to(outside, target_is_directory=True)
    (tmp_path / "20200101T000000Z-file-1").write_text("")
    (tmp_path / "20200101-notes").mkdir()
    path = saved(tmp_path)
    left = {entry.name for entry in tmp_path.iterdir()}
    others = {"elsewhere", "20200101T000000Z-link-1", "20200101T000000Z-file-1", "20200101-notes"}
    assert left == others | set(names[-(BUNDLES_KEPT - 1) :]) | {path.name}


def test_every_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a log and of probes the newest, of a stack the beginning; all within its limit."""
    wide = "\u00e9" * 40_000
    case = Case(wide, wide, wide, wide, tuple({"n": n, "text": "x" * 40_000} for n in range(100)))
    spy = script(tmp_path / "py-spy", "print('first'); print('x' * 3_000_000)")
    monkeypatch.setattr(evidence, "kernel_view", lambda pid: "k" * 2 * FILE_LIMIT)
    lines = {"Worker": [*("x" * 10_000 for _ in range(300)), "the last"]}
    path = saved(tmp_path / "e", os.getpid(), case=case, lines=lines, py_spy=spy)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert max(sizes.values()) <= FILE_LIMIT
    assert sizes["log-Worker.txt"] == sizes[f"stack-{os.getpid()}.txt"] == FILE_LIMIT
    assert (path / "log-Worker.txt").read_text().endswith("x\nthe last\n")
    assert "== py-spy\nfirst\n" in (path / f"stack-{os.getpid()}.txt").read_text()
    assert read(path / "probes.json")[-1]["n"] == 99
    assert len(read(path / "case.json")["message"]) < len(wide)


def test_a_late_py_spy_is_killed(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """The rest of the bundle is there, and no process of ours is left."""
    pid_file = tmp_path / "pid"
    spy = script(
        tmp_path / "py-spy",
        f"import os, time\nprint('begun', flush=True)\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(3600)",
    )
    path = saved(tmp_path / "e", child.pid, py_spy=spy, deadline_s=4.0)
    stack = (path / f"stack-{child.pid}.txt").read_text()
    assert "begun" in stack and "py-spy: no end after" in stack
    assert read(path / "processes.json")[0]["pid"] == child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What blocks goes on at the end, so that no thread is left."""
    made = threading.Event()
    yield made
    made.set()
    for thread in threading.enumerate():
        if thread.name == "evidence":
            thread.join(DEADLINE_S)


def test_a_process_that_cannot_be_read_holds_up_nothing_else(
    tmp_path: Path,
    child: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    gate: threading.Event,
) -> None:
    """A read of a process that is stuck in the kernel never returns; and the loop stays free."""

    def blocks_for_one(pid: int) -> dict[str, Any]:
        if pid == os.getpid():
            gate.wait(DEADLINE_S)
        return numbers(pid)

    monkeypatch.setattr(evidence, "numbers", blocks_for_one)
    with capture_logs() as logs:
        path = saved(tmp_path, os.getpid(), child.pid, deadline_s=4.0)
    rows = read(path / "processes.json")
    assert rows[0] == {"pid": os.getpid(), "error": "not read"}
    assert rows[1]["pid"] == child.pid and not rows[1]["gone"]
    assert "stuck_here" in (path / f"stack-{child.pid}.txt").read_text()
    assert "Threads:" in (path / f"stack-{os.getpid()}.txt").read_text()
    assert [entry["event"] for entry in logs] == ["evidence_incomplete", "evidence_saved"]


def test_a_disk_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """Nothing could be saved: said so, in time, and nothing is written afterwards."""
    room = evidence._make_room

    def hangs(directory: Path) -> None:
        gate.wait(DEADLINE_S)
        room(directory)

    monkeypatch.setattr(evidence, "_make_room", hangs)
    began = time.monotonic()
    with capture_logs() as logs:
        assert save(tmp_path, deadline_s=0.2) is None
    assert time.monotonic() - began < DEADLINE_S / 2
    assert [entry["event"] for entry in logs] == ["evidence_late"]
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "evidence":
            thread.join(DEADLINE_S)
    assert list(tmp_path.glob("*/*")) == []


def test_the_loop_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """It turns while a thread is held: in the directory's creation, and while one is looked at."""
    turned: list[str] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        def held(what: str, then: Callable[..., Any]) -> Callable[..., Any]:
            def wait(*given: Any) -> Any:
                passed = threading.Event()
                loop.call_soon_threadsafe(passed.set)
                assert passed.wait(DEADLINE_S), "the loop is blocked"
                turned.append(what)
                return then(*given)

            return wait

        for name in ("_make_room", "kernel_view", "_newest_that_fit"):
            monkeypatch.setattr(evidence, name, held(name, getattr(evidence, name)))
        assert await EvidenceFiles(tmp_path, deadline_s=DEADLINE_S).save(CASE, [os.getpid()], {})

    asyncio.run(scenario())
    probes_and_processes = ["_newest_that_fit"] * 2
    assert sorted(turned) == ["_make_room", *probes_and_processes, "kernel_view"]


def test_a_cancellation_ends_it(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """The only thing that it raises; py-spy goes with it."""
    pid_file = tmp_path / "pid"
    spy = script(
        tmp_path / "py-spy",
        f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()) + ' ')\n"
        "time.sleep(3600)",
    )

    async def scenario() -> None:
        files = EvidenceFiles(tmp_path / "e", deadline_s=DEADLINE_S, py_spy=spy)
        task = asyncio.create_task(files.save(CASE, [child.pid], {}))
        async with asyncio.timeout(DEADLINE_S):
            while not (pid_file.exists() and pid_file.read_text().endswith(" ")):
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    for thread in threading.enumerate():
        if thread.name == "evidence":
            thread.join(DEADLINE_S)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# --- it never fails


def gone_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait(DEADLINE_S)
    return process.pid


def test_a_vanished_process(tmp_path: Path) -> None:
    """It may end at any moment; what pids there never were cannot fail it either."""
    pid = gone_pid()
    path = saved(tmp_path, pid, pid, -1, 2**31)
    rows = read(path / "processes.json")
    assert [(row["pid"], row["gone"]) for row in rows] == [(p, True) for p in (pid, -1, 2**31)]
    assert "(No such file or directory)" in (path / f"stack-{pid}.txt").read_text()


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    """Root may write anywhere, so not permissions, but a file in the directory's place."""
    (tmp_path / "file").write_text("")
    with capture_logs() as logs:
        assert save(tmp_path / "file") is None
        assert save(tmp_path / "file" / "deep") is None
    assert [entry["event"] for entry in logs] == ["evidence_not_saved"] * 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Said so, and no empty bundle is left."""

    def fail(*given: Any) -> Any:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr("ichat_lifecycle.adapters.evidence.os.fdopen", fail)
        assert save(tmp_path) is None
    assert [entry["event"] for entry in logs] == ["evidence_not_saved"]
    assert os.strerror(error) in logs[0]["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had been written by then is the bundle."""

    def fail(pid: int) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evidence, "kernel_view", fail)
    with capture_logs() as logs:
        path = saved(tmp_path, os.getpid())
    assert read(path / "case.json")["code"] == "engine_hung"
    assert read(path / "processes.json")[0] == {"pid": os.getpid(), "error": "not read"}
    assert [entry["event"] for entry in logs] == ["evidence_incomplete", "evidence_saved"]


def test_probes_that_are_not_json(tmp_path: Path) -> None:
    """Shown as text rather than not at all."""
    path = saved(tmp_path, case=Case("x", "y", probes=({"at": NOON, "odd": float("inf")},)))
    assert read(path / "probes.json")[0]["at"].startswith("2026-11-22")


# --- the parts


def test_py_spy_is_found_beside_python_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that was not activated is not on PATH."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "b"))
    assert find_py_spy() is None
    assert shutil.which("py-spy") is None
    on_path = script(tmp_path / "b" / "py-spy", "")
    assert find_py_spy() == on_path
    beside = script(tmp_path / "a" / "py-spy", "")
    assert find_py_spy() == beside


def test_without_py_spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_view, "find_py_spy", lambda: None)
    path = saved(tmp_path, os.getpid())
    stack = (path / f"stack-{os.getpid()}.txt").read_text()
    assert stack.endswith("== py-spy\npy-spy: not found beside Python or on PATH\n")


def test_py_spy_is_asked_not_to_pause_the_process(tmp_path: Path) -> None:
    """One that is stopped may never be seen to pause, and one that recovers must not be held."""
    spy = script(tmp_path / "py-spy", "import sys; print(*sys.argv[1:])")
    path = saved(tmp_path / "e", os.getpid(), py_spy=spy)
    stack = (path / f"stack-{os.getpid()}.txt").read_text()
    assert f"== py-spy\ndump --nonblocking --pid {os.getpid()}\n" in stack


def test_the_kernels_view_has_every_thread() -> None:
    seen = kernel_view(os.getpid())
    own = {f"== thread {thread.native_id} " for thread in threading.enumerate()}
    assert all(line in seen for line in own)


def test_the_default_place_is_the_users_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/tmp/state")
    assert evidence.default_directory() == Path("/tmp/state/ichat-lifecycle/evidence")
