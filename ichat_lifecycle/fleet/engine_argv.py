"""A worker's keys that are vLLM's, as the words that vLLM's own parser wants.

The parser comes in as an object, so that what a key takes is the parser's word: a switch, one
value, several, or JSON.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNKNOWN = "unknown key"


@dataclass(frozen=True)
class WrongKey:
    """A key that cannot be passed on."""

    key: str | None
    message: str
    hint: str | None = None


def engine_argv(
    keys: Mapping[str, Any], parser: argparse.ArgumentParser, ours: Sequence[str] = ()
) -> tuple[list[str], list[WrongKey]]:
    """The words for all keys, in their order, and what is wrong with any.

    Args:
        ours: keys that are not vLLM's, to suggest where one is mistyped.
    """
    flags = _flags(parser)
    words: list[str] = []
    wrong: list[WrongKey] = []
    for key, value in keys.items():
        action = flags.get(_flag(key))
        if action is None:
            wrong.append(WrongKey(key, UNKNOWN, _meant(key, flags, ours)))
            continue
        try:
            words += _words(_flag(key), value, action)
        except ValueError as error:
            wrong.append(WrongKey(key, str(error)))
    return words, wrong


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        flag: action
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and action.dest != "help"
    }


def _meant(key: str, flags: Mapping[str, Any], ours: Sequence[str]) -> str | None:
    known = [*ours, *(flag.removeprefix("--").replace("-", "_") for flag in flags)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else None


def _words(flag: str, value: Any, action: argparse.Action) -> list[str]:
    """Raises ValueError: the key takes something else."""
    if value is None:
        return []
    if action.nargs == 0:
        return _switched(flag, value, action)
    if isinstance(value, list):
        return _listed(flag, value, action)
    return _single(flag, value)


def _single(flag: str, value: Any) -> list[str]:
    """argparse takes a word that begins with a dash for a flag, unless it is a number."""
    word = _word(value)
    return [f"{flag}={word}"] if _looks_like_a_flag(word) else [flag, word]


def _looks_like_a_flag(word: str) -> bool:
    return word.startswith("-") and not _is_number(word)


def _switched(flag: str, value: Any, action: argparse.Action) -> list[str]:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, not {value!r}")
    if value:
        return [flag]
    opposite = f"--no-{flag.removeprefix('--')}"
    # A plain switch has no opposite: it is off unless it is given.
    return [opposite] if opposite in action.option_strings else []


def _listed(flag: str, value: list[Any], action: argparse.Action) -> list[str]:
    if isinstance(action, argparse._AppendAction):
        return [word for item in value for word in _single(flag, item)]
    if action.nargs not in ("+", "*") and not isinstance(action.nargs, int):
        return [flag, json.dumps(value)]
    if not value and action.nargs == "+":
        raise ValueError("expected at least one item")
    words = [_word(item) for item in value]
    if any(map(_looks_like_a_flag, words)):
        raise ValueError("an item begins with a dash, which vLLM's parser takes for a flag")
    return [flag, *words]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _word(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
