"""A YAML file in which everything knows where it stands, with `${NAME}` from the environment.

Values are those of YAML's safe loader, with three exceptions: a scalar without quotes keeps its
text beside the value (see scalars); a key is always text; and a key that stands twice is an error,
as the second one would silently win.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ichat_lifecycle.errors import InputMissingError
from ichat_lifecycle.scalars import Location, Plain, is_json_number

# Values in a document, those that aliases repeat counted each time. A file of people has hundreds.
VALUES_MAX = 50_000

_MERGE = "tag:yaml.org,2002:merge"
_STRING = "tag:yaml.org,2002:str"
_ENDLESS = "it contains itself"
_TOO_DEEP = "too many values within each other"
_TOO_MANY = f"more than {VALUES_MAX} values, those that aliases repeat included"
_WORDS = {"true": True, "false": False, "": None}
# $$ is a dollar; ${NAME} a variable, ${NAME:-text} one with a default.
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\})")


@dataclass(frozen=True, order=True)
class Place:
    """Where something stands: line and column from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """Something wrong with the file, and what to do about it."""

    place: Place
    message: str
    hint: str | None = None
    doubt: bool = False  # it cannot be known here

    def told(self, path: Path) -> str:
        """For example `fleet.yaml:7:5: port: 70000 is no port (expected 1 to 65535)`."""
        hint = f" ({self.hint})" if self.hint else ""
        what = "warning: " if self.doubt else ""
        return f"{path}:{self.place.line}:{self.place.column}: {what}{self.message}{hint}"


@dataclass
class Document:
    """What a file says.

    Attributes:
        value: None where the file is not YAML at all; see `problems`.
        problems: those of the text itself.
    """

    value: Any = None
    problems: list[Problem] = field(default_factory=list)
    _places: dict[Location, Place] = field(default_factory=dict)
    _secrets: set[Location] = field(default_factory=set)
    _unknown: set[Location] = field(default_factory=set)

    def is_secret(self, location: Location) -> bool:
        """Whether a variable of the environment is in it, or it is for one: not to be shown."""
        return location in self._secrets or "env" in location

    def is_unknown(self, location: Location) -> bool:
        """Whether it has been told already that there is nothing to be read there."""
        return location in self._unknown

    def keep_unknown(self, location: Location) -> None:
        self._unknown.add(location)

    def keep_secret(self, location: Location) -> None:
        self._secrets.add(location)

    def place(self, location: Location) -> Place:
        """Where it stands; of what is not there, where the nearest thing around it stands."""
        while location and location not in self._places:
            location = location[:-1]
        return self._places.get(location, Place(1, 1))

    def note(self, location: Location, node: yaml.Node) -> None:
        self._places[location] = _place(node.start_mark)


class _TooManyError(Exception):
    """A document of a few lines can stand for gigabytes of values."""


