"""A program: vLLM's arguments of a fleet's workers, by vLLM's own parser, in a process of its own.

vLLM's import takes seconds and half a gigabyte, which a supervisor should not keep. It reads the
workers as JSON from stdin (see fleet/engine_words.py) and writes what they come to to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from ichat_lifecycle.adapters.answer_headers import LISTS, SWITCHES
from ichat_lifecycle.adapters.parent import follow
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments, import_error
from ichat_lifecycle.adapters.vllm_layout import Layout, load
from ichat_lifecycle.arguments import ParsedArguments
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.fleet.engine_argv import WrongKey, engine_argv
from ichat_lifecycle.fleet.engine_words import from_wire
from ichat_lifecycle.printable import brief


def main() -> int:
    """Returns 0; what is wrong is an answer, too."""
    follow(os.getppid())  # whoever has asked may end meanwhile
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM's import may print
    workers = json.load(sys.stdin)
    try:
        layout = load(lambda step: None)
    except LifecycleError as error:
        _write(answers, {"error": error.line()})
    except Exception as error:
        found = import_error(error)
        _write(answers, {"failed": {"root_cause": found.root_cause, "hint": found.hint}})
    else:
        _write(answers, {"workers": [_answer_as(layout, worker) for worker in workers]})
    return 0


def _write(answers: TextIO, document: Mapping[str, Any]) -> None:
    with answers:
        json.dump(document, answers)


def _answer_as(layout: Layout, worker: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer with the worker's own variables, which the process of the next one has not."""
    before = dict(os.environ)
    os.environ.update(worker["env"])
    try:
        return _answer(layout, worker)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _answer(layout: Layout, worker: Mapping[str, Any]) -> Mapping[str, Any]:
    """The words of a worker's keys, and what is wrong with any or with all of them together."""
    parser = layout.make_arg_parser(layout.argument_parser())
    words, wrong = engine_argv(from_wire(worker["keys"]), parser, worker["ours"])
    found = [asdict(one) for one in wrong]
    headers: dict[str, Any] = {}
    if not found:
        arguments = VllmArguments(argparse.Namespace(), [*worker["argv"], *words])
        try:
            headers = _headers(arguments.parse_now())
        except LifecycleError as error:
            found = [asdict(WrongKey(None, error.message, error.hint))]
        except Exception as error:  # vLLM's own code, on a value that it did not expect
            what = f"vLLM's parser fails: {type(error).__name__}: {error}"
            found = [asdict(WrongKey(None, brief(what)))]
    return {"words": words, "wrong": found, "headers": headers}


def _headers(parsed: ParsedArguments) -> dict[str, Any]:
    """The flags that add headers to answers; see answer_headers."""
    given = vars(parsed.vllm)
    return {name: given[name] for name in (*LISTS, *SWITCHES) if name in given}


if __name__ == "__main__":
    sys.exit(main())
