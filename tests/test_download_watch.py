"""How far a download has come, by files as huggingface_hub leaves them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ichat_lifecycle.adapters.download_watch import Download, DownloadMeter, repository_directory

MB = 10**6


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Repository:
    """`models--org--name` of a cache."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "models--org--name"
        self.clock = Clock()
        self.meter = DownloadMeter(self.directory, self.clock)

    def blob(self, name: str, size: int) -> None:
        path = self.directory / "blobs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)

    def index(self, text: str) -> None:
        snapshot = self.directory / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors.index.json").write_text(text)

    def whole(self, name: str) -> None:
        blobs = self.directory / "blobs"
        (blobs / f"{name}.incomplete").rename(blobs / name)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_nothing_is_downloaded(repository: Repository) -> None:
    """Not even begun, and all of it there."""
    assert repository.meter.look() is None
    repository.blob("abc", MB)
    assert repository.meter.look() is None


def test_bytes_rate_and_time_left(repository: Repository) -> None:
    repository.index(json.dumps({"metadata": {"total_size": 10 * MB}}))
    repository.blob("one", MB)
    repository.blob("two.incomplete", MB)
    first = repository.meter.look()
    assert first is not None
    assert (first.bytes, first.fraction, first.eta_s) == (2 * MB, 0.2, None)
    repository.clock.now_s += 2
    repository.blob("two.incomplete", 4 * MB)
    found = repository.meter.look()
    assert found is not None
    assert found.as_dict() == {
        "bytes": 5 * MB,
        "total_bytes": 10 * MB,
        "bytes_per_s": 1_500_000,
        "eta_s": 3.3,
        "text": "5.0 of 10.0 MB, 1.5 MB/s, about 3 s left",
    }
    repository.whole("two")
    assert repository.meter.look() is None


def test_the_rate_is_that_of_the_last_seconds(repository: Repository) -> None:
    repository.blob("one.incomplete", 0)
    for size in (MB, 2 * MB, 2 * MB, 2 * MB):
        repository.meter.look()
        repository.clock.now_s += 10
        repository.blob("one.incomplete", size)
    found = repository.meter.look()
    assert found is not None
    assert found.bytes_per_s == 0
    assert str(found) == "2.0 MB, 0.0 kB/s"


def test_holes_are_no_bytes(repository: Repository) -> None:
    """A file that is written in several places at once has its full size from the beginning."""
    repository.blob("one.incomplete", 0)
    os.truncate(repository.directory / "blobs" / "one.incomplete", 100 * MB)
    found = repository.meter.look()
    assert found is not None
    assert found.bytes < MB


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"metadata": 5}',
        '{"metadata": {"total_size": "9"}}',
        '{"metadata": {"total_size": -1}}',
        '{"metadata": {"total_size": true}}',
        "[" * 100_000,
    ],
    ids=["empty", "list", "none", "number", "text", "negative", "bool", "deep"],
)
def test_a_hubs_index_is_data(repository: Repository, index: str) -> None:
    """One that makes no sense is no total, and no end of the load."""
    repository.index(index)
    repository.blob("one.incomplete", MB)
    found = repository.meter.look()
    assert found is not None
    assert (found.total_bytes, found.fraction, found.eta_s) == (None, None, None)


def test_more_than_the_total_is_all_of_it() -> None:
    """The configuration and the tokenizer are there, too."""
    assert Download(11, 10, 1.0).fraction == 1.0
    assert Download(11, 10, 1.0).eta_s == 0.0


def test_where_a_model_of_a_hub_goes(tmp_path: Path) -> None:
    found = repository_directory("org/name", str(tmp_path))
    assert found == tmp_path / "models--org--name"
    assert repository_directory("gpt2", str(tmp_path)) == tmp_path / "models--gpt2"
    for local in ("", str(tmp_path), "/no/such/model", "a/b/c"):
        assert repository_directory(local, str(tmp_path)) is None
