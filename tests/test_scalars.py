"""What people write without quotes arrives as it stands in the file, or is an error with its place.

YAML 1.1 took `api_key: 0123456` for 42798 and `TIME: 12:30:00` for 45000 without a word.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ichat_lifecycle import cli
from ichat_lifecycle.arguments import parse
from ichat_lifecycle.config import load_settings
from ichat_lifecycle.document import VALUES_MAX, Document
from ichat_lifecycle.document import parse as parse_yaml
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.fleet.engine_argv import engine_argv
from ichat_lifecycle.fleet.engine_words import Answer, Question, from_wire, to_wire
from ichat_lifecycle.fleet.plans import BadFileError, read_plans
from ichat_lifecycle.fleet.ports import Plan

# Words that YAML 1.1 takes for something else, each in its own way.
ODD = (
    *("0123456", "0012345", "012", "-017", "3.10", "1.0", "1.", ".5", "1e3", "1.5e+3", "+5"),
    *("12:30:00", "8:01", "-1:30.5", "1_000", "1_0.5", "0x10", "0b11", "0o17", "00123"),
    *("yes", "no", "on", "off", "Yes", "NO", "true", "False", "TRUE", "y", "n"),
    *("2024-05-01", "2024-05-01 10:00:00", "2024-05-01T10:00:00Z", ".inf", "-.INF", ".nan"),
    *("12345678901234567890123", "0.30000000000000000001", "0", "8001"),
)


def parser() -> argparse.ArgumentParser:
    """One with the kinds of flags that vLLM's has."""
    made = argparse.ArgumentParser()
    for name in ("--revision", "--model", "--tokenizer", "--host", "--api-key-of-one"):
        made.add_argument(name)
    made.add_argument("--served-model-name", nargs="+")
    made.add_argument("--middleware", action="append")
    made.add_argument("--seed", type=int)
    made.add_argument("--shutdown-timeout", type=int)
    made.add_argument("--max-model-len", type=int)
    made.add_argument("--gpu-memory-utilization", type=float)
    made.add_argument("--enforce-eager", action="store_true")
    made.add_argument("--port", type=int)
    made.add_argument("--hf-overrides", type=json.loads)
    made.add_argument("--lora-modules", nargs="+")
    return made


def ask(questions: Sequence[Question]) -> list[Answer]:
    """vLLM's parser, with the wire between."""
    found = []
    for question in questions:
        wire = json.loads(json.dumps(to_wire(question.keys)))
        words, wrong = engine_argv(from_wire(wire), parser(), question.ours)
        found.append(Answer(tuple(words), tuple(wrong)))
    return found


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(lines: str, **environment: str) -> Plan:
    """The plan of one worker with these lines."""
    path = Path("configs.yaml")
    port = "" if "port:" in lines else "\nport: 8001"
    indented = "".join(f"    {line}\n" for line in f"{lines}{port}".splitlines())
    path.write_text(f"managed_workers:\n  - model_path: org/m\n{indented}")
    return read_plans(path, environment, ask).plans[0]


def told(lines: str) -> str:
    """The one thing that is wrong with them."""
    with pytest.raises(BadFileError) as caught:
        planned(lines)
    (line,) = caught.value.told
    return line.removeprefix("configs.yaml:")


def value_of(plan: Plan, flag: str) -> str:
    joined = next((word for word in plan.argv if word.startswith(f"{flag}=")), None)
    return joined.partition("=")[2] if joined else plan.argv[plan.argv.index(flag) + 1]


# --- text stays as it stands there


@pytest.mark.parametrize("text", ODD)
def test_text_is_kept_in_every_key_that_wants_text(text: str) -> None:
    plan = planned(
        f"model_name: {text}\nworker_id: {text}\ngateway_address: 127.0.0.1:1\n"
        f"revision: {text}\nmiddleware: [{text}, {text}]\n"
        f"env: {{TIME: {text}}}\napi_key: {text}"
    )
    assert plan.model == text
    assert value_of(plan, "--served-model-name") == text
    assert value_of(plan, "--worker-id") == text
    assert value_of(plan, "--revision") == text
    assert plan.argv.count(text) + plan.argv.count(f"--middleware={text}") >= 2
    assert plan.env == {"TIME": text, "VLLM_API_KEY": text}
    assert all(type(word) is str for word in plan.argv)


