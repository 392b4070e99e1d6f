"""A whole fleet, with real processes, sockets and HTTP; only the engines are fakes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pexpect
import psutil
import pytest
import yaml
from gateway import running_gateway
from running_fleet import LOOPBACK, PROGRAM, TOKEN, RunningFleet, free_ports
from waiting import until

from ichat_lifecycle.testing.nasty_yaml import BOMBS

pytestmark = pytest.mark.fleet


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_two_models_serve_one_is_killed_and_comes_back_while_the_other_serves(
    tmp_path: Path,
) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}) as fleet:
        fleet.wait_until_ready()
        assert [fleet.ask(name).json()["model"] for name in "ab"] == ["a", "b"]
        first = fleet.seen("a")["pid"]
        with fleet.asked_all_the_time("b") as other, fleet.asked_all_the_time("a") as own:
            kill(first)
            until(lambda: fleet.seen("a")["starts"] == 2 and fleet.serving("a"))
        assert set(other.counts) == {"200"}
        # What was under way on the killed worker is lost; nothing is refused, nothing hangs.
        assert set(own.counts) <= {"200", "503", "ConnectionResetError", "IndexError"}
        assert own.counts["503"] > 0
        assert own.counts["ConnectionResetError"] + own.counts["IndexError"] <= 3
        assert fleet.ask("a").json()["pid"] != first
        (back,) = [line for line in fleet.events("worker") if line.get("dest") == "backing_off"]
        assert back["cause"] == "killed by signal 9"
    assert fleet.process.returncode == 0


def test_a_reload_touches_only_what_differs_and_refuses_nobody(tmp_path: Path) -> None:
    workers = ({"model_name": "same"}, {"model_name": "after"}, {"model_name": "gone"})
    with RunningFleet(tmp_path, *workers, {"model_name": "before", "replace": "before"}) as fleet:
        fleet.wait_until_ready()
        pids = {name: fleet.seen(name)["pid"] for name in ("same", "after", "before")}
        same, after, gone, before = fleet.workers
        for changed in (after, before):
            changed["seed"] = 7
        fleet.workers = [same, after, before, fleet.worker("new")]
        fleet.write()
        with (
            fleet.asked_all_the_time("same") as of_same,
            fleet.asked_all_the_time("after") as of_after,
            fleet.asked_all_the_time("before") as of_before,
        ):
            fleet.process.send_signal(signal.SIGHUP)
            until(lambda: fleet.events("reload"))
            until(lambda: len(fleet.get("/fleet").json()["workers"]) == 4)
            until(lambda: fleet.seen("before")["pid"] != pids["before"] and fleet.ready())
        assert set(of_same.counts) == {"200"}
        assert set(of_after.counts) == {"200", "503"}
        assert set(of_before.counts) == {"200"}
        assert fleet.seen("same")["pid"] == pids["same"]
        assert fleet.seen("after")["pid"] != pids["after"]
        assert fleet.ask("new").json()["model"] == "new"
        assert fleet.get("/fleet/gone").status_code == 404
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, gone["port"])).close()
        assert "--seed" in words(fleet, "before")
    assert fleet.process.returncode == 0


def words(fleet: RunningFleet, name: str) -> list[str]:
    """What vLLM's parser would have got, of the last start."""
    found = [line["words"] for line in fleet.events("words") if line["worker"] == name]
    return list(found[-1])


