"""What counts as a move of a load, what does not; and what is measured of real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from ichat_lifecycle.adapters import load_progress
from ichat_lifecycle.adapters.load_progress import Judge, News, Sample, Sampler, watch
from ichat_lifecycle.config import Start
from ichat_lifecycle.errors import ExitCode, StartError

FIRST = Sample(100.0, "loading_weights")
MOVES = {
    "a new phase": {"phase": "compiling"},
    "a new line": {"lines": 1},
    "CPU time": {"cpu_s": 0.2},
    "bytes": {"moved_bytes": 65536},
}


def still_after(rates: dict[str, float], seconds: int) -> float:
    """What the judge says of a load that uses so much in each second."""
    judge, still_s = Judge(FIRST), 0.0
    for passed in range(1, seconds + 1):
        used = {name: type(getattr(FIRST, name))(rate * passed) for name, rate in rates.items()}
        still_s = judge.still_for_s(replace(FIRST, at_s=FIRST.at_s + passed, **used))
    return still_s


@pytest.mark.parametrize("move", MOVES)
def test_each_kind_of_move_counts(move: str) -> None:
    judge = Judge(FIRST)
    assert judge.still_for_s(replace(FIRST, at_s=102.0)) == 2
    moved = replace(FIRST, at_s=104.0, **MOVES[move])  # type: ignore[arg-type]
    assert judge.still_for_s(moved) == 0
    assert judge.still_for_s(replace(moved, at_s=107.0)) == 3


@pytest.mark.parametrize("rates", [{}, {"cpu_s": 0.01}, {"moved_bytes": 1000}])
def test_idle_polling_is_no_move(rates: dict[str, float]) -> None:
    assert still_after(rates, 300) > 290


@pytest.mark.parametrize("rates", [{"cpu_s": 0.03}, {"moved_bytes": 8192}])
def test_a_slow_load_moves(rates: dict[str, float]) -> None:
    """A twentieth of what is usual is enough."""
    assert still_after(rates, 300) < 10


def test_a_time_in_which_nobody_looked_does_not_count() -> None:
    """We were stopped ourselves, by Ctrl-Z for example, and the engine with us."""
    judge = Judge(FIRST)
    assert judge.still_for_s(replace(FIRST, at_s=101.0)) == 1
    assert judge.still_for_s(replace(FIRST, at_s=1000.0)) == 0


def test_a_line_that_was_there_before_is_no_news() -> None:
    news = News()
    for second in range(5):
        news.line(f"(EngineCore pid=7) INFO 11-22 17:19:0{second} [shm.py:7] still waiting")
    assert news.count == 1
    for percent in range(5):
        news.line(f"Loading safetensors checkpoint shards: {percent}% Completed")
    assert news.count == 6


@pytest.mark.parametrize("prefix", ["", "[n1] ", "(n1) "])
@pytest.mark.parametrize(
    "said",
    [
        "No available block found in {} seconds",
        "still waiting, {}.5s",
        "waiting for the lock: 0:00:0{}",
        "Loading shards: 50% Completed | 1/2 [00:0{0}<00:0{0}, 1.{0}s/it]",
        "Fetching 3 files: 33% [00:0{}<?, 10.3MB/s]",
    ],
)
def test_a_line_that_only_ticks_is_no_news(
    prefix: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands before it: a load that has stalled says for how long it has."""
    monkeypatch.setenv("VLLM_LOGGING_PREFIX", prefix)
    news = News()
    for second in range(1, 6):
        text = said.format(second)
        news.line(f"{prefix}(EngineCore pid=7) INFO 11-22 17:19:0{second} [shm.py:7] {text}")
    assert news.count == 1


class FakeSampler(Sampler):
    def __init__(self, work: Callable[[], tuple[float, int]]) -> None:
        super().__init__()
        self._work = work

    def take(self) -> tuple[float, int]:
        return self._work()

    def describe(self) -> str:
        return "VLLM::EngineCore (pid 7) stopped by a signal"


def watched(work: Callable[[], tuple[float, int]], bound_s: float) -> None:
    async def main() -> None:
        async with asyncio.timeout(bound_s):
            await watch(0.4, lambda: "loading_weights", News(), FakeSampler(work))

    asyncio.run(main())