@pytest.mark.parametrize("text", [text for text in ODD if not text.startswith("-")])
def test_text_is_kept_in_a_list(text: str) -> None:
    plan = planned(f"model_name: a\nserved_model_name: [{text}, b]")
    at = plan.argv.index("--served-model-name")
    assert plan.argv[at + 1 : at + 3] == (text, "b")


@pytest.mark.parametrize("text", ["yes", "012", "3.10", "~", "null", "1:30"])
def test_a_key_is_text(text: str) -> None:
    plan = planned(f"model_name: a\nhf_overrides: {{{text}: x}}")
    assert json.loads(value_of(plan, "--hf-overrides")) == {text: "x"}


@pytest.mark.parametrize("text", ["012345", "3.10", "true", "1:30", "8001"])
def test_what_a_variable_holds_is_kept_too(text: str) -> None:
    plan = planned("model_name: ${X}\nrevision: ${X}\nenv: {A: '${X}', B: 'a${X}'}", X=text)
    assert (plan.model, value_of(plan, "--revision")) == (text, text)
    assert plan.env == {"A": text, "B": f"a{text}"}


def test_an_alias_and_a_merged_key_are_what_they_stand_for() -> None:
    plan = planned("model_name: &x 3.10\nrevision: *x\n<<: {tokenizer_path: 0012}")
    assert (plan.model, value_of(plan, "--revision")) == ("3.10", "3.10")
    assert value_of(plan, "--tokenizer-path") == "0012"


def test_defaults_and_the_fleets_token_are_kept() -> None:
    path = Path("configs.yaml")
    path.write_text(
        "defaults: {revision: 0012345, env: {A: no}}\nfleet: {token: 012345}\n"
        "managed_workers:\n- {model_name: a, model_path: org/m, port: 1}"
    )
    found = read_plans(path, {}, ask)
    assert found.content.fleet.token == "012345"
    assert value_of(found.plans[0], "--revision") == "0012345"
    assert found.plans[0].env == {"A": "no"}


# --- numbers and switches


@pytest.mark.parametrize(
    ("line", "where", "words"),
    [
        ("port: 08", "4:5", "valid integer"),  # not a number to YAML
        ("port: '012'", "4:5", "valid integer"),  # nobody knows which one is meant
        ("port: 012", "4:5", "begins with 0 is octal"),
        ("port: 8:01", "4:5", "to base 60"),
        ("port: yes", "4:5", "expected a number (yes is true in YAML)"),
        ("heartbeat_interval: 1:30", "4:5", "to base 60"),
        ("heartbeat_interval: on", "4:5", "expected a number (on is true in YAML)"),
        ("context_length: 0100", "4:5", "0100 is 64 in YAML"),
        ("gpu_ids: [0, 010]", "4:18", "octal"),
        ("gpu_ids: 010", "4:5", "octal"),
        ("shutdown_timeout: 0100", "4:5", "octal"),
        ("seed: 012", "4:5", "octal"),
        ("max_model_len: 8:01", "4:5", "to base 60"),
        ("lifecycle: {stop: {drain: 1:30}}", "4:24", "to base 60"),
        ("lifecycle: {restart: {max: yes}}", "4:27", "expected a number (yes is true in YAML)"),
        ("lifecycle: {restart: {max: 010}}", "4:27", "octal"),
    ],
)
def test_a_number_that_would_surprise_is_an_error(line: str, where: str, words: str) -> None:
    said = told(f"model_name: a\n{line}")
    assert said.startswith(f"{where}: a: ")
    assert words in said


