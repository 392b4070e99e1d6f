"""A worker's keys as words for a parser like vLLM's."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from ichat_lifecycle.fleet.engine_argv import engine_argv


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--max-model-len", type=int)
    made.add_argument("--enforce-eager", action="store_true")
    made.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    made.add_argument("--allowed-origins", type=json.loads)
    made.add_argument("--middleware", nargs="*")
    made.add_argument("--stop-token", nargs="+")
    made.add_argument("--speculative-config", type=json.loads)
    made.add_argument("--dtype")
    return made


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_model_len", 512, ["--max-model-len", "512"]),
        ("max-model-len", 512, ["--max-model-len", "512"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enforce_eager", False, []),
        ("enable_prefix_caching", True, ["--enable-prefix-caching"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("allowed_origins", ["*"], ["--allowed-origins", '["*"]']),
        ("middleware", ["a.b", "c"], ["--middleware", "a.b", "c"]),
        ("middleware", [], ["--middleware"]),
        (
            "speculative_config",
            {"method": "ngram"},
            ["--speculative-config", '{"method": "ngram"}'],
        ),
        ("dtype", None, []),
        ("max_model_len", -1, ["--max-model-len", "-1"]),
        ("dtype", True, ["--dtype", "true"]),
    ],
)
def test_a_key_becomes_the_words_that_the_parser_wants(
    key: str, value: Any, words: list[str]
) -> None:
    found, wrong = engine_argv({key: value}, parser())
    assert (found, wrong) == (words, [])
    parser().parse_args(found)


@pytest.mark.parametrize(
    ("key", "value", "message", "hint"),
    [
        ("max_modle_len", 1, "unknown key", "did you mean max_model_len?"),
        ("prot", 1, "unknown key", "did you mean port?"),
        ("zzz", 1, "unknown key", None),
        ("help", True, "unknown key", None),
        ("enforce_eager", "yes", "expected true or false, not 'yes'", None),
        ("stop_token", [], "expected at least one item", None),
        ("stop_token", ["a", "--seed"], "an item begins with a dash", None),
    ],
)
def test_what_cannot_be_passed_on_is_told(
    key: str, value: Any, message: str, hint: str | None
) -> None:
    words, (wrong,) = engine_argv({key: value}, parser(), ["port"])
    assert (words, wrong.key, wrong.hint) == ([], key, hint)
    assert wrong.message.startswith(message)
