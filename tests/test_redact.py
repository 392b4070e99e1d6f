"""Secrets are hidden, and nothing else is."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from typing import Any

import pytest

from ichat_lifecycle.redact import PLACEHOLDER, Secrets, is_secret, redact

SECRET_NAMES = [
    "api_key",
    "api_keys",
    "--api-key",
    "VLLM_API_KEY",
    "apiKey",
    "x-api-key",
    "openai_api_key_2",
    "hf_token",
    "HF_TOKEN",
    "hfToken",
    "token",
    "control_token",
    "access_tokens",
    "password",
    "ssl_keyfile_password",
    "dbPassword",
    "secret",
    "client_secret",
    "AWS_SECRET_ACCESS_KEY",
    "private_key",
    "Authorization",
    "cookie",
    "credentials",
]

# All of vLLM 0.27 to 0.32's arguments that a careless pattern would hide, and more of that kind.
INNOCENT_NAMES = [
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "skip_tokenizer_init",
    "enable_tokenizer_info_endpoint",
    "return_tokens_as_token_ids",
    "enable_prompt_tokens_details",
    "tokens_only",
    "max_num_batched_tokens",
    "max_num_scheduled_tokens",
    "max_num_queued_tokens",
    "num_speculative_tokens",
    "spec_tokens",
    "long_prefill_token_threshold",
    "dbo_decode_token_threshold",
    "dbo_prefill_token_threshold",
    "allow_credentials",
    "ssl_keyfile",
    "max_tokens",
    "prompt_tokens",
    "--max-tokens",
    "eos_token",
    "pad_token",
    "image_token",
    "pad_token_id",
    "time_to_first_token",
    "time_per_output_token",
    "monkey",
    "key",
    "sort_key",
    "author",
    "secretary",
    "HF_TOKEN_PATH",
    "",
    "123",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(name: str) -> None:
    """However the name is written."""
    assert is_secret(name)
    assert redact({name: "abc"}) == {name: PLACEHOLDER}


@pytest.mark.parametrize("name", INNOCENT_NAMES)
def test_innocent_names(name: str) -> None:
    """Counts, the tokens that models read, and whatever only looks alike."""
    assert not is_secret(name)
    assert redact({name: "abc"}) == {name: "abc"}


@pytest.mark.engine
def test_of_vllms_own_arguments_only_the_secret_ones_are_hidden() -> None:
    """The whole parser, so that a new version's arguments are looked at again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not ours, and pytest makes errors of them
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        try:
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
        except ImportError:
            from vllm.entrypoints.openai.cli_args import make_arg_parser
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    names = {action.dest for action in parser._actions}
    assert len(names) > 100
    assert {name for name in names if is_secret(name)} == {"api_key", "hf_token"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"a": {"api_key": ["x", "y"], "b": [{"token": "z", "c": 1}]}},
            {"a": {"api_key": "***", "b": [{"token": "***", "c": 1}]}},
        ),
        ({"password": 1234}, {"password": "***"}),
        ({"api_key": None, "hf_token": True, "token": ""},) * 2,
        (Namespace(api_key="x", model="m"), {"api_key": "***", "model": "m"}),
        ({1: "a", None: 2},) * 2,
        (("a", 1, None, 2.5),) * 2,
        (None, None),
        (["--api-key", "x", "y", "--port", "1"], ["--api-key", "***", "***", "--port", "1"]),
        (["--api-key=x", "m"], ["--api-key=***", "m"]),
        (("--hf_token", "x"), ("--hf_token", "***")),
        (["--api-key"], ["--api-key"]),
        (["--max-num-batched-tokens", "5"],) * 2,
        (["--kv-transfer-config.api_key", "x"], ["--kv-transfer-config.api_key", "***"]),
        (
            ["--kv-transfer-config", '{"a": {"token": "x"}}'],
            ["--kv-transfer-config", '{"a": {"token": "***"}}'],
        ),
        (['--kv-transfer-config={"token":"x"}'], ['--kv-transfer-config={"token": "***"}']),
        ('{"port":1}',) * 2,
        ("[not json",) * 2,
        ("https://user:pa:ss@host:1/p?q#f", "https://***@host:1/p?q#f"),
        ("redis://:p@host and http://a.b/c@d", "redis://***@host and http://a.b/c@d"),
        (["--model=https://t0ken@host/x"], ["--model=https://***@host/x"]),
        ("mail a@b.c",) * 2,
    ],
)
def test_redact(value: Any, expected: Any) -> None:
    """Keys at any depth, arguments in both forms, JSON in a string, URLs; nothing else changes."""
    before = json.dumps(value, default=repr, skipkeys=True)
    assert redact(value) == expected
    assert json.dumps(value, default=repr, skipkeys=True) == before, "the original is left alone"


def test_scrub_hides_what_was_collected() -> None:
    """Parsed arguments, argv, the environment and single ones, wherever they stand in a text."""
    secrets = Secrets()
    secrets.collect(Namespace(api_key=["key-one", "key-two"], hf_token=None, model="model"))
    secrets.collect(["--hf-token", "from-argv", "--host", "hostname"])
    secrets.collect({"a": {"token": {"b": ["deep"]}}})
    secrets.collect("http://user:word@host")
    secrets.collect_environment({"HF_TOKEN": "hf_env", "VLLM_API_KEY": "vk-env", "HOME": "/root"})
    secrets.add("control", None)
    text = "key-one,key-two from-argv deep user:word hf_env vk-env control model hostname /root"
    assert secrets.scrub(text) == "***,*** *** *** *** *** *** *** model hostname /root"


def test_the_longest_secret_goes_first() -> None:
    """Else the rest of it would be left in the open."""
    secrets = Secrets()
    secrets.add("abcd", "abcdefgh")
    secrets.add("xyzabcd")
    assert secrets.scrub("abcdefgh abcd xyzabcd") == "*** *** ***"


def test_short_secrets_are_left_alone() -> None:
    """Three characters are in every other word."""
    secrets = Secrets()
    secrets.add("abc", "")
    assert secrets.scrub("abc abcd") == "abc abcd"
    secrets.add("abcd")
    assert secrets.scrub("abc abcd") == "abc ***"


def test_special_characters_are_plain_text() -> None:
    """A secret is no pattern; in a log line of JSON it stands escaped."""
    secrets = Secrets()
    secrets.add('a.*+"\\ü')
    assert secrets.scrub(json.dumps({"k": 'a.*+"\\ü', "l": "abcd"})) == '{"k": "***", "l": "abcd"}'
    assert secrets.scrub('a.*+"\\ü') == "***"


def test_without_secrets_nothing_changes() -> None:
    """The common case."""
    assert Secrets().scrub("text") == "text"
