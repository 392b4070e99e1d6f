"""What vLLM's parser says of the workers' keys: asked in a process that ends with the answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.fleet.engine_argv import WrongKey
from ichat_lifecycle.scalars import Plain

# -P: as workers are run, without the directory where `up` was started.
PROGRAM = (sys.executable, "-P", "-m", "ichat_lifecycle.adapters.vllm_words")
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Question:
    """One worker.

    Attributes:
        argv: the words that are there already.
        keys: what is vLLM's.
        ours: keys that are ours, to suggest where one is mistyped.
        env: the variables that it will have besides the supervisor's.
    """

    argv: tuple[str, ...]
    keys: Mapping[str, Any]
    ours: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The words for its keys, and what is wrong. A `key` of None: with all of them together.

    `headers` are those that its middleware will add to answers.
    """

    words: tuple[str, ...]
    wrong: tuple[WrongKey, ...]
    headers: AnswerHeaders = field(default_factory=AnswerHeaders)


class NoEngineError(LifecycleError):
    """There is no vLLM here that could be asked."""


def _wrong_key(found: Mapping[str, Any]) -> WrongKey:
    return WrongKey(**{**found, "at": tuple(found.get("at", ()))})


def to_wire(value: Any) -> Any:
    """A value in JSON that `from_wire` gives back, with its plain scalars as such."""
    match value:
        case Plain():
            return {"text": str(value), "value": value.value}
        case dict():
            return {"mapping": {key: to_wire(item) for key, item in value.items()}}
        case list():
            return [to_wire(item) for item in value]
        case _:
            return value


def from_wire(value: Any) -> Any:
    """The value of `to_wire`."""
    match value:
        case {"text": text, "value": of_yaml}:
            return Plain(text, of_yaml)
        case {"mapping": mapping}:
            return {key: from_wire(item) for key, item in mapping.items()}
        case list():
            return [from_wire(item) for item in value]
        case _:
            return value


Asker = Callable[[Sequence[Question]], Sequence[Answer]]


def ask_vllm(questions: Sequence[Question], program: Sequence[str] = PROGRAM) -> Sequence[Answer]:
    """Takes seconds, for vLLM's import.

    Raises:
        NoEngineError: vLLM is not there, or not one that is supported.
        LifecycleError: the process has failed.
    """
    given = [
        {
            "argv": question.argv,
            "keys": to_wire(question.keys),
            "ours": question.ours,
            "env": dict(question.env),
        }
        for question in questions
    ]
    try:
        done = subprocess.run(
            program,
            input=json.dumps(given),
            capture_output=True,
            encoding="utf-8",  # as the program writes, whatever the locale is
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise LifecycleError(
            f"vLLM's parser has not answered within {TIMEOUT_S:g} s", code="no_answer"
        ) from error
    except json.JSONDecodeError as error:
        last = (done.stderr.strip().splitlines() or ["no word of it"])[-1]
        raise LifecycleError("vLLM's parser has failed", root_cause=last) from error
    if "failed" in found:
        raise LifecycleError("vLLM's import has failed", **found["failed"])
    if "error" in found:
        raise NoEngineError(found["error"], code="no_engine")
    return [
        Answer(
            tuple(one["words"]),
            tuple(map(_wrong_key, one["wrong"])),
            AnswerHeaders.of(one["headers"]),
        )
        for one in found["workers"]
    ]
