"""A glance at the words for `serve`, without vLLM's parser, whose import takes seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ichat_lifecycle.vllm_flags import find

# iChat's own, which are not in vLLM's table: each takes one value, but for the GPUs.
_ICHAT = ("model-path", "tokenizer-path", "context-length")
_GPU_IDS = "gpu-ids"

_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # what argparse takes for a value


@dataclass(slots=True)
class Skimmed:
    """What the words give.

    Attributes:
        given: each flag with its value, by its name in the table, or iChat's name; the last one
            counts. True for a switch, and for one that is given no value.
        models: words that are not the value of a flag: the model, and what is too many.
        doubtful: some word could not be placed, so nothing follows from what is missing.
    """

    given: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    doubtful: bool = False


def skim(argv: Sequence[str]) -> Skimmed:
    """What vLLM's parser would make of the words, as far as that is certain."""
    found = Skimmed()
    name, takes, words = "", 0, 0  # the flag before, how many values it takes, how many it has
    for token in argv:
        if token == "--":
            found.doubtful = True
            break
        if token.startswith("-") and not _NUMBER.fullmatch(token) and token != "-":
            name, takes = _flag(token, found)
            words = 0
        elif words < takes:
            words += 1
            found.given[name] = token if words == 1 else f"{found.given[name]} {token}"
        elif not takes and token:
            found.models.append(token)
        else:  # the second value of a flag that may take several, or a model that stands late
            found.doubtful = True
    return found


def _flag(token: str, found: Skimmed) -> tuple[str, int]:
    """Notes a flag; returns its name, and how many values may follow."""
    flag, equals, value = token.partition("=")
    row = find(flag)
    plain = flag.removeprefix("--").replace("_", "-")
    if row is None and plain not in (*_ICHAT, _GPU_IDS):
        found.doubtful = True
        return flag, 1
    name = row.name if row else plain
    switch = row is not None and row.switch
    dotted = "." in plain
    if dotted:  # a part of a JSON value
        if equals:
            found.given[flag] = value
        return flag, 0 if equals else 1
    found.given[name] = value if equals else not flag.startswith("--no-")
    if switch or equals:
        return name, 0
    return name, 100 if name == _GPU_IDS else 1


def of_config(content: Mapping[Any, Any]) -> Skimmed:
    """The same of the flags in a `--config` file."""
    found = Skimmed()
    for key, value in content.items():
        row = find(f"--{key}")
        name = row.name if row else str(key).replace("_", "-")
        if value is not None:
            found.given[name] = value
    return found