def test_a_bad_file_changes_nothing_and_says_why(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}) as fleet:
        fleet.wait_until_ready()
        pid = fleet.seen("a")["pid"]
        fleet.workers[0]["port"] = "high"
        fleet.write()
        answer = fleet.post("/fleet/reload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "bad_file")
        (problem,) = answer.json()["problems"]
        assert problem.startswith(f"{fleet.file}:")
        assert problem.endswith("port: input should be a valid integer (it is 'high')")
        assert fleet.seen("a")["pid"] == pid
        assert fleet.events("reload_failed")[0]["problems"] == [problem]


@pytest.mark.parametrize("name", ["merges of nothing", "text"])
def test_a_file_that_is_a_trap_changes_nothing_and_the_next_one_is_read(
    tmp_path: Path, name: str
) -> None:
    """A pipe hung the reload for ever, a bomb for hours: no corrected file could be loaded."""
    with RunningFleet(tmp_path, {"model_name": "a"}) as fleet:
        fleet.wait_until_ready()
        pid = fleet.seen("a")["pid"]
        fleet.file.unlink()
        os.mkfifo(fleet.file)
        assert "a pipe, not a file" in fleet.post("/fleet/reload").json()["error"]["message"]
        fleet.file.unlink()
        fleet.file.write_text(BOMBS[name])
        answer = fleet.post("/fleet/reload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "bad_file")
        fleet.workers.append(fleet.worker("b"))
        fleet.write()
        assert fleet.post("/fleet/reload").status_code == 202
        until(lambda: fleet.serving("b"))
        assert fleet.seen("a")["pid"] == pid
        assert psutil.Process(fleet.process.pid).memory_info().rss < 250 * 2**20
    assert fleet.process.returncode == 0


def test_the_supervisor_answers_while_no_worker_does(tmp_path: Path) -> None:
    slow = {"FLEET_LOAD_S": "600"}
    with RunningFleet(tmp_path, {"model_name": "a", "env": slow}) as fleet:
        answer = fleet.ask("a")
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        until(lambda: fleet.seen("a")["state"] == "BOUND")
        assert fleet.ask("a").json()["error"]["state"] == "BOUND"
        fleet.post("/fleet/a/stop")
        until(lambda: fleet.process.poll() is not None)


def test_a_start_that_cannot_succeed_is_given_up_with_its_cause(tmp_path: Path) -> None:
    bad = {"model_name": "bad", "env": {"FLEET_FAILS": "66"}}
    with RunningFleet(tmp_path, bad, {"model_name": "good"}) as fleet:
        until(lambda: fleet.seen("bad")["stage"] == "given_up")
        until(lambda: fleet.serving("good"))
        assert fleet.seen("bad")["reason"] == "ended with 66: as it was told to"
        answer = fleet.ask("bad")
        assert answer.json()["error"]["state"] == "given_up"
        assert "as it was told to" in answer.json()["error"]["message"]
        assert fleet.get("/readyz").status_code == 503
    assert fleet.process.returncode == 66


def test_an_absent_workers_port_keeps_the_workers_names(tmp_path: Path) -> None:
    named = {"lifecycle": {"http": {"hosts": ["models.corp"]}}}
    bad = {"model_name": "bad", "env": {"FLEET_FAILS": "66"}, **named}
    with RunningFleet(tmp_path, bad, {"model_name": "good"}) as fleet:
        until(lambda: fleet.seen("bad")["stage"] == "given_up")
        url = f"http://127.0.0.1:{fleet.port('bad')}/v1/models"
        answers = {
            name: httpx.get(url, headers={"Host": name}, timeout=60, trust_env=False)
            for name in ("localhost", "models.corp", "evil.example")
        }
        assert {name: answer.status_code for name, answer in answers.items()} == {
            "localhost": 503,
            "models.corp": 503,
            "evil.example": 421,
        }
        assert "as it was told to" in answers["models.corp"].text


def test_workers_register_at_the_gateway_that_runs(tmp_path: Path) -> None:
    """It is found where `server_settings` has it listen. A name that is taken is no worker's."""
    with running_gateway() as gateway:
        gateway.owners["rival"] = "somebody else"
        server = {"host": "0.0.0.0", "port": gateway.server_port, "heartbeat_timeout": 1}
        quick = {"model_name": "a", "heartbeat_interval": 0.2}
        with RunningFleet(
            tmp_path, quick, {"model_name": "rival"}, server_settings=server
        ) as fleet:
            until(lambda: fleet.seen("rival")["stage"] == "given_up")
            assert "another live worker serves its model name" in fleet.seen("rival")["reason"]
            until(lambda: fleet.serving("a"))
            until(lambda: "ready" in gateway.states("a"))
            # One that is started again is the same worker to the Gateway.
            kill(fleet.seen("a")["pid"])
            until(lambda: fleet.seen("a")["starts"] == 2 and fleet.serving("a"))
            gateway.silent.set()
            count = len(gateway.beats)
            until(lambda: len(gateway.beats) > count)
            assert fleet.ask("a").status_code == 200, "a Gateway that hangs harms nobody"
            gateway.closing.set()
            gateway.silent.clear()
        assert gateway.states("a") == ["initializing", "ready", "terminating"]
    assert fleet.process.returncode == 69


def test_a_successor_takes_its_place_at_the_gateway_once_it_is_ready(tmp_path: Path) -> None:
    with running_gateway() as gateway:
        server = {"gateway_address": gateway.address}
        worker = {"model_name": "a", "replace": "before", "heartbeat_interval": 3600}
        with RunningFleet(tmp_path, worker, server_settings=server) as fleet:
            fleet.wait_until_ready()
            until(lambda: "ready" in gateway.states("a"))
            count = len(gateway.beats)
            first = fleet.seen("a")["pid"]
            fleet.workers[0]["seed"] = 1
            fleet.write()
            fleet.post("/fleet/reload")
            until(lambda: fleet.seen("a")["pid"] != first and not psutil.pid_exists(first))
            until(lambda: gateway.beats[-1]["state"] == "ready")
            said = [beat["state"] for beat in gateway.beats[count:]]
            # The former one says goodbye, maybe first; the new one not a word before it is ready.
            assert set(said) <= {"ready", "terminating"}
            assert len({beat["worker_id"] for beat in gateway.beats}) == 1


def test_commands_for_one_worker(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}) as fleet:
        fleet.wait_until_ready()
        assert fleet.post("/fleet/a/stop", token=None).status_code == 401
        assert fleet.post("/fleet/a/stop", token="guess").status_code == 401
        assert fleet.post("/fleet/nobody/stop").status_code == 404
        assert fleet.post("/fleet/a/stop").status_code == 202
        until(lambda: fleet.seen("a")["stage"] == "stopped")
        assert fleet.ask("a").json()["error"]["state"] == "stopped"
        assert fleet.post("/fleet/a/restart").status_code == 202
        until(lambda: fleet.serving("a", "b"))
        # The worker's own routes, with its own token.
        assert fleet.get("/fleet/a/lifecycle").json()["state"] == "READY"
        assert fleet.post("/fleet/a/lifecycle/engine/sleep").status_code == 200
        until(lambda: fleet.seen("a")["state"] == "DEGRADED")
        assert fleet.post("/fleet/a/lifecycle/engine/wake").status_code == 200
        until(lambda: fleet.seen("a")["state"] == "READY")
        assert fleet.post("/fleet/stop").status_code == 202
        assert fleet.process.wait(60) == 0


def test_events_and_logs_go_on(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}) as fleet:
        fleet.wait_until_ready()
        seen = []
        with httpx.stream("GET", f"{fleet.url}/fleet/events", timeout=60) as events:
            for line in events.iter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line.removeprefix("data: ")))
                if seen and seen[-1].get("dest") == "serving":
                    break
        states = [event["state"] for event in seen if event["event"] == "state"]
        assert states == ["PARSED", "BOUND", "ENGINE_UP", "SERVING", "READY"]
        stages = [event["dest"] for event in seen if event["event"] == "worker"]
        assert stages == ["starting", "serving"]
        with httpx.stream("GET", f"{fleet.url}/fleet/a/events/../lifecycle/events") as own:
            assert own.status_code in (200, 404)
        lines = fleet.get("/fleet/a/logs").text.splitlines()
        assert "no JSON" in lines
        with httpx.stream("GET", f"{fleet.url}/fleet/a/logs?follow=true", timeout=60) as logs:
            fleet.post("/fleet/a/stop")
            assert any('"STOPPED"' in line for line in logs.iter_lines())


