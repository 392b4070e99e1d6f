"""The nodes of a YAML text, with a bound on all that a text can ask for before it is one.

PyYAML recurses once per level, and raises whatever it meets in the middle of a text that is not
YAML: both end here, with the place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

# Bytes of a file, and characters of a text. A configs.yaml of 100 workers has 50 KB.
TEXT_MAX = 2**20
# Values in a document, those that aliases repeat counted each time. A file of people has hundreds.
# As many take two seconds, and 40 MB.
VALUES_MAX = 20_000
# Levels: a JSON schema in a request to warm up with has ten.
DEPTH_MAX = 64

TOO_LARGE = f"more than {TEXT_MAX:,} bytes"
TOO_DEEP = f"more than {DEPTH_MAX} values within each other"
TOO_MANY = f"more than {VALUES_MAX} values, those that aliases repeat included"

_DOCUMENTS = "more than one document"


@dataclass(frozen=True, order=True)
class Place:
    """Where something stands: line and column from 1."""

    line: int
    column: int


class YamlError(Exception):
    """A text that is not YAML, or asks for too much."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place
        self.message = message


def place_of(mark: Any) -> Place:
    """Where one of PyYAML's marks stands."""
    return Place(mark.line + 1, mark.column + 1)


def place_in(text: str, index: int) -> Place:
    """Where a character of a text stands."""
    before = text[:index]
    return Place(before.count("\n") + 1, len(before) - before.rfind("\n"))


def nodes_of(text: str) -> yaml.Node | None:
    """Return the root of a text; None where there is nothing in it.

    Raises:
        YamlError: it is not YAML, or has too many characters, values, or levels.
    """
    if len(text) > TEXT_MAX:
        raise YamlError(Place(1, 1), TOO_LARGE)
    node: yaml.Node | None = _guarded(text, lambda loader: loader.get_single_node())
    return node


def as_loaded(text: str) -> Any:
    """Return what PyYAML's own safe loader makes of a text, such as numbers for dates.

    Only for a text that our own reader has taken: aliases and merges are not counted.

    Raises:
        YamlError: it takes something for another type, and then cannot read it: 2024-13-45.
    """
    return _guarded(text, lambda loader: loader.get_single_data())


def _guarded(text: str, load: Callable[[_Loader], Any]) -> Any:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        what = f"not YAML: the character U+{error.character:04X} cannot stand here"
        raise YamlError(place_in(text, error.position), what) from None
    try:
        return load(loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = place_of(mark) if mark else Place(1, 1)
        raise YamlError(place, _words(error)) from None
    except YamlError:
        raise
    except Exception as error:  # "\UFFFFFFFF" is an OverflowError, %YAML 1.999… a ValueError
        raise YamlError(place_of(loader.get_mark()), f"not YAML: {error}") from None
    finally:
        loader.dispose()


def _words(error: yaml.MarkedYAMLError) -> str:
    if error.problem == "but found another document":
        return f"not YAML: {_DOCUMENTS}"
    return f"not YAML: {error.problem or error.context}"


class _Loader(yaml.SafeLoader):
    """Counts values and levels while they are composed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._count += 1
        self._depth += 1
        # A key of a mapping is a node, too, and no value.
        if self._count > 2 * VALUES_MAX:
            raise self._beyond(TOO_MANY)
        if self._depth > DEPTH_MAX:
            raise self._beyond(TOO_DEEP)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _beyond(self, message: str) -> YamlError:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        return YamlError(place_of(event.start_mark), message)
