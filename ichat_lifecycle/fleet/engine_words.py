"""What vLLM's parser says of the workers' keys: asked in a process that ends with the answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.asked_process import ask_process
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.fleet.engine_argv import WrongKey
from ichat_lifecycle.printable import brief
from ichat_lifecycle.scalars import Plain

# -P: as workers are run, without the directory where `up` was started.
PROGRAM = (sys.executable, "-P", "-m", "ichat_lifecycle.adapters.vllm_words")
TIMEOUT_S = 180.0
ANSWER_MAX = 16 * 2**20  # bytes


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


# The answer as it has to be: what vLLM and its plugins do to that process is not known.
_Word = Annotated[str, Field(strict=True, pattern=r"^[^\x00]*$")]
_Names = Annotated[list[_Word] | None, Field(strict=True)]


class _Wrong(BaseModel):
    key: str | None
    message: str
    hint: str | None = None
    at: tuple[str | int, ...] = ()

    def as_key(self) -> WrongKey:
        return WrongKey(self.key, self.message, self.hint, self.at)


class _Headers(BaseModel):
    allowed_origins: _Names = None
    allowed_methods: _Names = None
    allowed_headers: _Names = None
    allow_credentials: bool = False
    enable_request_id_headers: bool = False


class _Worker(BaseModel):
    words: list[_Word]
    wrong: list[_Wrong]
    headers: _Headers

    def as_answer(self) -> Answer:
        wrong = tuple(one.as_key() for one in self.wrong)
        return Answer(tuple(self.words), wrong, AnswerHeaders.of(self.headers.model_dump()))


class _Failed(BaseModel):
    root_cause: str | None = None
    hint: str | None = None


class _Found(BaseModel):
    failed: _Failed | None = None
    error: str | None = None
    workers: list[_Worker] = []


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
        LifecycleError: the process has failed, or its answer is not one.
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
        said = ask_process(program, json.dumps(given).encode(), TIMEOUT_S, ANSWER_MAX)
    except OSError as error:  # no process, or no descriptor, is left
        raise LifecycleError("vLLM's parser cannot be run", root_cause=str(error)) from error
    if said is None:
        raise LifecycleError(
            f"vLLM's parser has not answered within {TIMEOUT_S:g} s", code="no_answer"
        )
    try:
        found = _Found.model_validate_json(said.answer)
    except ValidationError as error:
        last = brief(said.last_line) or "no word of it"
        raise LifecycleError("vLLM's parser has failed", root_cause=last) from error
    if found.failed is not None:
        raise LifecycleError("vLLM's import has failed", **found.failed.model_dump())
    if found.error is not None:
        raise NoEngineError(found.error, code="no_engine")
    if len(found.workers) != len(questions):
        what = f"{len(found.workers)} answers to {len(questions)} questions"
        raise LifecycleError("vLLM's parser has failed", root_cause=what)
    return [worker.as_answer() for worker in found.workers]