def test_kill_9_of_the_supervisor_leaves_no_worker(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}) as fleet:
        fleet.wait_until_ready()
        pids = fleet.pids
        fleet.process.kill()
        until(lambda: not any(map(psutil.pid_exists, pids)), within_s=30)


def test_workers_finish_what_runs_after_kill_9_of_the_supervisor(tmp_path: Path) -> None:
    """The kernel sends them SIGTERM once for each thread of it: that is one request to stop."""
    worker = {"model_name": "a", "env": {"FLEET_STREAM_S": "3"}}
    with RunningFleet(tmp_path, worker) as fleet:
        fleet.wait_until_ready()
        assert psutil.Process(fleet.process.pid).num_threads() > 1, "else it proves nothing"
        with ThreadPoolExecutor() as pool:
            asking = pool.submit(fleet.ask, "a")
            until(lambda: fleet.seen("a")["lifecycle"]["in_flight"])
            fleet.process.kill()
            assert asking.result().status_code == 200
        until(lambda: not any(map(psutil.pid_exists, fleet.pids)), within_s=30)


def test_kill_9_in_the_middle_of_the_starts_leaves_no_worker(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}, {"model_name": "b"}) as fleet:
        pids = until(lambda: len(fleet.pids) == 2 and fleet.pids)
        fleet.process.kill()
        until(lambda: not any(map(psutil.pid_exists, pids)), within_s=30)


