"""A YAML file in which everything knows where it stands, with `${NAME}` from the environment.

Values are those of YAML's safe loader, with these exceptions: a scalar without quotes keeps its
text beside the value (see scalars); a key is always text; and a key that stands twice, a tag that
names another type, and a NUL character are errors. However little a text is, it can stand for
gigabytes: all that it comes to is counted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ichat_lifecycle.input_file import TooLargeError, read_input
from ichat_lifecycle.printable import brief
from ichat_lifecycle.scalars import Location, Plain, is_json_number
from ichat_lifecycle.yaml_nodes import (
    DEPTH_MAX,
    TEXT_MAX,
    TOO_DEEP,
    TOO_LARGE,
    TOO_MANY,
    VALUES_MAX,
    Place,
    YamlError,
    nodes_of,
    place_in,
    place_of,
)

__all__ = ["VALUES_MAX", "Document", "Place", "Problem", "parse", "read"]

KEY_MAX = 1000  # characters of a key
NUMBER_MAX = 100  # characters; to base 60, a megabyte takes YAML's loader minutes
# Characters of all values, those that aliases repeat counted each time, with their variables.
CHARACTERS_MAX = 2 * TEXT_MAX
VARIABLE_MIN = 4  # characters of a variable's value that is looked for in messages

_TAG = "tag:yaml.org,2002:"
_MERGE, _STRING, _NULL = f"{_TAG}merge", f"{_TAG}str", f"{_TAG}null"
_NUMBERS = {f"{_TAG}int": "a whole number", f"{_TAG}float": "a number"}
_SWITCH = {f"{_TAG}bool": "true or false"}
# JSON has no more kinds than these: a date, and a lone =, are the text that they are written with.
_TEXTS = (_STRING, f"{_TAG}timestamp", f"{_TAG}value")
_COLLECTIONS = (f"{_TAG}map", f"{_TAG}seq")
_ENDLESS = "it contains itself"
_TOO_LONG = f"more than {CHARACTERS_MAX:,} characters, with aliases and variables in their places"
_WORDS = {"true": True, "false": False, "": None}
# $$ is a dollar; ${NAME} a variable, ${NAME:-text} one with a default.
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\})")
# No argument, variable, path, or UTF-8 text can have them.
_NOWHERE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """Something wrong with the file, and what to do about it."""

    place: Place
    message: str
    hint: str | None = None
    doubt: bool = False  # it cannot be known here

    def told(self, path: Path) -> str:
        """For example `fleet.yaml:7:5: port: 70000 is no port (expected 1 to 65535)`."""
        hint = f" ({brief(self.hint)})" if self.hint else ""
        what = "warning: " if self.doubt else ""
        where = f"{brief(str(path))}:{self.place.line}:{self.place.column}"
        return f"{where}: {what}{brief(self.message)}{hint}"


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
    _variables: dict[str, str] = field(default_factory=dict)  # value -> name

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

    def keep_variable(self, name: str, value: str) -> None:
        self._variables[value] = name

    def as_written(self, text: str) -> str:
        """Return text with `${NAME}` in place of each value that a variable gave.

        Values of fewer than 4 characters stay: they stand for something else more often than not.
        """
        for value in sorted(self._variables, key=len, reverse=True):
            if len(value) >= VARIABLE_MIN:
                text = text.replace(value, f"${{{self._variables[value]}}}")
        return text

    def place(self, location: Location) -> Place:
        """Where it stands; of what is not there, where the nearest thing around it stands."""
        while location and location not in self._places:
            location = location[:-1]
        return self._places.get(location, Place(1, 1))

    def note(self, location: Location, node: yaml.Node) -> None:
        self._places[location] = place_of(node.start_mark)


def read(path: Path, environment: Mapping[str, str] | None = None) -> Document:
    """Reads a file.

    Args:
        environment: where `${NAME}` is looked up; None: it has no meaning.

    Raises:
        InputMissingError: it cannot be read, or is not a regular file.
    """
    try:
        content = read_input(path, TEXT_MAX)
    except TooLargeError:
        return Document(problems=[Problem(Place(1, 1), TOO_LARGE)])
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = place_in(content[: error.start].decode("utf-8"), error.start)
        message = f"not UTF-8: {error.reason}"
        return Document(problems=[Problem(place, message, "save the file as UTF-8")])
    return parse(text, environment)


def parse(text: str, environment: Mapping[str, str] | None = None) -> Document:
    """The same, of a text."""
    document = Document()
    try:
        node = nodes_of(text)
        if node is not None:
            document.value = _Builder(document, environment).build(node, ())
    except YamlError as error:
        line = text.split("\n", error.place.line)[error.place.line - 1 : error.place.line]
        hint = None
        if error.message.startswith("not YAML") and "${" in "".join(line):
            hint = 'within {…} and […] quote it: "${NAME}"'
        document.problems.append(Problem(error.place, error.message, hint))
    return document


class _Builder:
    """Values out of nodes, noting where each stands. Raises YamlError where they are too many."""

    def __init__(self, document: Document, environment: Mapping[str, str] | None) -> None:
        self._document = document
        self._environment = environment
        self._within: list[yaml.Node] = []
        self._scalars = yaml.constructor.SafeConstructor()
        self._count = self._characters = 0

    def build(self, node: yaml.Node, location: Location) -> Any:
        self._spend(node)
        self._document.note(location, node)
        if any(node is outer for outer in self._within):
            self._tell(node, _ENDLESS)
            return None
        self._within.append(node)
        try:
            return self._built(node, location)
        finally:
            self._within.pop()

    def _spend(self, node: yaml.Node, characters: int = 0) -> None:
        """Counts one more value, or the characters of one."""
        self._count += not characters
        self._characters += characters
        if self._count > VALUES_MAX:
            raise YamlError(place_of(node.start_mark), TOO_MANY)
        if self._characters > CHARACTERS_MAX:
            raise YamlError(place_of(node.start_mark), _TOO_LONG)
        if len(self._within) >= DEPTH_MAX:  # by aliases
            raise YamlError(place_of(node.start_mark), TOO_DEEP)

    def _built(self, node: yaml.Node, location: Location) -> Any:
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
            return self._refuse_tag(node, location)
        match node:
            case yaml.MappingNode():
                return self._mapping(node, location)
            case yaml.SequenceNode():
                items = enumerate(node.value)
                return [self.build(item, (*location, number)) for number, item in items]
            case _:
                return self._scalar(node, location)

    def _refuse_tag(self, node: yaml.Node, location: Location) -> None:
        shown = node.tag.replace(_TAG, "!!")
        self._tell(node, f"the tag {brief(shown, 100)} cannot stand here", "leave it out")
        self._document.keep_unknown(location)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        built: dict[str, Any] = {}
        own: dict[str, yaml.Node] = {}
        for key, value in self._pairs(node):
            merges = key.tag == _MERGE
            name = "<<" if merges else self._key(key)
            if name is None:
                continue
            if name in own:
                first = place_of(own[name].start_mark)
                self._tell(key, f"{name} stands here twice", f"first in line {first.line}")
                continue
            own[name] = key
            if merges:
                built |= self._merged(value, location)
                continue
            built[name] = self.build(value, (*location, name))
            self._document.note((*location, name), key)
        return built

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """What is merged in first: the mapping's own keys win, wherever they stand."""
        yield from (pair for pair in node.value if pair[0].tag == _MERGE)
        yield from (pair for pair in node.value if pair[0].tag != _MERGE)

    def _key(self, node: yaml.Node) -> str | None:
        """The text of a key: `no` and `0123` are names like any other. None: it is wrong."""
        if not isinstance(node, yaml.ScalarNode):
            self._spend(node)
            self._tell(node, "a key has to be a word")
            return None
        if len(node.value) > KEY_MAX:
            self._spend(node)
            self._tell(node, f"a key of more than {KEY_MAX} characters")
            return None
        text = self._expanded(node)
        return str(node.value) if text is None or self._is_nowhere(node, text) else text

    def _merged(self, node: yaml.Node, location: Location) -> dict[str, Any]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for one in reversed(nodes):  # of several the first one wins
            self._spend(one)
            if not isinstance(one, yaml.MappingNode):
                self._tell(one, "<< takes a mapping, or a list of them")
            elif any(one is outer for outer in self._within):
                self._tell(one, _ENDLESS)
            else:
                self._within.append(one)
                merged |= self._mapping(one, location)
                self._within.pop()
        return merged

    def _scalar(self, node: yaml.Node, location: Location) -> Any:
        assert isinstance(node, yaml.ScalarNode), "there are three kinds of nodes"
        text = self._expanded(node)
        if text is None or self._is_nowhere(node, text):
            self._document.keep_unknown(location)
            return node.value if text is None else None
        if text != node.value:
            self._document.keep_secret(location)
            value = self._of_variable(node, text)
            return value if isinstance(value, str) else Plain(text, value)
        return self._of_tag(node, text, location)

    def _of_tag(self, node: yaml.ScalarNode, text: str, location: Location) -> Any:
        kind = (_NUMBERS | _SWITCH).get(node.tag)
        if kind is None and node.tag not in (*_TEXTS, _NULL):
            return self._refuse_tag(node, location)
        if node.tag in _NUMBERS and len(text) > NUMBER_MAX:
            what = f"a number of more than {NUMBER_MAX} characters"
            self._tell(node, what, "quote it where text is meant")
            self._document.keep_unknown(location)
            return None
        if node.tag in _TEXTS:
            # To JSON 1e6 is a number. Other numbers that are text here have the tag !!str.
            is_number = node.style is None and is_json_number(text) and "e" in text.lower()
            return Plain(text, text) if is_number and len(text) <= NUMBER_MAX else text
        try:
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ArithmeticError, ValueError, LookupError):
            self._tell(node, f"{brief(text, 100)!r} is not {kind}")
            self._document.keep_unknown(location)
            return None
        return None if value is None else Plain(text, value)

    def _is_nowhere(self, node: yaml.Node, text: str) -> bool:
        """Complains of a character that can be used nowhere."""
        found = _NOWHERE.search(text)
        if found is None:
            return False
        what = "a NUL character" if found[0] == "\0" else "half of a character (a surrogate)"
        self._tell(node, f"{what} is in it", "no argument, variable, or path can have one")
        return True

    def _of_variable(self, node: yaml.ScalarNode, text: str) -> Any:
        """What a variable holds, as if it stood there: a port is a number.

        Text that YAML would change by that, such as 0x1f or 00123, may be a key: it stays text.
        """
        if node.style is not None or node.tag != _STRING or len(text) > NUMBER_MAX:
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
        self._spend(node, len(node.value))
        if self._environment is None:
            return str(node.value)
        environment, missing = self._environment, set[str]()

        def value(match: re.Match[str]) -> str:
            name = match["name"]
            if name is None:
                return "$"
            given = environment.get(name, match["default"])
            if given is None:
                missing.add(name)
                return ""
            if name in environment:
                self._document.keep_variable(name, given)
            self._spend(node, len(given))
            return given

        text = _VARIABLE.sub(value, str(node.value))
        for name in sorted(missing):
            what = f"${{{brief(name, 100)}}}: there is no such environment variable"
            self._tell(node, what, f"set it, or write ${{{brief(name, 100)}:-DEFAULT}}")
        return None if missing else text

    def _tell(self, node: yaml.Node, message: str, hint: str | None = None) -> None:
        self._document.problems.append(Problem(place_of(node.start_mark), message, hint))
