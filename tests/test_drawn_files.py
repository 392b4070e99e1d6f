"""Whatever stands in a configs.yaml, it comes to a fleet or to problems with places, and soon."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ichat_lifecycle.fleet import plans
from ichat_lifecycle.fleet.checks import complain
from ichat_lifecycle.fleet.load import Fleet
from ichat_lifecycle.testing import nasty_yaml
from ichat_lifecycle.testing.nasty_yaml import GOOD, SECRET, Choose, broken, draw, fuzz_files

pytestmark = pytest.mark.hostile


@st.composite
def drawn(draw_from: st.DrawFn) -> str:
    """A text by hypothesis's choices, which it makes simpler where one is broken."""
    return draw(lambda below: draw_from(st.integers(0, max(0, below - 1))))


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=drawn() | st.text(max_size=200))
def test_a_drawn_file_comes_to_a_fleet_or_to_problems(tmp_path: Path, text: str) -> None:
    assert broken(text, tmp_path) is None, text


def test_the_good_one_is_good_and_what_is_drawn_is_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is refused at its first line shows little."""
    fleets: list[Fleet] = []

    def note(fleet: Fleet, *args: object, **kwargs: object) -> None:
        fleets.append(fleet)
        complain(fleet, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("ichat_lifecycle.fleet.plans.complain", note)
    assert broken(GOOD, tmp_path) is None
    assert len(fleets[0].workers) == 2
    generator = random.Random(1)
    for _ in range(100):
        text = draw(choices(generator))
        assert broken(text, tmp_path) is None, text
    assert 20 < len(fleets) < 100
    assert sum(bool(fleet.workers) for fleet in fleets) > 10


def choices(generator: random.Random) -> Choose:
    return lambda below: generator.randrange(below) if below else 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RecursionError("deep"), "RecursionError: deep"),
        (plans.BadFileError(Path("f"), []), "a wrong file without a problem"),
    ],
)
def test_what_should_not_be_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(nasty_yaml, "read_plans", fail)
    assert broken(GOOD, tmp_path) == words
    assert words in str(fuzz_files(60, seed=1, files_max=1))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{path}:1:1: \x1b[2J", "not plain"),
        (f"{{path}}:1:1: {SECRET}", "a variable's value is told"),
        ("{path}: no", "without a place"),
        ("{path}:1:1: " + "x" * 300_000, "characters are told"),
    ],
)
def test_words_that_should_not_be_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    def fail(path: Path, *_: object) -> None:
        error = plans.BadFileError(path, [])
        error.told = [line.format(path=path)]
        raise error

    monkeypatch.setattr(nasty_yaml, "read_plans", fail)
    assert words in str(broken(GOOD, tmp_path))


def test_files_are_drawn_for_as_long_as_asked() -> None:
    assert fuzz_files(60, seed=2, files_max=20) is None
    assert fuzz_files(0, seed=2) is None
