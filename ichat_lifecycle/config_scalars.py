"""Values of a `--config` file that vLLM's reader takes for others than those that stand there.

vLLM loads the file as YAML 1.1 and writes each value as a word: `revision: 0012345` becomes
`--revision 5349`, and `served-model-name: no` nothing at all. vLLM cannot be changed here, so such
a value is an error that asks for quotes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ichat_lifecycle.document import Document, read
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.redact import is_secret
from ichat_lifecycle.scalars import FAILED, Location, Plain, as_json, converted, surprise


def check_config(path: Path, content: Mapping[Any, Any], parser: argparse.ArgumentParser) -> None:
    """Compares what stands in a `--config` file with what the parser would get of it.

    Args:
        content: the file as a YAML loader has it.

    Raises:
        ArgumentsError: a value would become another one, or a key stands twice; names the line.
    """
    document = read(path)
    for problem in document.problems:
        raise ArgumentsError(f"--config {problem.told(path)}")
    check = _Check(path, document)
    for key, written in document.value.items():
        action = parser._option_string_actions.get(f"--{key.replace('_', '-')}")
        if action is not None and key in content:
            check.value(written, content[key], action, (key,))


class _Check:
    def __init__(self, path: Path, document: Document) -> None:
        self._path = path
        self._document = document

    def value(self, written: Any, loaded: Any, action: argparse.Action, at: Location) -> None:
        """Raises ArgumentsError."""
        match written:
            case dict():
                as_json(written, self._complain, at)
            case list():
                for number, pair in enumerate(zip(written, loaded, strict=True)):
                    self.value(*pair, action, (*at, number))
            case _:
                self._scalar(written, loaded, action, at)

    def _scalar(self, written: Any, loaded: Any, action: argparse.Action, at: Location) -> None:
        if action.nargs == 0:
            return
        if written is None:
            if converted("None", action.type) == "None":
                self._complain(at, "there is no value", "vLLM would take the word None")
            return
        of_text = converted(str(written), action.type)
        is_other = of_text is not FAILED and of_text != converted(str(loaded), action.type)
        # A switch in place of a value leaves it out, or leaves out the whole flag.
        is_switch = isinstance(loaded, bool)
        if is_switch or is_other or (isinstance(written, Plain) and surprise(written)):
            self._refuse(str(written), loaded, at)

    def _refuse(self, text: str, loaded: Any, at: Location) -> None:
        shown = str(loaded).lower() if isinstance(loaded, bool) else loaded
        if self._is_hidden(at):
            self._complain(at, "YAML takes this for another value", "quote it")
        self._complain(at, f"{text} is {shown} in YAML", f'write "{text}" with quotes, or {shown}')

    def _is_hidden(self, at: Location) -> bool:
        return any(is_secret(str(part)) for part in at)

    def _complain(self, at: Location, message: str, hint: str) -> None:
        place = self._document.place(at)
        where = f"--config {self._path}:{place.line}:{place.column}: {at[0]}"
        raise ArgumentsError(f"{where}: {message}", hint=None if self._is_hidden(at) else hint)
