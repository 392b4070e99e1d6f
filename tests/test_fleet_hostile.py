"""A worker that harms whoever it can, beside an honest one, which serves; all end in time."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import psutil
import pytest
from running_fleet import RunningFleet
from waiting import until

from ichat_lifecycle.testing.hostile_plane import TRICKS
from ichat_lifecycle.testing.hostile_worker import VARIABLE

pytestmark = pytest.mark.fleet


def hostile(*tricks: str, **more: object) -> dict[str, object]:
    return {"model_name": "evil", "env": {VARIABLE: ",".join(tricks)}, **more}


def test_a_hostile_worker_harms_nobody_but_itself(tmp_path: Path) -> None:
    """All its tricks at once, until each of them has come to something."""
    with RunningFleet(tmp_path, hostile(), {"model_name": "honest"}) as fleet:
        until(lambda: fleet.serving("honest", "evil"))
        with fleet.asked_all_the_time("honest") as asked:
            until(lambda: fleet.events("worker_told_nonsense") and fleet.events("lines_dropped"))
            until(lambda: any("forged" in str(line) for line in fleet.lines))
            document = fleet.get("/fleet")
            assert document.status_code == 200, document.text
            assert fleet.get("/fleet/evil").status_code == 200
        assert set(asked.counts) == {"200"}
        assert fleet.seen("honest")["starts"] == 1
        assert fleet.seen("evil")["control_url"].startswith("http://127.0.0.1:")
        with httpx.stream("GET", f"{fleet.url}/fleet/events", timeout=60) as events:
            assert len(next(events.iter_bytes())) < 2**20
        forged = [line for line in fleet.lines if str(line.get("event")).startswith("worker_k")]
        assert {line["worker"] for line in forged} == {"evil"}
        assert all(line["logger"] == "worker" for line in forged)
        assert {line["worker"] for line in fleet.events("worker_told_nonsense")} == {"evil"}
        assert not fleet.events("supervision_failed") + fleet.events("task_failed")
        fleet.process.send_signal(signal.SIGINT)
        until(lambda: fleet.process.poll() is not None, within_s=60)
    assert fleet.process.returncode == 0


def test_words_that_no_parser_takes_end_nothing_but_the_worker(tmp_path: Path) -> None:
    """Its last words are nested 15,000 times, and have no end."""
    with RunningFleet(tmp_path, hostile("nonsense"), {"model_name": "honest"}) as fleet:
        until(lambda: fleet.serving("honest", "evil"))
        pid = fleet.seen("evil")["pid"]
        fleet.post("/fleet/evil/stop")
        until(lambda: fleet.seen("evil")["stage"] == "stopped")
        assert not psutil.pid_exists(pid), "a zombie"
        assert fleet.serving("honest")
        (line,) = [line for line in fleet.lines if line.get("event", "").startswith("[[[")]
        assert line["worker"] == "evil"
    assert fleet.process.returncode == 0


def test_a_document_that_is_none_is_null_in_the_fleets(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, hostile("control")) as fleet:
        until(lambda: fleet.seen("evil")["control_url"])
        for _ in TRICKS:
            answer = fleet.get("/fleet")
            assert answer.status_code == 200
            json.loads(answer.text, parse_constant=pytest.fail)


def test_commands_for_one_worker_have_a_token_of_its_own(tmp_path: Path) -> None:
    """What an operator sends to a worker opens no other one's control plane."""
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}) as fleet:
        fleet.wait_until_ready()
        tokens = {}
        for name in "ab":
            variables = psutil.Process(fleet.seen(name)["pid"]).environ()
            tokens[name] = variables["ICHAT_LIFECYCLE_CONTROL_TOKEN"]
        assert tokens["a"] != tokens["b"]
        url = f"{fleet.seen('b')['control_url']}/lifecycle/engine/sleep"
        for name, status in (("a", 401), ("b", 200)):
            headers = {"Authorization": f"Bearer {tokens[name]}"}
            answer = httpx.post(url, headers=headers, timeout=60, trust_env=False)
            assert answer.status_code == status
        assert fleet.post("/fleet/a/lifecycle/engine/sleep").status_code == 200
