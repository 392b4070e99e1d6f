"""The unit of systemd that we ship: it is valid, hardened, and lets the worker do its work."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

from tools import of_the_system

UNIT = Path(__file__).parent.parent / "configs" / "ichat-lifecycle-worker.service"
EXPOSURE_MAX = 2.0


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key].append(value)
    return found


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    program = of_the_system("systemd-analyze", "systemd")
    return subprocess.run(
        [program, *words], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_engine_alone_is_lost_when_memory_runs_out() -> None:
    assert settings()["OOMPolicy"] == ["continue"]


def test_nothing_that_vllm_needs_is_taken_away() -> None:
    """Each of these would break it: code that is made while it runs, devices, /proc, a network."""
    found = settings()
    for key in ("MemoryDenyWriteExecute", "PrivateDevices", "ProcSubset", "PrivateNetwork"):
        assert key not in found
    assert {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} <= set(
        found["RestrictAddressFamilies"][0].split()
    )
    assert any(value.startswith("char-nvidia ") for value in found["DeviceAllow"])


def test_what_is_written_has_a_place() -> None:
    found = settings()
    variables = " ".join(found["Environment"])
    assert found["ProtectSystem"] == ["strict"]
    assert f"HOME=/var/lib/{found['StateDirectory'][0]}" in variables
    assert f"XDG_CACHE_HOME=/var/cache/{found['CacheDirectory'][0]}" in variables


def test_the_unit_is_valid(tmp_path: Path) -> None:
    """With a program that is there."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub("^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    done = analyze("verify", "--man=no", str(copy))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_is_hardened() -> None:
    """9.6, "unsafe", without any of it."""
    done = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= EXPOSURE_MAX
