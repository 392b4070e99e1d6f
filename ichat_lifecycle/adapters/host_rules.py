"""Warnings at the start of what Kubernetes, systemd, and the kernel will do later on: a probe that
kills a worker in its recovery, and an out-of-memory killer that takes the worker with its engine.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from ichat_lifecycle.adapters.advertise import is_loopback
from ichat_lifecycle.config import Settings

log = structlog.get_logger("ichat_lifecycle")

SYSTEMCTL_TIMEOUT_S = 2.0
_OOM_GROUP = "memory.oom.group"
# Values of OOMPolicy= that end the whole unit.
_ENDS_THE_UNIT = ("stop", "kill")
# What Kubernetes sets for each Service of the namespace, besides its own API.
_SERVICE_LINK = re.compile(r"(?!KUBERNETES_)[A-Z0-9_]+_PORT_[0-9]+_TCP")

Run = Callable[[Sequence[str]], str]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=SYSTEMCTL_TIMEOUT_S,
        check=False,
    )
    return done.stdout


@dataclass(frozen=True)
class Host:
    """Where to look.

    Attributes:
        environ: the process's environment.
        proc: /proc.
        cgroups: where cgroups v2 are mounted.
        account: the token of a Pod's service account.
        run: runs a command and returns what it prints; raises OSError or SubprocessError.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    pid: int = field(default_factory=os.getpid)
    proc: Path = Path("/proc")
    cgroups: Path = Path("/sys/fs/cgroup")
    account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    run: Run = _run

    @property
    def in_kubernetes(self) -> bool:
        """Whether this is a container of a Pod."""
        return "KUBERNETES_SERVICE_HOST" in self.environ or self.account.exists()

    @property
    def cgroup(self) -> str:
        """The path of this process's cgroup v2, from "/"; "" where it has none."""
        try:
            lines = (self.proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return ""
        return next((line[3:] for line in lines if line.startswith("0::")), "")


# Kubernetes ---------------------------------------------------------------------------------------


def warn_of_probes(host: Host, settings: Settings, control_host: str) -> None:
    """Logs one warning of what a Pod's manifest may have to change, if this is a Pod.

    A point is left out if its setting was set, also to its default.
    """
    if host.in_kubernetes:
        points = list(_points(host, settings, control_host))
        if points:
            log.warning("kubernetes", hint="; ".join(points))


def _points(host: Host, settings: Settings, control_host: str) -> Iterator[str]:
    decided = settings.http.model_fields_set
    if is_loopback(control_host):
        yield (
            f"the kubelet cannot reach the probes /livez, /readyz and /startupz on {control_host}:"
            " --control-host 0.0.0.0"
        )
    if "health" not in decided:
        yield (
            "a livenessProbe of /health kills the Pod in a recovery or a sleep: "
            "--set http.health=live, or ready if nothing probes it so"
        )
    if "models" not in decided:
        yield (
            "a readinessProbe of /v1/models passes in DEGRADED and asleep: --set http.models=gated,"
            " or open if nothing probes it so"
        )
    if any(map(_SERVICE_LINK.fullmatch, host.environ)):
        yield (
            "variables of Services are set, and vLLM takes those of one called vllm for its own: "
            "enableServiceLinks: false"
        )


# Out of memory ------------------------------------------------------------------------------------


def warn_of_oom(host: Host) -> None:
    """Logs a warning if running out of memory ends the worker together with its engine."""
    policy = oom_policy(host)
    if policy in _ENDS_THE_UNIT:
        log.warning(
            "oom_ends_all",
            by=f"OOMPolicy={policy} of {_unit(host)}",
            hint="OOMPolicy=continue in the unit: the engine alone is killed, and a new one starts",
        )
        return
    group = oom_group(host)
    if group is not None:
        hint = "set it to 0"
        if host.in_kubernetes:
            hint = "singleProcessOOMKill: true in the kubelet's configuration (Kubernetes 1.32)"
        log.warning(
            "oom_ends_all",
            by=f"{group} is 1",
            hint=f"{hint}: the engine alone is killed, and a new one starts",
        )


def oom_group(host: Host) -> Path | None:
    """The file of the cgroup that the out-of-memory killer takes as one, with this process in it;
    None where it takes processes."""
    path = host.cgroup
    if not path.startswith("/") or ".." in Path(path).parts:
        return None
    inner = host.cgroups / path.lstrip("/")
    for directory in (inner, *inner.parents):
        file = directory / _OOM_GROUP
        try:
            if file.read_text(encoding="ascii").strip() == "1":
                return file
        except (OSError, UnicodeDecodeError):
            pass
        if directory == host.cgroups:
            break
    return None


def oom_policy(host: Host) -> str | None:
    """OOMPolicy= of the unit whose main process this is; None where it is not one, or systemd does
    not answer within SYSTEMCTL_TIMEOUT_S."""
    if host.environ.get("SYSTEMD_EXEC_PID") != str(host.pid) or not _unit(host):
        return None
    user = ["--user"] if "/user@" in host.cgroup else []
    command = ["systemctl", *user, "show", "--property=OOMPolicy", "--value", "--", _unit(host)]
    try:
        return host.run(command).strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _unit(host: Host) -> str:
    """The innermost unit around this process; it may have cgroups below the unit's own."""
    parts = host.cgroup.split("/")
    return next((part for part in reversed(parts) if part.endswith((".service", ".scope"))), "")