def read(path: Path, environment: Mapping[str, str] | None = None) -> Document:
    """Reads a file.

    Args:
        environment: where `${NAME}` is looked up; None: it has no meaning.

    Raises:
        InputMissingError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputMissingError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        return Document(problems=[Problem(Place(1, 1), f"not UTF-8: {error.reason}")])
    return parse(text, environment)


def parse(text: str, environment: Mapping[str, str] | None = None) -> Document:
    """The same, of a text."""
    document = Document()
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(mark) if mark else Place(1, 1)
        line = text.splitlines()[place.line - 1 : place.line]
        hint = None
        if "${" in "".join(line):
            hint = 'within {…} and […] quote it: "${NAME}"'
        document.problems.append(
            Problem(place, f"not YAML: {error.problem or error.context}", hint)
        )
        return document
    except yaml.YAMLError as error:  # a character that YAML does not allow
        document.problems.append(Problem(Place(1, 1), f"not YAML: {error}"))
        return document
    except RecursionError:
        document.problems.append(Problem(Place(1, 1), _TOO_DEEP))
        return document
    if node is not None:
        _build(document, node, environment)
    return document


def _build(document: Document, node: yaml.Node, environment: Mapping[str, str] | None) -> None:
    try:
        document.value = _Builder(document, environment).build(node, ())
    except RecursionError:
        document.problems.append(Problem(_place(node.start_mark), _TOO_DEEP))
    except _TooManyError:
        document.problems.append(Problem(_place(node.start_mark), _TOO_MANY))


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1)


class _Builder:
    """Values out of nodes, noting where each stands."""

    def __init__(self, document: Document, environment: Mapping[str, str] | None) -> None:
        self._document = document
        self._environment = environment
        self._within: list[yaml.Node] = []
        self._scalars = yaml.constructor.SafeConstructor()
        self._count = 0

    def build(self, node: yaml.Node, location: Location) -> Any:
        self._count += 1
        if self._count > VALUES_MAX:
            raise _TooManyError
        self._document.note(location, node)
        if any(node is outer for outer in self._within):
            self._tell(node, _ENDLESS)
            return None
        self._within.append(node)
        try:
            return self._built(node, location)
        finally:
            self._within.pop()

    def _built(self, node: yaml.Node, location: Location) -> Any:
        match node:
            case yaml.MappingNode():
                return self._mapping(node, location)
            case yaml.SequenceNode():
                items = enumerate(node.value)
                return [self.build(item, (*location, number)) for number, item in items]
            case _:
                return self._scalar(node, location)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        built: dict[str, Any] = {}
        own: dict[str, yaml.Node] = {}
        for key, value in self._pairs(node):
            if key.tag == _MERGE:
                built |= self._merged(value, location)
                continue
            name = str(self._scalar_text(key))
            if name in own:
                first = _place(own[name].start_mark)
                self._tell(key, f"{name} stands here twice", f"first in line {first.line}")
                continue
            own[name] = key
            built[name] = self.build(value, (*location, name))
            self._document.note((*location, name), key)
        return built

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """What is merged in first: the mapping's own keys win, wherever they stand."""
        yield from (pair for pair in node.value if pair[0].tag == _MERGE)
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            if isinstance(key, yaml.ScalarNode):
                yield key, value
            else:
                self._tell(key, "a key has to be a word")

    def _merged(self, node: yaml.Node, location: Location) -> dict[str, Any]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for one in reversed(nodes):  # of several the first one wins
            if not isinstance(one, yaml.MappingNode):
                self._tell(one, "<< takes a mapping, or a list of them")
            elif any(one is outer for outer in self._within):
                self._tell(one, _ENDLESS)
            else:
                self._within.append(one)
                merged |= self._mapping(one, location)
                self._within.pop()
        return merged

    def _scalar(self, node: yaml.Node, location: Location = ()) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return None
        text = self._expanded(node)
        if text is None:
            self._document.keep_unknown(location)
            return node.value
        if text != node.value:
            self._document.keep_secret(location)
            value = self._of_variable(node, text)
            return value if isinstance(value, str) else Plain(text, value)
        try:
            value = self._scalars.construct_object(node)
        except (yaml.constructor.ConstructorError, ValueError, LookupError) as error:
            self._tell(node, f"cannot be read: {getattr(error, 'problem', None) or error}")
            return None
        # JSON has no more kinds than these: a date is the text that it is written with.
        value = value if isinstance(value, str | int | float | None) else text
        if node.style is not None or value is None:
            return value
        # To JSON 1e6 is a number. Other numbers that are text here have the tag !!str.
        is_number = is_json_number(text) and "e" in text.lower()
        return Plain(text, value) if is_number or not isinstance(value, str) else value

    def _scalar_text(self, node: yaml.Node) -> str:
        """Of a key: `no` and `0123` are names like any other."""
        assert isinstance(node, yaml.ScalarNode), "other keys are left out"
        text = self._expanded(node)
        return str(node.value) if text is None else text

    def _of_variable(self, node: yaml.ScalarNode, text: str) -> Any:
        """What a variable holds, as if it stood there: a port is a number.

        Text that YAML would change by that, such as 0x1f or 00123, may be a key: it stays text.
        """
        if node.style is not None or node.tag != _STRING:
            return text
        if text in _WORDS:
            return _WORDS[text]
        for number in (int, float):
            with contextlib.suppress(ValueError):
                if str(number(text)) == text:
                    return number(text)
        return text

    def _expanded(self, node: yaml.ScalarNode) -> str | None:
        """With its variables in their places; None where one is missing."""
        if self._environment is None:
            return str(node.value)
        environment, missing = self._environment, list[str]()

        def value(match: re.Match[str]) -> str:
            name = match["name"]
            if name is None:
                return "$"
            if name in environment:
                return environment[name]
            if match["default"] is not None:
                return str(match["default"])
            self._tell(
                node,
                f"${{{name}}}: there is no such environment variable",
                f"set it, or write ${{{name}:-DEFAULT}}",
            )
            missing.append(name)
            return ""

        text = _VARIABLE.sub(value, str(node.value))
        return None if missing else text

    def _tell(self, node: yaml.Node, message: str, hint: str | None = None) -> None:
        self._document.problems.append(Problem(_place(node.start_mark), message, hint))