def test_a_load_that_stands_still_is_ended_with_the_phase_and_the_processes() -> None:
    with pytest.raises(StartError) as caught:
        watched(lambda: (0.0, 0), 30)
    error = caught.value
    assert (error.code, error.exit_code) == ("start_stalled", ExitCode.ENGINE_START_FAILED)
    assert "in the phase loading_weights: nothing moved for" in error.message
    assert error.root_cause == "VLLM::EngineCore (pid 7) stopped by a signal"
    assert "start.stall_timeout" in str(error.hint)


@pytest.mark.parametrize(("interval_s", "frozen_s"), [(0.25, 6.0), (5.0, 400.0)])
def test_a_load_that_was_frozen_with_its_watch_has_not_stalled(
    interval_s: float, frozen_s: float
) -> None:
    """Also where the limit is short, and a gap of its length is not yet one of 10 s."""
    judge = Judge(Sample(0.0, "loading"), interval_s)
    now_s = interval_s
    assert judge.still_for_s(Sample(now_s, "loading")) == now_s
    now_s += frozen_s
    assert judge.still_for_s(Sample(now_s, "loading")) == 0
    assert judge.still_for_s(Sample(now_s + interval_s, "loading")) == interval_s


def test_the_watch_itself_is_no_move() -> None:
    """It reads hundreds of files in each look."""

    async def main() -> None:
        async with asyncio.timeout(60):
            await watch(2.0, lambda: "loading_weights", News(), Sampler())

    with pytest.raises(StartError):
        asyncio.run(main())


def test_one_that_moves_goes_on() -> None:
    with pytest.raises(TimeoutError):
        watched(lambda: (time.monotonic(), 0), 2)


def test_a_look_that_fails_is_no_end() -> None:
    """Descriptors may have run out: that is the load's own affair."""

    def fail() -> tuple[float, int]:
        raise OSError(24, "Too many open files")

    with pytest.raises(TimeoutError):
        watched(fail, 2)


BUSY = "n = 0\nwhile True: n += 1"
IDLE = "import time\nwhile True: time.sleep(0.02)"
WRITING = "while True: open('/dev/null', 'wb').write(b'x' * 65536)"
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])"


def child(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", program], start_new_session=True)


def used_by(program: str, sampler: Sampler, enough: Callable[[float, int], bool]) -> bool:
    """Whether the sampler sees enough of a child's work within 20 s."""
    process = child(program)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if enough(*sampler.take()):
                return True
            time.sleep(0.05)
        return False
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_work_of_a_grandchild_counts() -> None:
    assert used_by(PARENT, Sampler(), lambda cpu_s, _: cpu_s > 0.3)


def test_what_is_written_counts() -> None:
    assert used_by(WRITING, Sampler(), lambda _, moved: moved > 10_000_000)


def test_what_was_there_before_the_load_does_not_count() -> None:
    process = child(BUSY)
    try:
        sampler = Sampler()
        time.sleep(0.3)
        assert sampler.take()[0] < 0.1
    finally:
        process.kill()
        process.wait()


def test_a_thread_that_the_load_has_started_counts_and_the_others_do_not() -> None:
    def compute() -> None:
        until = time.thread_time() + 0.3
        while time.thread_time() < until:
            pass

    sampler = Sampler()
    compute()
    assert sampler.take()[0] < 0.1
    ended = threading.Event()

    def compute_and_wait() -> None:
        compute()
        ended.wait(20)

    thread = threading.Thread(target=compute_and_wait)
    thread.start()
    deadline = time.monotonic() + 20
    while sampler.take()[0] < 0.2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ended.set()
    thread.join()
    assert sampler.take()[0] >= 0.2, "what has ended keeps its share"


def test_each_process_is_told_with_what_it_does() -> None:
    sampler = Sampler()
    assert sampler.describe() == "no process of the engine is there"
    process = subprocess.Popen(["sleep", "600"])
    process.send_signal(signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 20
        while "stopped by a signal" not in sampler.describe():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert sampler.describe() == f"sleep (pid {process.pid}) stopped by a signal"
    finally:
        process.kill()
        process.wait()


def test_the_default_outlasts_the_pauses_that_end_by_themselves() -> None:
    """An NFS server's grace period is 90 s; vLLM itself says that it waits once a minute."""
    assert Start().stall_timeout > 2 * 90
    assert Start().stall_timeout < Start().engine_timeout
    assert Start().stall_timeout > load_progress._LONGEST_INTERVAL_S * 10
