"""Our own flags in vLLM's `--config` file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ichat_lifecycle.cli import _with_config_file, build_parser
from ichat_lifecycle.errors import ArgumentsError


def given(tmp_path: Path, text: str, *typed: str) -> dict[str, object]:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    words = [*typed, "--config", str(path)]
    _, rest = build_parser().parse_known_args(["serve", *words])
    return vars(_with_config_file(words, rest))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("control-port: 9000", "control_port", 9000),
        ("control_port: 9000", "control_port", 9000),
        ("control-host: 0.0.0.0", "control_host", "0.0.0.0"),
        ("grace-period: 90", "grace_period", 90.0),
        ("lifecycle-log-format: json", "lifecycle_log_format", "json"),
        ("set: stop.drain=40", "set", ["stop.drain=40"]),
        (
            "set: [stop.drain=40, warm_up.requests=0]",
            "set",
            ["stop.drain=40", "warm_up.requests=0"],
        ),
        ("gateway-address: null", "gateway_address", None),
        ("port: 9000", "control_port", None),
    ],
)
def test_they_count(tmp_path: Path, text: str, name: str, value: object) -> None:
    found = given(tmp_path, text)
    assert (found[name], callable(found["run"])) == (value, True)


@pytest.mark.parametrize("typed", ["127.0.0.1", "10.0.0.1"])
def test_what_was_typed_wins_even_if_it_is_the_default(tmp_path: Path, typed: str) -> None:
    found = given(tmp_path, "control-host: 0.0.0.0", "--control-host", typed)
    assert found["control_host"] == typed


def test_typed_assignments_come_last(tmp_path: Path) -> None:
    found = given(tmp_path, "set: stop.drain=40", "--set", "stop.drain=1")
    assert found["set"] == ["stop.drain=40", "stop.drain=1"]


@pytest.mark.parametrize(
    "text", ["control-port: x", "grace-period: -1", "heartbeat-interval: 1e-9"]
)
def test_a_wrong_value_names_the_file_and_the_flag(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        given(tmp_path, text)
    assert str(tmp_path / "c.yaml") in caught.value.message
    assert f"--{text.partition(':')[0]}" in caught.value.message
