"""Warnings at the start of what Kubernetes, systemd, and the kernel will do later on."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.adapters.host_rules import (
    Host,
    oom_group,
    oom_policy,
    warn_of_oom,
    warn_of_probes,
)
from ichat_lifecycle.config import Settings, load_settings

IN_A_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_PORT_443_TCP": "tcp://10.96.0.1"}
PID = 4711
UNIT = "/system.slice/worker.service"
OF_SYSTEMD = {"SYSTEMD_EXEC_PID": str(PID), "INVOCATION_ID": "x"}


class Machine:
    """Files as Linux has them, and a systemctl."""

    def __init__(self, directory: Path, cgroup: str = "/", policy: str = "") -> None:
        self.proc, self.cgroups = directory / "proc", directory / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/cgroup").write_text(f"1:name=systemd:/old\n0::{cgroup}\n")
        self.cgroups.mkdir()
        self.account = directory / "token"
        self.policy = policy
        self.commands: list[Sequence[str]] = []

    def group(self, cgroup: str, value: str) -> None:
        path = self.cgroups / cgroup.lstrip("/")
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.oom.group").write_text(f"{value}\n")

    def run(self, command: Sequence[str]) -> str:
        self.commands.append(command)
        return f"{self.policy}\n"

    def host(self, environ: Mapping[str, str] | None = None, **more: Any) -> Host:
        places = (self.proc, self.cgroups, self.account)
        return Host(environ or {}, PID, *places, more.get("run", self.run))


def probes(host: Host, settings: Settings | None = None, control: str = "127.0.0.1") -> str:
    """The hint; "" where there is no warning."""
    with capture_logs() as logs:
        warn_of_probes(host, settings or Settings(), control)
    assert len(logs) <= 1, "one warning, not a wall"
    return str(logs[0]["hint"]) if logs else ""


def oom(host: Host) -> tuple[str, str]:
    """Whose rule it is, and the hint; "" where there is no warning."""
    with capture_logs() as logs:
        warn_of_oom(host)
    assert len(logs) <= 1
    return (logs[0]["by"], logs[0]["hint"]) if logs else ("", "")


# --- Kubernetes


def test_a_pod_with_all_defaults_is_told_what_will_bite(tmp_path: Path) -> None:
    hint = probes(Machine(tmp_path).host(IN_A_POD))
    for words in ("--control-host 0.0.0.0", "http.health=live", "http.models=gated"):
        assert words in hint
    assert "enableServiceLinks" not in hint, "its own API is not a Service of the namespace"


def test_a_pod_is_also_known_by_its_service_account(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert probes(machine.host()) == ""
    machine.account.write_text("x")
    assert probes(machine.host())


@pytest.mark.parametrize("control", ["0.0.0.0", "::", "10.0.0.7"])
def test_a_pod_whose_control_plane_can_be_probed_is_warned_of_a_charts_own_probes(
    tmp_path: Path, control: str
) -> None:
    host = Machine(tmp_path).host(IN_A_POD)
    hint = probes(host, control=control)
    assert "--control-host" not in hint
    assert "/health kills the Pod" in hint
    assert "/v1/models passes" in hint
    decided = load_settings(None, ["http.health=ready", "http.models=open"])
    assert probes(host, decided, control=control) == ""


@pytest.mark.parametrize("value", ["live", "ready"])
def test_what_somebody_has_decided_is_not_warned_about(tmp_path: Path, value: str) -> None:
    settings = load_settings(None, [f"http.health={value}", "http.models=open"])
    hint = probes(Machine(tmp_path).host(IN_A_POD), settings)
    assert "http." not in hint
    assert "--control-host" in hint


def test_services_of_the_namespace_are_warned_about(tmp_path: Path) -> None:
    environ = {**IN_A_POD, "VLLM_PORT_8000_TCP": "tcp://10.96.0.9:8000"}
    assert "enableServiceLinks: false" in probes(Machine(tmp_path).host(environ), control="::")


# --- out of memory: the cgroup


def test_a_cgroup_that_is_killed_as_one_is_warned_about(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.group("/", "1")  # as a container sees its own
    by, hint = oom(machine.host())
    assert by == f"{machine.cgroups}/memory.oom.group is 1"
    assert "the engine alone" in hint
    assert "singleProcessOOMKill: true" in oom(machine.host(IN_A_POD))[1]


def test_so_is_one_around_it(tmp_path: Path) -> None:
    """The kernel takes the outermost one."""
    machine = Machine(tmp_path, cgroup="/a/b/c")
    machine.group("/a", "1")
    machine.group("/a/b/c", "0")
    assert oom_group(machine.host()) == machine.cgroups / "a/memory.oom.group"


@pytest.mark.parametrize("cgroup", ["/a/b", "/", "/../b", ""])
def test_a_cgroup_that_is_not_or_cannot_be_read_is_no_warning(tmp_path: Path, cgroup: str) -> None:
    machine = Machine(tmp_path, cgroup=cgroup)
    machine.group("/a", "0")
    machine.group("/other", "1")
    assert oom(machine.host()) == ("", "")


def test_without_cgroups_there_is_no_warning(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    host = Host({}, PID, nowhere, nowhere, nowhere)
    assert oom(host) == ("", "")
    assert probes(host) == ""


# --- out of memory: systemd


@pytest.mark.parametrize("policy", ["stop", "kill"])
def test_a_unit_that_ends_as_one_is_warned_about(tmp_path: Path, policy: str) -> None:
    machine = Machine(tmp_path, UNIT, policy)
    machine.group(UNIT, "1")  # what systemd sets for `kill`: one warning is enough
    by, hint = oom(machine.host(OF_SYSTEMD))
    assert by == f"OOMPolicy={policy} of worker.service"
    assert "OOMPolicy=continue" in hint
    assert machine.commands == [
        ["systemctl", "show", "--property=OOMPolicy", "--value", "--", "worker.service"]
    ]


def test_a_unit_that_goes_on_is_not(tmp_path: Path) -> None:
    assert oom(Machine(tmp_path, UNIT, "continue").host(OF_SYSTEMD)) == ("", "")


def test_only_the_main_process_of_a_unit_asks(tmp_path: Path) -> None:
    """A shell within a unit has the same variables, and so does a worker of a fleet."""
    machine = Machine(tmp_path, UNIT, "stop")
    assert oom_policy(machine.host({**OF_SYSTEMD, "SYSTEMD_EXEC_PID": "1"})) is None
    assert oom_policy(machine.host()) is None
    assert machine.commands == []


def test_a_users_unit_is_asked_for_at_the_users_manager(tmp_path: Path) -> None:
    cgroup = "/user.slice/user-1000.slice/user@1000.service/app.slice/worker.service/inner"
    machine = Machine(tmp_path, cgroup, "stop")
    assert oom_policy(machine.host(OF_SYSTEMD)) == "stop"
    assert machine.commands[0][:2] == ["systemctl", "--user"]
    assert machine.commands[0][-1] == "worker.service"


@pytest.mark.parametrize(
    "error", [FileNotFoundError("systemctl"), subprocess.TimeoutExpired("systemctl", 2)]
)
def test_a_systemd_that_does_not_answer_is_no_warning(tmp_path: Path, error: Exception) -> None:
    def run(command: Sequence[str]) -> str:
        raise error

    assert oom(Machine(tmp_path, UNIT).host(OF_SYSTEMD, run=run)) == ("", "")
