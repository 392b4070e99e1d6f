"""The memory for the KV cache on a CPU, compared before vLLM is imported."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from ichat_lifecycle.adapters import vllm_memory
from ichat_lifecycle.errors import ExitCode, LimitError

NODE = "Node {n} MemTotal: {total} kB\nNode {n} MemFree: {free} kB\nNode {n} SReclaimable: 0 kB\n"
MIB = 1024  # kB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM for CPUs of which nothing can be imported, and a machine with 8 GiB, 4 free."""
    package = tmp_path / "vllm"
    (package / "v1" / "worker").mkdir(parents=True)
    (package / "config").mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "v1" / "worker" / "cpu_worker.py").write_text(
        'raise ValueError(f"is less than desired CPU memory utilization ")'
    )
    (package / "config" / "cache.py").write_text(
        "class CacheConfig:\n    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # its place would be asked for
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0")
    monkeypatch.setattr(vllm_memory, "_SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(vllm_memory, "_PROC", tmp_path / "proc")
    node(tmp_path, 0, total=8192, free=4096)
    return tmp_path


def node(machine: Path, number: int, *, total: int, free: int) -> None:
    """In MiB."""
    directory = machine / "sys" / "devices" / "system" / "node" / f"node{number}"
    directory.mkdir(parents=True)
    text = NODE.format(n=number, total=total * MIB, free=free * MIB)
    (directory / "meminfo").write_text(text)


def test_the_default_fraction_of_too_little_is_an_error_that_names_the_variable(
    machine: Path,
) -> None:
    with pytest.raises(LimitError, match=r"0\.92 of 8\.00 GiB are 7\.36 GiB, and 4\.00") as caught:
        vllm_memory.check(None, None, {})
    assert caught.value.exit_code == ExitCode.SYSTEM_LIMIT
    assert vllm_memory.SPACE_VARIABLE in str(caught.value.hint)


@pytest.mark.parametrize(
    ("fraction", "given", "environ"),
    [
        (0.5, None, {}),
        (None, 1 << 30, {}),
        (None, "1G", {}),
        (None, None, {vllm_memory.SPACE_VARIABLE: "1"}),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_vllm_does_not_refuse_is_not_refused(
    fraction: float | None, given: object, environ: dict[str, str]
) -> None:
    vllm_memory.check(fraction, given, environ)


@pytest.mark.usefixtures("machine")
def test_a_fraction_of_the_users_own_is_compared() -> None:
    with pytest.raises(LimitError, match=r"--gpu-memory-utilization 0\.6 of"):
        vllm_memory.check(0.6, None, {vllm_memory.SPACE_VARIABLE: ""})


def test_one_node_with_enough_is_enough(machine: Path) -> None:
    node(machine, 1, total=8192, free=8000)
    vllm_memory.check(None, None, {})


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_as_the_memory(machine: Path, version: int) -> None:
    group = machine / "sys" / "fs" / "cgroup"
    names = ("memory.max", "memory.current")
    if version == 1:
        group, names = group / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group.mkdir(parents=True)
    (group / names[0]).write_text(f"{2 << 30}\n")
    (group / names[1]).write_text(f"{1 << 20}\n")
    vllm_memory.check(None, None, {})
    (group / names[1]).write_text(f"{1 << 30}\n")
    with pytest.raises(LimitError, match=r"of 2\.00 GiB"):
        vllm_memory.check(None, None, {})


def test_where_it_is_not_known_nothing_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = machine / "vllm" / "v1" / "worker" / "cpu_worker.py"
    worker.write_text("")  # a version that does not compare
    vllm_memory.check(None, None, {})

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", none)  # a vLLM for GPUs
    vllm_memory.check(None, None, {})


def test_without_nodes_the_kernels_own_numbers_count(machine: Path) -> None:
    (machine / "sys" / "devices" / "system" / "node" / "node0" / "meminfo").unlink()
    vllm_memory.check(None, None, {})
    (machine / "proc").mkdir()
    (machine / "proc" / "meminfo").write_text(
        f"MemTotal: {8192 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {1024 * MIB} kB\n"
    )
    with pytest.raises(LimitError, match=r"1\.00 GiB are free"):
        vllm_memory.check(None, None, {})
