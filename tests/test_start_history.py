"""How long earlier starts took: kept, limited, and harmless when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.start_history import (
    KEYS_KEPT,
    STARTS_KEPT,
    Expected,
    StartHistory,
    default_path,
    key_of,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "starts.json"


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([], None),
        ([10], 10),
        ([10, 20], 15),
        ([10, 20, 900], 20),
        ([1, 1, 1, 30, 30, 30, 30, 30], 30),
        ([1.004, 1.006], 1.0),
    ],
)
def test_the_median_of_the_newest(path: Path, starts: list[float], expected: float | None) -> None:
    """One slow start does not spoil it, and old ones are forgotten."""
    for seconds in starts:
        StartHistory(path).record("model", seconds)
    found = StartHistory(path).expected("model")
    kept = min(len(starts), STARTS_KEPT)
    assert found == (None if expected is None else Expected(expected, kept))


def test_each_model_has_its_own(path: Path) -> None:
    history = StartHistory(path)
    history.record("a", 1)
    history.record("b", 9)
    assert (history.expected("a"), history.expected("b")) == (Expected(1, 1), Expected(9, 1))
    assert history.expected("c") is None


def test_starts_are_alike_with_the_same_arguments_in_any_order() -> None:
    argv = ["--model-path", "/m", "--dtype=auto", "--enforce-eager", "--lora", "a", "b"]
    key = key_of("/m", argv)
    again = ["--enforce-eager", "--lora", "a", "b", "--dtype=auto", "--model-path", "/m"]
    elsewhere = ["--port", "8001", "--host=0.0.0.0", "--api-key", "secret", *argv, "--uds", "/s"]
    assert key == key_of("/m", again) == key_of("/m", elsewhere)
    others = (
        ("/other", argv),
        ("/m", argv[:-1]),
        ("/m", [*argv, "--tensor-parallel-size", "2"]),
        ("/m", [word.replace("auto", "half") for word in argv]),
    )
    assert len({key, *(key_of(model, words) for model, words in others)}) == 1 + len(others)
    assert "secret" not in key_of("/m", ["--hf-token", "secret"])


def test_it_does_not_grow_without_limit(path: Path) -> None:
    """The model that was started longest ago is forgotten first."""
    path.parent.mkdir()
    path.write_text(json.dumps({f"m{i}": [1.0] * STARTS_KEPT for i in range(KEYS_KEPT)}))
    history = StartHistory(path)
    history.record("m0", 2)
    history.record("new", 3)
    known = json.loads(path.read_text())
    assert len(known) == KEYS_KEPT
    assert "m1" not in known and "m0" in known
    assert len(known["m0"]) == STARTS_KEPT
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"model": 5}', '{"model": ["soon"]}', '{"model": []}', "\xff\x00"],
)
def test_a_damaged_file_is_no_history(path: Path, text: str) -> None:
    """Nothing is expected, and the next start repairs it."""
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    history = StartHistory(path)
    assert history.expected("model") is None
    history.record("model", 4)
    assert history.expected("model") == Expected(4, 1)


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/cache")
    assert default_path() == Path("/tmp/cache/ichat-lifecycle/starts.json")


@pytest.mark.parametrize("obstacle", ["file for a directory", "directory for a file"])
def test_a_place_that_cannot_be_written_costs_a_warning(path: Path, obstacle: str) -> None:
    """Root may write anywhere, so not permissions, but what nobody can overwrite."""
    if obstacle == "file for a directory":
        path.parent.write_text("")
    else:
        path.mkdir(parents=True)
    history = StartHistory(path)
    with capture_logs() as logs:
        history.record("model", 4)
    assert [entry["event"] for entry in logs] == ["start_history_unwritable"]
    assert logs[0]["log_level"] == "warning"
    assert history.expected("model") is None
