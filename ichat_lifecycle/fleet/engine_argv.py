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

from ichat_lifecycle.scalars import Complain, Location, Plain, as_json, converted, is_null, surprise

UNKNOWN = "unknown key"


@dataclass(frozen=True)
class WrongKey:
    """A key that cannot be passed on. `at`: where in its value, of a list or a mapping."""

    key: str | None
    message: str
    hint: str | None = None
    at: Location = ()


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

        def complain(at: Location, message: str, hint: str, key: str = key) -> None:
            wrong.append(WrongKey(key, message, hint, at))

        try:
            words += _words(_flag(key), value, action, complain)
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


def _words(flag: str, value: Any, action: argparse.Action, complain: Complain) -> list[str]:
    """Raises ValueError: the key takes something else."""
    if is_null(value):
        return []
    if action.nargs == 0:
        return _switched(flag, value, action)
    if isinstance(value, list):
        return _listed(flag, value, action, complain)
    return _single(flag, _word(value, action, complain))


def _single(flag: str, word: str) -> list[str]:
    """argparse takes a word that begins with a dash for a flag, unless it is a number."""
    return [f"{flag}={word}"] if _looks_like_a_flag(word) else [flag, word]


def _looks_like_a_flag(word: str) -> bool:
    return word.startswith("-") and not _is_number(word)


def _switched(flag: str, value: Any, action: argparse.Action) -> list[str]:
    on = value.value if isinstance(value, Plain) else value
    if not isinstance(on, bool):
        raise ValueError(f"expected true or false, not {str(value)!r}")
    if on:
        return [flag]
    opposite = f"--no-{flag.removeprefix('--')}"
    # A plain switch has no opposite: it is off unless it is given.
    return [opposite] if opposite in action.option_strings else []


def _listed(flag: str, value: list[Any], action: argparse.Action, complain: Complain) -> list[str]:
    appends = isinstance(action, argparse._AppendAction)
    if not appends and action.nargs not in ("+", "*") and not isinstance(action.nargs, int):
        return [flag, json.dumps(as_json(value, complain))]
    if not value and action.nargs == "+":
        raise ValueError("expected at least one item")
    words = [_word(item, action, complain, (number,)) for number, item in enumerate(value)]
    if appends:
        return [part for word in words for part in _single(flag, word)]
    if any(map(_looks_like_a_flag, words)):
        raise ValueError("an item begins with a dash, which vLLM's parser takes for a flag")
    return [flag, *words]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _word(value: Any, action: argparse.Action, complain: Complain, at: Location = ()) -> str:
    if isinstance(value, Plain):
        return _plain_word(value, action, complain, at)
    if isinstance(value, dict | list):
        return json.dumps(as_json(value, complain, at))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _plain_word(plain: Plain, action: argparse.Action, complain: Complain, at: Location) -> str:
    """What stands in the file, which the parser then reads: of text nothing is lost.

    Where it reads a number, that has to be the one that YAML reads.
    """
    if isinstance(plain.value, bool) and action.type not in (None, str):
        return str(plain.value).lower()
    why = surprise(plain)
    if why is not None and isinstance(converted(str(plain.value), action.type), int | float):
        complain(at, why, f"{plain} is {plain.value}: write that, or quote it where text is meant")
    return str(plain)