def test_ctrl_c_stops_all_and_finishes_what_runs(tmp_path: Path) -> None:
    slow = {"FLEET_STREAM_S": "1"}
    with RunningFleet(tmp_path, {"model_name": "a", "env": slow}) as fleet:
        fleet.wait_until_ready()
        with fleet.asked_all_the_time("a") as asked:
            until(lambda: sum(asked.counts.values()) > 10)
            fleet.process.send_signal(signal.SIGINT)
            until(lambda: fleet.process.poll() is not None)
        assert fleet.process.returncode == 0
        # In the end the socket is closed: until then everybody has an answer.
        gone = {"ConnectionRefusedError", "ConnectionResetError"}
        assert set(asked.counts) <= {"200", "503", *gone}
        assert asked.counts["ConnectionResetError"] <= 5  # what was waiting when it was closed
        assert asked.counts["503"] > 0


def test_a_taken_port_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        workers = [{"model_name": "a"}, {"model_name": "b", "port": taken.getsockname()[1]}]
        with RunningFleet(tmp_path, *workers) as fleet:
            assert fleet.process.wait(60) == 69
    assert fleet.pids == []
    assert any("is taken" in line.get("text", "") for line in fleet.lines)


def test_a_default_control_port_that_is_taken_gives_way(tmp_path: Path) -> None:
    """The worker's and the supervisor's: any client of this machine may have these ports."""
    with contextlib.ExitStack() as stack:
        ports = [_port_with_a_taken_default(stack) for _ in range(2)]
        worker = {"model_name": "a", "port": ports[0], "control_port": None}
        sections = {"server_settings": {"port": ports[1]}, "fleet": {"token": TOKEN}}
        with RunningFleet(tmp_path, worker, **sections) as fleet:
            fleet.wait_until_ready()
            control = fleet.seen("a")["control_url"]
            assert httpx.get(f"{control}/readyz", trust_env=False).status_code == 200
            assert not control.endswith(f":{ports[0] + 10_000}")
            (worker_line,) = fleet.events("control_port_taken")
            (fleet_line,) = fleet.events("fleet_port_taken")
    assert worker_line["wanted"] == ports[0] + 10_000
    assert fleet_line["wanted"] == ports[1] + 10_000
    assert fleet.process.returncode == 0


def _port_with_a_taken_default(stack: contextlib.ExitStack) -> int:
    """A free port; somebody else listens at the one that is 10000 higher."""
    while True:
        taken = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        port: int = taken.getsockname()[1] - 10_000
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port


