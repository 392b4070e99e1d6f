"""Settings: defaults, and errors that say where and what."""

from __future__ import annotations

from pathlib import Path

import pytest

from ichat_lifecycle.adapters.last_resort import MARGIN_S
from ichat_lifecycle.config import PERIOD_MIN, WINDOW_MIN, Settings, load_settings
from ichat_lifecycle.errors import ArgumentsError, ExitCode, InputMissingError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lifecycle.yaml"


def complaint(path: Path | None = None, *assignments: str) -> str:
    with pytest.raises(ArgumentsError) as caught:
        load_settings(path, assignments)
    assert caught.value.exit_code is ExitCode.BAD_ARGUMENTS
    assert "\n" not in caught.value.line()
    return caught.value.message


def test_defaults_need_nothing() -> None:
    assert load_settings() == Settings()


def test_a_default_stop_fits_into_kubernetes_grace_period() -> None:
    assert Settings().stop_bound + MARGIN_S <= 30


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n", "health:\n  interval: 5\n"])
def test_an_empty_file_is_the_defaults(path: Path, text: str) -> None:
    path.write_text(text)
    assert load_settings(path) == Settings()


def test_a_file_and_assignments_on_top(path: Path) -> None:
    """--set wins over the file, in its order; what neither names keeps its default."""
    path.write_text("health:\n  interval: 2\n  timeout: 3\nrestart:\n  max: 1\n")
    settings = load_settings(path, ["health.interval=4", "stop.drain=0", "health.interval=4.5"])
    assert (settings.health.interval, settings.health.timeout) == (4.5, 3)
    assert (settings.restart.max, settings.stop.drain) == (1, 0)
    assert settings.health.recover_after == Settings().health.recover_after


def test_stop_bound_is_the_sum_of_the_stages() -> None:
    """Each deadline of a stop counts, the companions' one twice."""
    settings = load_settings(None, ["stop.drain=100", "stop.companion=10"])
    stop = settings.stop
    assert settings.stop_bound == sum(settings.stop_stages().values())
    assert settings.stop_bound == sum(stop.model_dump().values()) + stop.companion
    assert settings.stop_bound > 100 + 2 * 10


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (
            "health:\n  intervall: 5\n",
            2,
            "health.intervall: unknown key (did you mean 'interval'?)",
        ),
        ("restart:\n  max: 1\nhelth:\n  x: 1\n", 3, "helth: unknown key (did you mean 'health'?)"),
        ("stop:\n  zzz: 1\n", 2, "stop.zzz: unknown key"),
        ("stop:\n  drain: 1\n\n  engine: soon\n", 4, "stop.engine: Input should be a valid number"),
        (
            "health:\n  interval: 0\n",
            2,
            "health.interval: Input should be greater than or equal to 0.01 (got 0)",
        ),
        ("warm_up: {requests: 101}\n", 1, "warm_up.requests: Input should be less than or equal"),
        (
            "warm_up:\n  extra:\n  - {path: /v1/x, body: {}}\n  - path: v1/x\n    body: {}\n",
            4,
            "warm_up.extra.1.path: String should match",
        ),
        (
            "warm_up:\n  extra:\n  - {path: /x, boby: {}, body: {}}\n",
            3,
            "warm_up.extra.0.boby: unknown key (did you mean 'body'?)",
        ),
        (
            "warm_up:\n  extra:\n  - path: /x\n",
            3,
            "warm_up.extra.0.body: Field required",
        ),
        (
            "warm_up:\n  extra: [{path: /x, body: {stream: true}}]\n",
            2,
            "warm_up.extra.0.body: Value error, 'stream' is of no use here",
        ),
        (
            "warm_up:\n  extra: [{path: /x, body: {at: .inf}}]\n",
            2,
            "warm_up.extra.0.body.at: it can be read in two ways",
        ),
        (
            f"warm_up:\n  extra: [{{path: /x, body: {{prompt: {'x' * 100_000}}}}}]\n",
            2,
            "warm_up.extra.0.body: Value error, 100014 bytes of JSON, at most 100000",
        ),
        (
            f"warm_up:\n  extra: [{'{path: /x, body: {}}, ' * 51}]\n",
            2,
            "warm_up.extra: Tuple should have at most 50 items",
        ),
        ("# on the whole\nhealth: 5\n", 2, "health: Input should be"),
        ("- health\n", 1, "expected sections such as 'health:' at the top level"),
        ("soon\n", 1, "expected sections such as 'health:' at the top level"),
    ],
)
def test_an_error_in_a_file_names_its_line(path: Path, text: str, line: int, words: str) -> None:
    path.write_text(text)
    said = complaint(path)
    where, _, what = said.removeprefix(f"{path}:{line}:").partition(": ")
    assert where.isdecimal()
    assert what.startswith(words)
    if words.endswith("unknown key"):
        assert "did you mean" not in said


