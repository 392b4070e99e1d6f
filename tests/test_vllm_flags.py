"""The table of vLLM's flags and variables, beside vLLM itself: nobody is overlooked."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ichat_lifecycle.refusals import REFUSALS
from ichat_lifecycle.vllm_flags import (
    ALSO_CALLED,
    FLAGS,
    SHORT,
    VARIABLES,
    VERSIONS,
    WITHOUT_EFFECT,
    Taker,
    find,
)

# Entry points of commands other than `serve`.
OTHER_COMMANDS = ("cli/benchmark", "cli/snapshot.py", "cli/openai.py", "run_batch.py", "llm.py")
# What these read themselves, beside the API server.
LOGGING = ("logger.py", "config/logging.py")
VARIABLE = re.compile(r"(?:envs\.|environ(?:\.get\(|\[)\s*\"|getenv\(\s*\")([A-Z][A-Z_0-9]+)")


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from test_arguments import vllm_parser

    return vllm_parser()


@pytest.fixture(scope="module")
def version() -> str:
    import vllm

    found = ".".join(vllm.__version__.split(".")[:2])
    assert found in VERSIONS, "add its flags to the table"
    return found


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    ours = ("help", "ichat_")  # parse() adds iChat's
    return (a for a in parser._actions if a.option_strings and not a.dest.startswith(ours))


def name_of(action: argparse.Action) -> str:
    return next(o for o in action.option_strings if o.startswith("--")).removeprefix("--")


@pytest.mark.engine
def test_every_flag_of_this_vllm_is_in_the_table(
    parser: argparse.ArgumentParser, version: str
) -> None:
    """With what it takes; and the table has no other one for this version."""
    there = {name_of(action): action.nargs == 0 for action in options(parser)}
    assert there == {f.name: f.switch for f in FLAGS.values() if version in f.versions}


@pytest.mark.engine
def test_every_spelling_is_found(parser: argparse.ArgumentParser) -> None:
    for action in options(parser):
        for spelling in action.option_strings:
            assert find(spelling) is FLAGS[name_of(action)], spelling
    assert find("--no-such-flag") is None


@pytest.mark.engine
def test_every_variable_of_the_api_server_is_in_the_table() -> None:
    """What its entry points and its logging read, found in their text."""
    import vllm

    root = Path(vllm.__file__).parent
    files = [f for f in (root / "entrypoints").rglob("*.py") if not str(f).endswith(OTHER_COMMANDS)]
    files += [root / name for name in LOGGING if (root / name).exists()]
    read = {name for file in files for name in VARIABLE.findall(file.read_text(encoding="utf-8"))}
    assert read <= VARIABLES.keys()


def test_no_row_stands_for_nothing() -> None:
    assert all(flag.versions for flag in FLAGS.values())
    assert set(ALSO_CALLED.values()) | set(SHORT.values()) <= FLAGS.keys()


def test_each_refused_flag_has_a_reason() -> None:
    """And no other one has."""
    assert {name for name, flag in FLAGS.items() if flag.taker is Taker.REFUSED} == set(REFUSALS)


def test_each_variable_without_effect_has_a_reason() -> None:
    rows = {name for name, taker in VARIABLES.items() if taker is Taker.WITHOUT_EFFECT}
    assert rows == set(WITHOUT_EFFECT)
