"""A file that is given to the wrong command: it is named for what it is."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from ichat_lifecycle.config import load_settings
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.file_kinds import Kind, kind_of
from ichat_lifecycle.fleet.plans import BadFileError, read_plans
from ichat_lifecycle.preflight import refuse_early

CONFIGS = Path(__file__).parent.parent / "configs"
FLAGS = "model: m\nport: 8000\nmax-model-len: 512\ncontrol-port: 9000\n"
KINDS = {
    Kind.SETTINGS: (CONFIGS / "lifecycle.yaml").read_text(encoding="utf-8"),
    Kind.FLEET: (CONFIGS / "two-models.yaml").read_text(encoding="utf-8"),
    Kind.KUBERNETES: "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {}\n",
    Kind.FLAGS: FLAGS,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def path(kind: Kind, tmp_path: Path) -> Path:
    made = tmp_path / "file.yaml"
    made.write_text(KINDS[kind], encoding="utf-8")
    return made


def test_given_to_check_or_up(kind: Kind, path: Path) -> None:
    if kind is Kind.FLEET:
        return
    with pytest.raises(BadFileError) as caught:
        read_plans(path, {}, lambda questions: [])
    message = f"this is {kind.what}, not a configs.yaml ({kind.hint})"
    assert caught.value.told == [f"{path}:1:1: {message}"]


def test_given_as_settings(kind: Kind, path: Path) -> None:
    if kind is Kind.SETTINGS:
        load_settings(path)
        return
    with pytest.raises(ArgumentsError) as caught:
        load_settings(path)
    assert f"{path}: this is {kind.what}" in caught.value.message
    assert caught.value.hint == kind.hint


def test_given_as_flags(kind: Kind, path: Path) -> None:
    argv = ["--config", str(path)]
    if kind is Kind.FLAGS:
        refuse_early(Namespace(), argv, {})
        return
    with pytest.raises(ArgumentsError) as caught:
        refuse_early(Namespace(), argv, {})
    assert f"{path}: this is {kind.what}" in caught.value.message
    assert caught.value.hint == kind.hint


@pytest.mark.parametrize("content", [None, [], "a", {}, {"a": 1}, {1: 2}, {"stop": 1, "x": 2}])
def test_nothing_is_guessed(content: object) -> None:
    assert kind_of(content) is None


def test_a_typo_is_still_a_typo(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("health: {intervall: 5}\nstopp: {drain: 1}\n", encoding="utf-8")
    with pytest.raises(ArgumentsError, match="unknown key"):
        load_settings(path)