PERIODS = (
    *("start.poll_interval", "start.stall_timeout", "restart.backoff", "restart.backoff_max"),
    *("health.interval", "health.recovery_interval", "health.timeout", "health.token_interval"),
)


@pytest.mark.parametrize(
    ("name", "least"), [*((name, PERIOD_MIN) for name in PERIODS), ("restart.window", WINDOW_MIN)]
)
def test_no_loop_is_asked_to_spin(path: Path, name: str, least: float) -> None:
    """An interval of 1e-9 takes a core; within such a window no restart counts."""
    section, key = name.split(".")
    for short in ("1e-9", str(least * 0.99)):
        assert complaint(None, f"{name}={short}").startswith(f"--set {name}: ")
        path.write_text(f"{section}:\n  {key}: {short}\n")
        said = complaint(path)
        assert said.startswith(f"{path}:2:3: {name}: ")
        assert f"{least:g}" in said
    settings = load_settings(None, [f"{name}={least}"])
    assert getattr(getattr(settings, section), key) == least


def test_every_setting_that_is_a_pause_has_a_least_one() -> None:
    """Whatever is called so; what 0 turns off may be 0."""
    named = {
        f"{section}.{key}"
        for section, found in Settings()
        for key in type(found).model_fields
        if key.endswith("interval") or "backoff" in key
    }
    assert named <= {*PERIODS}
    assert load_settings(None, ["health.token_interval=0"]).health.token_interval == 0


def test_a_wrong_value_is_not_shown_in_all_its_length(path: Path) -> None:
    path.write_text(f"warm_up: {{requests: {'x' * 10_000}}}\n")
    assert len(complaint(path)) < 1000


def test_what_is_not_yaml_names_its_line(path: Path) -> None:
    path.write_text("health:\n  interval: [1\n")
    said = complaint(path)
    assert said.startswith(f"{path}:3:1: not YAML: ")


@pytest.mark.parametrize(
    ("data", "words"), [(b"\xff\xfe\xff", "1:1: not UTF-8: "), (b"a: \x00", "1:4: not YAML: ")]
)
def test_what_is_not_text_is_not_yaml(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    assert complaint(path).startswith(f"{path}:{words}")


def test_a_key_that_is_no_text(path: Path) -> None:
    path.write_text("1: 2\n")
    assert "1: " in complaint(path)


def test_a_file_that_cannot_be_read(path: Path) -> None:
    """It is an input that is missing (66), not a wrong argument (2)."""
    with pytest.raises(InputMissingError, match="No such file or directory") as caught:
        load_settings(path)
    assert caught.value.exit_code is ExitCode.INPUT_MISSING
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("health.interval", "--set health.interval: expected SECTION.KEY=VALUE"),
        ("interval=5", "--set interval=5: expected SECTION.KEY=VALUE"),
        ("health.=5", "--set health.=5: expected SECTION.KEY=VALUE"),
        ("health.intervall=5", "--set health.intervall: unknown key (did you mean 'interval'?)"),
        ("helth.interval=5", "--set helth: unknown key (did you mean 'health'?)"),
        ("health.interval=soon", "--set health.interval: Input should be a valid number"),
        (
            "health.interval=-1",
            "--set health.interval: Input should be greater than or equal to 0.01",
        ),
        ("restart.max=1.5", "--set restart.max: Input should be a valid integer"),
        ("health.interval=", "--set health.interval: Input should be a valid number"),
        ("health.interval=[1", "--set health.interval=[1: not YAML"),
    ],
)
def test_an_error_in_an_assignment_names_it(assignment: str, words: str) -> None:
    assert complaint(None, assignment).startswith(words)


@pytest.mark.parametrize(
    ("assignment", "origin"),
    [("health.interval=0", "--set"), ("health.timeout=1", "{path}:2:"), ("stop.drain=-1", "--set")],
)
def test_an_error_is_blamed_on_where_it_comes_from(
    path: Path, assignment: str, origin: str
) -> None:
    """A bad --set over a good file is the --set's fault, and the other way round."""
    interval = "0" if assignment == "health.timeout=1" else "5"
    path.write_text(f"health:\n  interval: {interval}\n")
    assert complaint(path, assignment).startswith(origin.format(path=path))


def test_an_assignment_into_what_is_no_section(path: Path) -> None:
    path.write_text("health: 5\n")
    assert complaint(path, "health.interval=5").startswith("--set health.interval=5: 'health' is")


@pytest.mark.parametrize("value", [".inf", ".nan", "1e400"])
def test_no_deadline_is_infinite(value: str) -> None:
    """A deadline that never comes is none, and the bound on a stop could not be computed."""
    assert "stop.engine" in complaint(None, f"stop.engine={value}")


def test_a_warm_up_request_can_be_set_on_the_command_line() -> None:
    text = "warm_up.extra=[{path: /v1/chat/completions, body: {messages: []}, required: false}]"
    (request,) = load_settings(assignments=[text]).warm_up.extra
    assert (request.path, request.body) == ("/v1/chat/completions", {"messages": []})
    assert not request.required
