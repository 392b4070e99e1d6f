"""Two workers of one file on real engines: configs/two-cpu.yaml, with ports of the test's own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from gateway import Gateway, running_gateway
from running_fleet import RunningFleet, free_ports
from waiting import until

pytestmark = pytest.mark.engine

EXAMPLE = Path(__file__).parents[2] / "configs/two-cpu.yaml"


def processes_of(pid: int) -> list[int]:
    """All that it has started, and what they have."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


class TwoCpu(RunningFleet):
    """The example as it is, but for its ports."""

    program = (sys.executable, "-m", "ichat_lifecycle", "up")

    def __init__(self, directory: Path, gateway: Gateway) -> None:
        super().__init__(directory)
        written = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
        self.workers = written.pop("managed_workers")
        self.sections = written
        self.sections["fleet"]["port"] = 0
        self.sections["server_settings"]["port"] = gateway.server_port
        for worker, port in zip(self.workers, free_ports(2), strict=True):
            worker |= {"port": port, "control_port": 0}


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with running_gateway() as running:
        yield running


@pytest.fixture(scope="module")
def fleet(
    model: str, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningFleet]:
    os.environ["DEMO_MODEL"] = model
    try:
        with TwoCpu(tmp_path_factory.mktemp("fleet"), gateway) as running:
            yield running.wait_until_ready()
    finally:
        del os.environ["DEMO_MODEL"]


def test_both_answer_and_show_themselves(fleet: RunningFleet, gateway: Gateway) -> None:
    for name in ("demo-a", "demo-b"):
        answer = fleet.ask(name)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert fleet.get(f"/fleet/{name}/lifecycle").json()["vllm_version"]
        assert gateway.states(name) == ["initializing", "ready"]
        told = fleet.get(f"/fleet/{name}/lifecycle/history").json()["phases"]
        assert len({phase["phase"] for phase in told}) >= 6


def test_one_is_killed_and_comes_back_while_the_other_serves(fleet: RunningFleet) -> None:
    pid = fleet.seen("demo-a")["pid"]
    engine = processes_of(pid)
    assert engine
    with fleet.asked_all_the_time("demo-b", every_s=0.2) as other:
        os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(psutil.pid_exists, engine)), within_s=30)
        until(lambda: fleet.seen("demo-a")["starts"] == 2 and fleet.serving("demo-a"))
    assert set(other.counts) == {"200"}
    assert fleet.ask("demo-a").status_code == 200


def test_a_reload_replaces_one_and_refuses_nobody(fleet: RunningFleet) -> None:
    pids = [fleet.seen(name)["pid"] for name in ("demo-a", "demo-b")]
    fleet.workers[1]["max_num_seqs"] = 4
    fleet.write()
    with fleet.asked_all_the_time("demo-b") as asked:
        fleet.process.send_signal(signal.SIGHUP)
        until(lambda: fleet.seen("demo-b")["pid"] != pids[1])
        until(lambda: len(fleet.get("/fleet").json()["workers"]) == 2)
    assert set(asked.counts) == {"200"}
    assert fleet.seen("demo-a")["pid"] == pids[0]
    assert fleet.get("/fleet/demo-b/lifecycle").json()["arguments"]["max_num_seqs"] == 4


def test_ctrl_c_leaves_no_process(fleet: RunningFleet) -> None:
    """Last: it ends the fleet."""
    processes = processes_of(fleet.process.pid)
    assert len(processes) >= 4
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.process.wait(60) == 0
    until(lambda: not any(map(psutil.pid_exists, processes)), within_s=10)
