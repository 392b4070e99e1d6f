"""Kill the engine again and again under traffic: does anything of a former engine stay? Linux, CPU.

    .venv/bin/python tests/engine/soak.py [--kills 50] [--model DIR]

Serves a demo model, keeps it busy with short and streamed requests, and sends SIGKILL to EngineCore
as soon as the worker has been READY under traffic. Before each kill but the first it counts what
the worker holds: descriptors, threads, memory (RSS, in MiB), and asyncio's complaints in its log.
Prints a line for each kill. At the end it compares the last count with the one after the third
recovery, and the metrics of the main port with what they were before the last kill.

Exits with 1 where descriptors, threads, or memory differ by more than 5 %, or a counter that moved
before the first kill has stood still since the last.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
from harness import Worker, wait_for, worker

from ichat_lifecycle.demo_model import make_demo_model

ALLOWED = 0.05  # of the count after the third recovery
REFERENCE = 3  # vLLM's and torch's own caches are warm by then
CLIENTS = 4
COMPLAINTS = ("Task was destroyed", "Task exception was never", "Future exception was never")
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?P<labels>\{.*\})? (?P<value>\S+)$")


@dataclass(frozen=True)
class Count:
    """What a worker holds."""

    descriptors: int
    threads: int
    memory_mib: float

    @classmethod
    def of(cls, process: psutil.Process) -> Count:
        return cls(
            process.num_fds(),
            process.num_threads(),
            # Not the PSS: how much a forked EngineCore still shares differs from one to the next.
            round(process.memory_info().rss / 2**20, 1),
        )

    def excess_over(self, reference: Count) -> dict[str, float]:
        """How much more there is than in the reference, as a fraction, by name."""
        pairs = {name: (getattr(self, name), value) for name, value in vars(reference).items()}
        return {name: now / then - 1 for name, (now, then) in pairs.items()}


class Traffic:
    """Clients that ask without a pause; what fails while there is no engine is asked again.

    Args:
        url: the worker's main port.
        length: in tokens, of the streamed answers.
    """

    def __init__(self, url: str, length: int = 200) -> None:
        self._url = url
        self._length = length
        self._ended = threading.Event()
        self._answered = 0
        self._threads = [
            threading.Thread(target=self._ask, args=(bool(number % 2),))
            for number in range(CLIENTS)
        ]

    @property
    def answered(self) -> int:
        return self._answered

    @contextlib.contextmanager
    def running(self) -> Iterator[Traffic]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()

    def _ask(self, stream: bool) -> None:
        length = self._length if stream else 8
        body = {"model": "demo", "prompt": "Hello", "max_tokens": length, "stream": stream}
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._ended.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    if client.post("/v1/completions", json=body).status_code == httpx.codes.OK:
                        self._answered += 1
                        continue
                self._ended.wait(0.2)


def samples(text: str) -> dict[str, float]:
    """The counters of a Prometheus page: each sample, with its labels, that may only grow."""
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ", 3)
            kinds[name] = kind
        elif match := _SAMPLE.match(line):
            name = match["name"]
            base = re.sub(r"_(count|bucket|sum)$", "", name)
            grows = kinds.get(name) == "counter" or kinds.get(base) in ("histogram", "summary")
            if grows and not name.endswith("_created"):
                found[name + (match["labels"] or "")] = float(match["value"])
    return found


def page(serving: Worker) -> str:
    """The metrics of the main port now."""
    return httpx.get(serving.main + "/metrics", timeout=30).text


def counters(serving: Worker) -> dict[str, float]:
    return samples(page(serving))


def families(text: str) -> set[str]:
    """The names of all metrics of a Prometheus page, also of those that have no sample yet."""
    return {line.split(" ", 3)[2] for line in text.splitlines() if line.startswith("# TYPE ")}


def stalled(
    moving: set[str], before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, str]:
    """Counters that are expected to move and have not, or that are gone or smaller.

    A single bucket need not move: which one does depends on how fast this machine is just now.
    """
    found = {}
    for name in sorted(moving):
        earlier = before.get(name, 0.0)
        if name not in after:
            found[name] = "gone"
        elif after[name] < earlier or (after[name] == earlier and "_bucket{" not in name):
            found[name] = f"{earlier} -> {after[name]}"
    return found


def settled_count(process: psutil.Process) -> Count:
    """The count once it no longer shrinks: what is released late is no leak."""
    best = Count.of(process)
    for _ in range(4):
        time.sleep(0.5)
        now = Count.of(process)
        if (now.descriptors, now.threads) >= (best.descriptors, best.threads):
            break
        best = now
    return best


def core(serving: Worker) -> psutil.Process | None:
    """The engine's process, if there is one now."""
    return next(iter(serving.engine_pids("EngineCore")), None)


def replace_engine(serving: Worker, end: Callable[[], None]) -> None:
    """Ends EngineCore in this way and waits until another one is READY."""
    former = core(serving)
    end()

    def recovered() -> bool:
        if serving.process.poll() is not None:
            raise AssertionError(f"the worker ended\n{serving.tail()}")
        return core(serving) not in (None, former) and serving.state() == "READY"

    wait_for(recovered, "another engine")


def kill(serving: Worker) -> None:
    if (found := core(serving)) is not None:
        found.send_signal(signal.SIGKILL)


def under_traffic(traffic: Traffic, serving: Worker, more: int = 20) -> None:
    """Waits until the engine has answered some requests."""
    target = traffic.answered + more
    wait_for(lambda: traffic.answered >= target, f"{more} answers\n{serving.tail()}")


def complaints(serving: Worker) -> int:
    text = serving.log.read_text(errors="replace")
    return sum(text.count(complaint) for complaint in COMPLAINTS)


def soak(
    serving: Worker, kills: int, report: Callable[[str], None], *ways: Callable[[], None]
) -> tuple[list[Count], dict[str, str], int]:
    """Ends so many engines; returns the counts, what stands still, and the complaints.

    `ways` are how, in turn; by default each is killed.
    """
    default: Callable[[], None] = partial(kill, serving)
    ends = itertools.cycle(ways or (default,))
    process = psutil.Process(serving.process.pid)
    counts: list[Count] = []
    with Traffic(serving.main).running() as traffic:
        first = page(serving)
        idle = samples(first)
        under_traffic(traffic, serving)
        moving = {name for name, value in counters(serving).items() if value > idle.get(name, 0)}
        for number in range(1, kills + 1):
            before, began = counters(serving), time.monotonic()
            replace_engine(serving, next(ends))
            took = time.monotonic() - began
            under_traffic(traffic, serving)
            counts.append(settled_count(process))
            report(f"{number:4} {took:6.1f} s {counts[-1]} complaints={complaints(serving)}")
        last = page(serving)
        still = stalled(moving, before, samples(last))
        still |= dict.fromkeys(families(first) - families(last), "gone")
    return counts, still, complaints(serving)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", type=Path, help="default: a demo model made on the spot")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "demo"
        if args.model is None:
            make_demo_model(model)
        flags = ("--served-model-name", "demo", "--set", "restart.max=1000")
        backoff = ("--set", "restart.backoff=0.01", "--set", "restart.backoff_max=0.01")
        with worker("--model-path", str(model), *flags, *backoff) as serving:
            serving.wait_for_state("READY")
            counts, still, loud = soak(serving, args.kills, partial(print, flush=True))
    excess = counts[-1].excess_over(counts[min(REFERENCE, len(counts)) - 1])
    print({name: f"{value:+.1%}" for name, value in excess.items()})
    print("counters that stand still:", still or "none")
    print("complaints of asyncio:", loud)
    failed = still or loud or any(value > ALLOWED for value in excess.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