@pytest.mark.parametrize(
    ("line", "flag", "word"),
    [
        ("seed: 1_000", "--seed", "1_000"),
        ("seed: -1", "--seed", "-1"),
        ("gpu_memory_utilization: 0.90", "--gpu-memory-utilization", "0.90"),
        ("gpu_memory_utilization: 9e-1", "--gpu-memory-utilization", "9e-1"),
        ("context_length: 8_192", "--context-length", "8192"),
        ("max_model_len: '0100'", "--max-model-len", "0100"),
    ],
)
def test_a_number_without_a_surprise_is_one(line: str, flag: str, word: str) -> None:
    assert value_of(planned(f"model_name: a\n{line}"), flag) == word


def test_a_switch_takes_every_word_of_yaml_for_one() -> None:
    assert "--enforce-eager" in planned("model_name: a\nenforce_eager: yes").argv
    assert "--enforce-eager" not in planned("model_name: a\nenforce_eager: off").argv
    assert "expected true or false, not '1'" in told("model_name: a\nenforce_eager: 1")


# --- JSON within vLLM's keys


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1", 1), ("-1", -1), ("0.9", 0.9), ("1e6", 1e6), ("1.5e-3", 1.5e-3), ("10000.0", 1e4)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("text", "text")),
        *(("'012'", "012"), ('"yes"', "yes"), ("'3.10'", "3.10"), ("'1e6'", "1e6")),
        *(("2024-05-01", "2024-05-01"), ("0o17", "0o17"), ("08", "08")),
    ],
)
def test_json_is_what_both_readers_see(text: str, value: Any) -> None:
    plan = planned(f"model_name: a\nhf_overrides: {{x: {{y: [{text}]}}}}")
    assert json.loads(value_of(plan, "--hf-overrides")) == {"x": {"y": [value]}}


@pytest.mark.parametrize(
    "text", ["012", "1:30", "3.10", "1.00", "yes", "Off", "0x10", "1_000", "+5", ".inf", ".nan"]
)
def test_json_that_can_be_read_in_two_ways_has_to_be_quoted(text: str) -> None:
    said = told(f"model_name: a\nhf_overrides:\n  x:\n    - y: {text}")
    assert said.startswith("6:11: a: hf_overrides: it can be read in two ways (")
    assert f'write "{text}" with quotes' in said
    listed = told(f"model_name: a\nlora_modules: [{{name: {text}, path: p}}]")
    assert listed.startswith("4:21: a: lora_modules: it can be read in two ways")


def test_a_secret_is_not_shown_where_it_has_to_be_quoted() -> None:
    said = told("model_name: a\nhf_overrides: {api_key: 0123456}")
    assert said == "4:20: a: hf_overrides: it can be read in two ways"


# --- lifecycle.yaml and --set


def test_settings_keep_text_and_refuse_surprises(tmp_path: Path) -> None:
    path = tmp_path / "lifecycle.yaml"
    path.write_text("warm_up: {prompt: 12:30:00}\nhealth: {interval: 1_0}\n")
    settings = load_settings(path, ["warm_up.max_tokens=4"])
    assert (settings.warm_up.prompt, settings.health.interval) == ("12:30:00", 10)
    assert load_settings(None, ["warm_up.prompt=no"]).warm_up.prompt == "no"
    for assignment in ("health.interval=1:30", "restart.max=010", "restart.max=yes"):
        with pytest.raises(ArgumentsError) as caught:
            load_settings(None, [assignment])
        assert caught.value.message.startswith(f"--set {assignment.partition('=')[0]}: ")
    path.write_text("health:\n  interval: 5\n  interval: 6\n")
    with pytest.raises(ArgumentsError, match=r":3:3: interval stands here twice"):
        load_settings(path)
    path.write_text("stop: {drain: 0100}\n")
    with pytest.raises(ArgumentsError, match=r":1:8: stop.drain: a number that begins with 0"):
        load_settings(path)


# --- vLLM's own --config file


