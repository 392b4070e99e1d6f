"""`ichat-lifecycle simulate` and `make fuzz`: plans as files, lives as text, exit codes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.cli import main
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.testing.draw import NUMBERS, SETTINGS, numbers_of, plan_of
from ichat_lifecycle.testing.fuzz import fuzz
from ichat_lifecycle.testing.fuzz import main as fuzz_main
from ichat_lifecycle.testing.invariants import Broken, check
from ichat_lifecycle.testing.life import Stage
from ichat_lifecycle.testing.plan import Event, Outcome, Plan, load_plan

FREEZE = """{
  "settings": {"health": {"interval": 1, "timeout": 2}},
  "events": [{"at_s": 8, "do": "engine_freezes"}, {"at_s": 14, "do": "engine_thaws"}],
  "until_s": 25
}"""


def simulated(argument: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(argument)])
    return int(ended.value.code or 0)


def test_a_plan_is_lived_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(FREEZE)
    assert simulated(plan) == 0
    told = capsys.readouterr().out.splitlines()
    moves = [line[11:].split("  ")[0] for line in told if " -> " in line]
    assert "READY -> DEGRADED" in moves
    assert "DEGRADED -> READY" in moves
    assert moves[-1] == "STOPPING -> STOPPED"
    assert told[-1] == "all 11 invariants hold"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"evnts": []}', "evnts: Unexpected keyword argument"),
        ('{"events": [{"at_s": 1, "do": "stp"}]}', "events.0.do: Input should be 'stop'"),
        ('{"settings": {"healt": {}}}', "healt: Extra inputs are not permitted"),
        ('{"calls": {"engine.strat": [{}]}}', "no such call (did you mean 'engine.start'?)"),
        ('{"calls": {"engine.start": [{"error": "Oops"}]}}', "error 'Oops': one of AddressError"),
        ('{"calls": {"engine.start": [{"delay": 1}]}}', "delay: Unexpected keyword argument"),
    ],
)
def test_what_is_no_plan_is_told_with_its_place(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    assert simulated(plan) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert str(plan) in complaint
    assert len(complaint.splitlines()) == 1


def test_a_plan_that_is_not_there_ends_with_66(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulated(tmp_path / "none.json") == 66
    assert "No such file" in capsys.readouterr().err


def test_a_plan_survives_its_own_text(tmp_path: Path) -> None:
    plan = Plan(
        {"restart": {"max": 1}},
        {"engine.start": (Outcome(hang=True, ignore_cancel_s=2.0), Outcome())},
        (Event(3.0, "stop"), Event(4.0, "request", 2.0), Event(0.0, "cancel", turn=7)),
        until_s=12.5,
    )
    file = tmp_path / "plan.json"
    file.write_text(plan.as_json())
    assert load_plan(file) == plan


def test_every_number_is_a_plan_that_can_be_kept(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    generator = random.Random(7)
    for numbers in [[0], [NUMBERS - 1], *(numbers_of(generator) for _ in range(300))]:
        plan = plan_of(numbers, SETTINGS["impatient"])
        file.write_text(plan.as_json())
        assert load_plan(file) == plan


class _NeverReady(Lifecycle):
    """Broken on purpose: nobody is told that it is ready."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.recorder._ready.set = lambda: None  # type: ignore[method-assign]


class _BrokenBackend(LifecycleBackend):
    def __init__(self, ports: object, settings: object, ready: object) -> None:
        self.server_ready = ready  # type: ignore[assignment]
        self.lifecycle = _NeverReady(ports, settings, ready)


def test_a_broken_life_is_told_with_its_plan_and_its_story() -> None:
    with Stage() as stage, pytest.raises(Broken) as broken:
        check(stage.live(Plan(until_s=8.0), _BrokenBackend))
    assert broken.value.invariant == "ready_exactly_when_ready"
    assert "READY, ready event False" in str(broken.value)
    assert "SERVING -> READY  by become_ready" in str(broken.value)
    assert '"until_s": 8' in str(broken.value)


def test_fuzz_leaves_the_simplest_plan_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.json"
    assert fuzz(_BrokenBackend, 60, seed=3, plan=file) == 1
    assert load_plan(file).events == ()  # every life of it is broken, the plain one too
    assert "seed 3, life" in capsys.readouterr().out


def test_fuzz_says_how_many_lives_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz_main(["--minutes", "0.005", "--seed", "5", "--plan", str(tmp_path / "p")]) == 0
    told = capsys.readouterr().out
    assert "lives per second of one core; seed 5" in told
    assert not (tmp_path / "p").exists()
