"""Engines in a row in one process: what goes on, and that nothing of the former ones stays.

`make soak` does the same fifty times.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx
import pytest
from harness import Worker, wait_for, worker
from soak import Traffic, kill, soak

pytestmark = [pytest.mark.engine, pytest.mark.untimed]

KILLS = 4
TOKEN = "the-control-token-of-this-test"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
RESTARTS = ("--set", "restart.max=100", "--set", "restart.backoff=0.01", "--set", "stop.drain=0.1")


@pytest.fixture(scope="module")
def serving(model: str) -> Iterator[Worker]:
    flags = ("--served-model-name", "demo", "--control-token", TOKEN, *RESTARTS)
    with worker("--model-path", model, *flags) as started:
        started.wait_for_state("READY")
        yield started


@contextmanager
def asking_the_engine(serving: Worker) -> Iterator[set[int]]:
    """What `GET /lifecycle/engine` answers while something else happens."""
    statuses: set[int] = set()
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=serving.control, timeout=60) as client:
            while not ended.wait(0.02):
                statuses.add(client.get("/lifecycle/engine").status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join()


def test_a_prefix_cache_in_use_is_not_reset(serving: Worker) -> None:
    """The engine's own answer is no: 409, not 200; and yes once nothing is in flight."""

    def reset() -> int:
        path = serving.control + "/lifecycle/engine/reset-prefix-cache"
        return httpx.post(path, headers=AUTH, timeout=100).status_code

    with Traffic(serving.main, length=400).running():
        wait_for(lambda: reset() == 409, "a refusal under traffic", 60)
    wait_for(lambda: reset() == 200, "a reset without traffic", 60)


def restart(serving: Worker) -> None:
    """By command, which cuts requests: the drain is short here."""
    url = f"{serving.control}/lifecycle/restart"
    assert httpx.post(url, headers=AUTH, timeout=120).status_code == 202


@pytest.mark.timeout(900)  # five starts' worth of work
def test_counters_go_on_and_nothing_stays_of_engines_that_were_ended(serving: Worker) -> None:
    ways = (partial(kill, serving), partial(restart, serving))
    with asking_the_engine(serving) as statuses:
        counts, still, complaints = soak(serving, KILLS, print, *ways)
    assert still == {}
    assert complaints == 0
    assert counts[-1].descriptors <= counts[0].descriptors
    assert counts[-1].threads <= counts[0].threads
    # 502 with a NoneType before; 504 is an engine that is busy for longer than 2 s.
    assert {200, 503} <= statuses <= {200, 503, 504}