def from_config(line: str) -> argparse.Namespace:
    path = Path("vllm.yaml")
    path.write_text(f"model: org/m\n{line}\n")

    class Reader(argparse.ArgumentParser):
        """Reads the file as vLLM does."""

        def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
            import yaml

            words: list[str] = []
            for key, value in yaml.safe_load(path.read_text()).items():
                if isinstance(value, bool):
                    words += [f"--{key}"] if value else []
                elif isinstance(value, list):
                    words += [f"--{key}", *map(str, value)]
                elif isinstance(value, dict):
                    words += [f"--{key}", json.dumps(value)]
                else:
                    words += [f"--{key}", str(value)]
            return super().parse_args(words, namespace)

    made = Reader(parents=[parser()], conflict_handler="resolve")
    return parse(argparse.Namespace(), ["--config", str(path)], made).vllm


@pytest.mark.parametrize("key", ["revision", "served-model-name", "served_model_name"])
@pytest.mark.parametrize("text", ["0012345", "3.10", "12:30:00", "yes", "no", "0x10", "1_000"])
def test_a_config_file_of_vllms_has_to_quote_what_vllm_would_change(key: str, text: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        from_config(f"{key}: {text}")
    assert caught.value.message.startswith(f"--config vllm.yaml:2:1: {key}: {text} is ")
    assert f'"{text}" with quotes' in str(caught.value.hint)


@pytest.mark.parametrize(
    "line",
    [
        "seed: 012",
        "port: 8:01",
        "served-model-name: [a, 012]",
        "hf-overrides: {version: 3.10}",
        "revision:",
        "seed: 1\nseed: 2",
    ],
)
def test_other_values_that_would_change_are_errors_too(line: str) -> None:
    with pytest.raises(ArgumentsError, match=r"--config vllm\.yaml:[23]:\d+: "):
        from_config(line)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("gpu-memory-utilization: 0.90", "gpu_memory_utilization", 0.9),
        ("seed: 1_000", "seed", 1000),
        ("port: 8001", "port", 8001),
        ("revision: '0012345'", "revision", "0012345"),
        ("revision: v1", "revision", "v1"),
        ("served-model-name: ['3.10', b]", "served_model_name", ["3.10", "b"]),
        ("enforce-eager: yes", "enforce_eager", True),
        ("hf-overrides: {x: [1, 0.5, true]}", "hf_overrides", {"x": [1, 0.5, True]}),
    ],
)
def test_a_config_file_without_surprises_is_taken(line: str, name: str, value: Any) -> None:
    assert getattr(from_config(line), name) == value


@pytest.mark.parametrize("line", ["control-token: 012345", "worker_id: 3.10", "control-port: 012"])
def test_a_flag_of_ours_in_a_config_file_is_no_exception(line: str) -> None:
    """Known before vLLM's import."""
    Path("vllm.yaml").write_text(f"model: org/m\n{line}\n")
    words = ["--config", "vllm.yaml"]
    with pytest.raises(ArgumentsError) as caught:
        cli._with_config_file(words, words)
    said = caught.value.line()
    assert said.startswith("--config vllm.yaml:2:1: ")
    assert "12345" not in said
    assert "5349" not in said


def test_a_secret_in_a_config_file_is_not_shown() -> None:
    made = parser()
    made.add_argument("--api-key", nargs="+")
    Path("vllm.yaml").write_text("model: org/m\napi-key: 0123456\n")
    with pytest.raises(ArgumentsError) as caught:
        parse(argparse.Namespace(), ["--config", "vllm.yaml"], made)
    assert "123456" not in caught.value.line()
    assert "42798" not in caught.value.line()


# --- bombs


def problems(text: str) -> list[str]:
    document: Document = parse_yaml(text, {})
    return [problem.message for problem in document.problems]


def test_aliases_that_stand_for_gigabytes_are_an_error() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert problems("\n".join(rows)) == [
        f"more than {VALUES_MAX} values, those that aliases repeat included"
    ]


def test_values_within_values_without_end_are_an_error() -> None:
    assert problems("[" * 5000 + "]" * 5000) == ["more than 64 values within each other"]