def test_a_bad_file_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "configs.yaml"
    path.write_text("managed_workers: [{model_name: a}]")
    done = subprocess.run(
        [sys.executable, PROGRAM, path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [  # the first one says that it is read
        f"{path}:1:19: a: model_path is missing",
        f"{path}:1:19: a: port is missing",
        f"ichat-lifecycle: error: {path}: 2 problems",
    ]


@pytest.mark.parametrize("where", ["port", "uds"])
def test_without_a_token_the_same_user_may_command(tmp_path: Path, where: str) -> None:
    """The command line finds the fleet, and the token that it keeps for its user."""
    address = {"port": 0} if where == "port" else {"uds": str(tmp_path / "fleet.sock")}
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ichat_lifecycle", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=environment
        )

    fleet = RunningFleet(tmp_path, {"model_name": "a"}, fleet=address)
    os.environ["XDG_STATE_HOME"] = str(tmp_path)
    try:
        with fleet:
            fleet.wait_until_ready()
            (kept,) = tmp_path.glob("ichat-lifecycle/fleets/*.token")
            assert kept.stat().st_mode & 0o777 == 0o600
            if where == "uds":
                assert (tmp_path / "fleet.sock").stat().st_mode & 0o777 == 0o600
            assert fleet.post("/fleet/a/restart", token=TOKEN).status_code == 401
            assert "a     serving  READY" in run("status").stdout
            ours = ("--fleet", fleet.url)  # others may run on this machine
            assert run("restart", *ours, "a").returncode == 0
            until(lambda: fleet.seen("a")["starts"] == 2 and fleet.serving("a"))
            assert "no JSON" in run("logs", *ours, "a").stdout
            fleet.workers[0]["seed"] = 1
            fleet.write()
            assert run("reload", *ours).stdout == "replaced a\n"
            assert run("restart", *ours, "nobody").stderr.startswith(
                "ichat-lifecycle: error: nobody: no such worker; hint: there is: a"
            )
        assert not kept.exists()
    finally:
        del os.environ["XDG_STATE_HOME"]
    assert yaml.safe_load(fleet.file.read_text())["managed_workers"][0]["seed"] == 1


def test_a_command_to_nobody_is_an_error_in_words(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for words in (["logs", "a"], ["restart", "a"], ["reload"]):
        command = [sys.executable, "-m", "ichat_lifecycle", *words, "--fleet", f"{LOOPBACK}:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 69
        nothing = f"ichat-lifecycle: error: nothing listens at http://{LOOPBACK}:{port}"
        assert done.stderr.startswith(nothing)


def test_in_a_terminal_there_is_a_table_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    bad = {"model_name": "bad", "env": {"FLEET_FAILS": "2"}}
    RunningFleet(tmp_path, {"model_name": "good"}, bad).write()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    for size in ("COLUMNS", "LINES"):  # somebody else's terminal
        environment.pop(size, None)
    command = [str(PROGRAM), str(tmp_path / "configs.yaml")]
    with pexpect.spawn(
        sys.executable, command, env=environment, dimensions=(40, 160), encoding="utf-8", timeout=60
    ) as terminal:
        terminal.expect(r"good[^\n]* serving[^\n]* READY")
        terminal.expect(r"bad[^\n]*given up[^\n]*ended with 2: as it was told to")
        terminal.sendintr()
        terminal.expect(r"good[^\n]* stopped[^\n]*\n[^\n]*bad[^\n]*given up")
        terminal.expect(pexpect.EOF)
    assert terminal.wait() == 2


def test_nobody_has_to_read_what_it_prints(tmp_path: Path) -> None:
    """As in `up FILE 2>&1 | less`."""
    chatty = {"model_name": "a", "env": {"FLEET_CHATTER": "50000"}}
    fleet = RunningFleet(tmp_path, chatty, fleet={"port": free_ports(1)[0], "token": TOKEN})
    fleet.write()
    fleet.url = f"http://{LOOPBACK}:{fleet.sections['fleet']['port']}"
    process = subprocess.Popen([*fleet.program, str(fleet.file)], stderr=subprocess.PIPE)

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return fleet.ready()
        return False

    try:
        until(answers)
        kill(fleet.seen("a")["pid"])
        until(lambda: fleet.seen("a")["starts"] == 2 and fleet.ready())
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_worker_that_hangs_is_killed_and_comes_back(tmp_path: Path) -> None:
    silent_s = 12  # a worker's first word takes seconds where others want its core
    settings = {"port": 0, "token": TOKEN, "watchdog": silent_s}
    with RunningFleet(tmp_path, {"model_name": "a"}, fleet=settings) as fleet:
        fleet.wait_until_ready()
        first = fleet.seen("a")["pid"]
        os.kill(first, signal.SIGSTOP)
        until(lambda: fleet.seen("a")["starts"] == 2 and fleet.serving("a"))
        (back,) = [line for line in fleet.events("worker") if line.get("dest") == "backing_off"]
        assert back["cause"] == f"killed by signal 9: it has told nothing for {silent_s} s"


def test_what_cannot_change_while_it_runs_is_told(tmp_path: Path) -> None:
    with RunningFleet(tmp_path, {"model_name": "a"}) as fleet:
        fleet.sections["fleet"]["token"] = "another"
        fleet.write()
        assert fleet.post("/fleet/reload").status_code == 202
        (line,) = until(lambda: fleet.events("not_applied"))
        assert line["keys"] == ["fleet.token"]
        assert fleet.post("/fleet/reload", token="another").status_code == 401
