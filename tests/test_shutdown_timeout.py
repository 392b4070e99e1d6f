"""vLLM's --shutdown-timeout is the drain, wherever it is given and whatever follows from that."""

from __future__ import annotations

import asyncio
import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle import worker
from ichat_lifecycle.backend import Options, VLLMBackend
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.config import Settings, load_settings
from ichat_lifecycle.control.view import lifecycle_document
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.fleet.engine_words import Answer, Question
from ichat_lifecycle.fleet.plans import BadFileError, Reading, read_plans
from ichat_lifecycle.shutdown_timeout import with_shutdown_timeout

DEFAULT = Settings()


def backend(argv: str, *assignments: str) -> VLLMBackend:
    options = Options(settings=load_settings(None, assignments), defer_parsing=True)
    return VLLMBackend(Namespace(), argv.split(), options=options)


@pytest.mark.parametrize("argv", ["--shutdown-timeout 40", "--shutdown_timeout=40"])
def test_it_is_known_before_vllm_parses(argv: str) -> None:
    """The bound on a stop follows, which the last resort and the grace period are compared with."""
    made = backend(f"m {argv}")
    assert lifecycle_document(made.lifecycle, made)["stop_bound_s"] == DEFAULT.stop_bound + 28
    assert made.options.settings.stop.drain == 40


def test_the_worker_compares_it_with_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives its bound to the last resort."""
    used: list[float] = []
    monkeypatch.setattr("ichat_lifecycle.adapters.logs.own_stderr", io.StringIO)
    monkeypatch.setattr(worker, "_logging", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(worker, "_compare_with_grace", lambda s, _: used.append(s.stop_bound))
    monkeypatch.setattr(worker, "_run", lambda _, __, s, ___: used.append(s.stop_bound))
    argv = ["serve", "--model", "m", "--shutdown-timeout", "40"]
    args, rest = build_parser().parse_known_args(argv)
    assert worker.serve(args, rest, DEFAULT) == 0
    assert used == [DEFAULT.stop_bound + 28] * 2


def test_a_config_file_may_give_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nshutdown-timeout: 40\n", encoding="utf-8")
    assert backend(f"--config {path}").options.settings.stop.drain == 40
    argv = f"--config={path} --shutdown-timeout 50"
    assert backend(argv).options.settings.stop.drain == 50


@pytest.mark.parametrize(
    ("argv", "assignments", "drain"),
    [
        ("m", [], 12),
        ("m --shutdown-timeout 0", [], 0),
        ("m --shutdown-timeout 40", ["stop.cut=2"], 40),
        ("m --shutdown-timeout 40", ["stop.drain=60"], 60),
        ("m --shutdown-timeout 40", ["stop.drain=12"], 12),
    ],
)
def test_what_is_set_itself_wins(argv: str, assignments: list[str], drain: float) -> None:
    """Also where it is set to its default."""
    assert backend(argv, *assignments).options.settings.stop.drain == drain


def test_other_settings_stay() -> None:
    settings = load_settings(None, ["stop.cut=2", "health.interval=1"])
    assert settings.stop_bound == DEFAULT.stop_bound + 1  # computed before
    found = with_shutdown_timeout(settings, "40")
    assert (found.stop.drain, found.stop.cut, found.health.interval) == (40, 2, 1)
    assert found.stop_bound == DEFAULT.stop_bound + 29


@pytest.mark.parametrize("given", ["-1", "x", "1.5"])
def test_what_is_no_number_of_seconds_is_refused_before_the_import(given: str) -> None:
    with pytest.raises(ArgumentsError, match=r"--shutdown-timeout \S+: expected whole seconds"):
        backend(f"m --shutdown-timeout={given}")


def warnings(made: VLLMBackend) -> list[str]:
    made.lifecycle.ask_to_stop("a test")

    with capture_logs() as logs:
        asyncio.run(made.run())
    return [log["name"] for log in logs if log["event"] == "without_effect"]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [((), []), (("stop.drain=40",), []), (("stop.drain=60",), ["--shutdown-timeout 40"])],
)
def test_where_it_has_no_effect_that_is_logged(
    assignments: Sequence[str], expected: list[str]
) -> None:
    assert warnings(backend("m --port 0 --shutdown-timeout 40", *assignments)) == expected


@pytest.mark.parametrize("value", ["1", "0", ""])
@pytest.mark.parametrize("name", ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_LOGGING_STREAM"])
def test_a_variable_without_effect_is_logged(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert warnings(backend("m --port 0")) == ([name] if value == "1" else [])


# --- in a fleet


def reading(keys: str, more: str, tmp_path: Path) -> Reading:
    path = tmp_path / "configs.yaml"
    worker = f"{{model_name: a, model_path: org/a, port: 1{keys}}}"
    path.write_text(f"managed_workers:\n- {worker}\n{more}", encoding="utf-8")

    def words(questions: Sequence[Question]) -> list[Answer]:
        return [Answer(tuple(f"--{k}={v}" for k, v in q.keys.items()), ()) for q in questions]

    return read_plans(path, {}, words)


@pytest.mark.parametrize(
    ("keys", "more", "drain", "doubts"),
    [
        ("", "", 12, 0),
        (", shutdown_timeout: 40", "", 40, 0),
        (", shutdown-timeout: 40", "", 40, 0),
        (", shutdown_timeout: '40'", "", 40, 0),
        ("", "defaults: {shutdown_timeout: 40}", 40, 0),
        (", shutdown_timeout: 40", "lifecycle: {stop: {drain: 60}}", 60, 1),
        (", shutdown_timeout: 40", "lifecycle: {stop: {drain: 12}}", 12, 1),
        (", shutdown_timeout: 40, lifecycle: {stop: {drain: 40}}", "", 40, 0),
        (", config: CONFIG", "", 30, 0),
        (", config: CONFIG, shutdown_timeout: 40", "", 40, 0),
    ],
)
def test_a_fleet_kills_after_it_and_the_worker_agrees(
    tmp_path: Path, keys: str, more: str, drain: float, doubts: int
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("shutdown-timeout: 30\n", encoding="utf-8")
    found = reading(keys.replace("CONFIG", str(config)), more, tmp_path)
    plan = found.plans[0]
    assert plan.stop_bound_s - reading("", "", tmp_path).plans[0].stop_bound_s == drain - 12
    assert len(found.doubts) == doubts
    args, rest = build_parser().parse_known_args(["serve", *plan.argv])
    settings = load_settings(None, args.set or ())
    made = VLLMBackend(args, rest, options=Options(settings=settings, defer_parsing=True))
    assert made.options.settings.stop.drain == drain
    assert args.grace_period > plan.stop_bound_s


def test_a_negative_one_in_a_fleet_is_a_problem_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(BadFileError) as caught:
        reading(", shutdown_timeout: -1", "", tmp_path)
    assert ":2:47: a: --shutdown-timeout -1: expected" in caught.value.told[0]
