"""The secrets of a fleet, looked for in everything that leaves its processes."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import psutil
import pytest
from running_fleet import RunningFleet
from waiting import until

pytestmark = pytest.mark.fleet

# In the file: none of them has a form that gives it away.
SECRETS = {
    "hf_token": "aardvark-boat-clock",
    "second_key": "dolphin-eagle-forest",
    "password": "giraffe/house?iron#jar@x",
    "aws": "kangaroo+lemon/mirror",
    "otlp": "narwhal-ocean-piano",
    "control": "quail-river-stone-token",
}


def found_in(text: str) -> list[str]:
    """The names of the secrets that a text has, also as JSON and as a URL have them."""
    return [name for name, secret in SECRETS.items() if secret in text or secret[:14] in text]


def command_lines(root: int) -> str:
    """What any user of the machine sees of a process and of all below it."""
    process = psutil.Process(root)
    return "\n".join(
        Path(f"/proc/{one.pid}/cmdline").read_text() for one in (process, *process.children(True))
    )


def test_no_secret_of_a_fleet_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the process list nor by what it prints and answers, though its worker prints and
    answers its words, prints its environment, is killed, started again, and replaced."""
    monkeypatch.setenv("ICHAT_LIFECYCLE_CONTROL_TOKEN", SECRETS["control"])
    worker = {
        "model_name": "a",
        "hf_token": SECRETS["hf_token"],
        "api_key": ["first-of-two-keys", SECRETS["second_key"]],
        "otlp_traces_endpoint": f"http://user:{SECRETS['password']}@127.0.0.1:9/v1",
        "env": {
            "FLEET_CARELESS": "1",
            "AWS_SECRET_ACCESS_KEY": SECRETS["aws"],
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {SECRETS['otlp']}",
        },
    }
    with RunningFleet(tmp_path, worker) as fleet:
        fleet.wait_until_ready()
        assert found_in(command_lines(fleet.process.pid)) == []
        psutil.Process(fleet.seen("a")["pid"]).kill()
        until(lambda: fleet.seen("a")["starts"] == 2 and fleet.serving("a"))
        assert found_in(command_lines(fleet.process.pid)) == []
        logs = fleet.get("/fleet/a/logs").text
        # It got them, both times, and prints them.
        assert (
            logs.count('"--hf-token", "***"') == logs.count("'AWS_SECRET_ACCESS_KEY': '***'") == 2
        )
        told = [logs, fleet.get("/fleet").text, fleet.get("/fleet/a").text]
        told += [fleet.get(f"/fleet/a/{what}").text for what in ("lifecycle", "lifecycle/history")]
        assert all('"--hf-token","***"' in text for text in told[1:4]), (
            "the worker itself hides none"
        )
        told.append(fleet.get("/metrics").text)
        with httpx.stream("GET", f"{fleet.url}/fleet/events", timeout=60) as events:
            for line in events.iter_lines():
                told.append(line)
                if '"dest": "serving"' in line or '"dest":"serving"' in line:
                    break
        # A token of a reload is known as soon as a worker has it.
        SECRETS["renewed"] = "tiger-umbrella-violin"
        fleet.workers[0]["hf_token"] = SECRETS["renewed"]
        fleet.write()
        assert fleet.post("/fleet/reload").json()["replaced"] == ["a"]
        until(lambda: fleet.seen("a")["starts"] == 1 and fleet.serving("a"))
        assert found_in(command_lines(fleet.process.pid)) == []
        told.append(fleet.get("/fleet/a/logs").text)
        fleet.workers[0]["port"] = SECRETS["renewed"]
        fleet.write()
        told.append(fleet.post("/fleet/reload").text)
    told.append(json.dumps(fleet.lines))
    assert [found for text in told if (found := found_in(text))] == []
