"""Secrets stay out of what people see: by the name of their key, by what stands around them in a
text, and by their own text wherever it stands."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ichat_lifecycle.secret_names import is_secret, words_of
from ichat_lifecycle.secret_texts import hide_in_text, hide_in_url
from ichat_lifecycle.secret_values import LENGTH_MIN, KnownValues

__all__ = [
    "PLACEHOLDER",
    "SECRET_LENGTH_MIN",
    "Secrets",
    "is_secret",
    "redact",
    "scrub_unknown",
    "secrets_in",
]

PLACEHOLDER = "***"
SECRET_LENGTH_MIN = LENGTH_MIN

_WORDS = frozenset({"false", "none", "null", "true"})  # no secrets, whatever key they stand under
_NAME_KEYS = ("name", "key", "header")  # of an item that has its name and its value beside it
_NAMES_ONLY = re.compile(r"allow(?:ed)?_(?:headers|credentials)|expose_headers")
_TEMPLATE = re.compile(r"\{[{%][-\s]")  # names in it are those of a program
_PAIR = re.compile(r"\s*[\w.-]+=([^,;&\s]+)\s*")
_VALUE_MIN = 8  # characters of a header's value that is secret only by the others around it


def redact(value: Any) -> Any:
    """A copy of nested mappings and sequences with each secret replaced by "***".

    Hidden are values under a key that looks secret, those after a flag or a header's name that does
    in a list, and in texts passwords and parameters of URLs, `name=value`, and credentials. None,
    booleans and "" are no secrets.
    """
    return _walk(value, lambda _: PLACEHOLDER)


def _walk(value: Any, hide: Callable[[Any], Any]) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        named = _secret_by_its_name(value)
        return {
            key: _pair("secret" if named and key == "value" else str(key), item, hide)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = _sequence(value, hide)
        return tuple(items) if isinstance(value, tuple) else items
    return _text(value, hide) if isinstance(value, str) else value


def _secret_by_its_name(item: Mapping[Any, Any]) -> bool:
    """Whether it is such as `{name: HF_TOKEN, value: …}`."""
    names = (item.get(key) for key in _NAME_KEYS)
    return any(isinstance(name, str) and is_secret(name) for name in names)


def _pair(key: str, value: Any, hide: Callable[[Any], Any]) -> Any:
    if value is None or isinstance(value, bool) or value == "" or not is_secret(key):
        return value if _NAMES_ONLY.fullmatch(words_of(key)) else _walk(value, hide)
    return hide(value)


def _sequence(items: list[Any] | tuple[Any, ...], hide: Callable[[Any], Any]) -> list[Any]:
    if _is_named_value(items):
        return [items[0], hide(items[1])]
    walked = []
    flag = ""
    for item in items:
        if isinstance(item, str) and item.startswith("-") and not _is_number(item):
            name, equals, value = item.partition("=")
            flag = "" if equals else name
            walked.append(f"{name}={_pair(name, value, hide)}" if equals else item)
        else:
            # --api-key takes several values: all are hidden, up to the next flag.
            walked.append(_pair(flag, item, hide))
    return walked


def _is_named_value(items: list[Any] | tuple[Any, ...]) -> bool:
    """Whether it is such as `["Authorization", "Bearer …"]`."""
    words = [item for item in items if isinstance(item, str) and not item.startswith("-")]
    return len(words) == len(items) == len(("name", "value")) and is_secret(words[0])


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-[0-9.]+", word) is not None


def _text(text: str, hide: Callable[[Any], Any]) -> str:
    if text.lstrip().startswith(("{", "[")):
        try:
            data = json.loads(text)
            walked = _walk(data, hide)
            return text if walked == data else json.dumps(walked)
        except (ValueError, RecursionError):  # none, or of too many levels
            pass
    hide_text: Callable[[str], str] = lambda found: str(hide(found))  # noqa: E731
    found = hide_in_url(text, hide_text)
    if found is None:
        found = text if _TEMPLATE.search(text) else hide_in_text(text, hide_text)
    return found


class Secrets:
    """The secrets themselves, to be struck out of texts that have no keys, such as log lines.

    May be added to at any time; `scrub` may be called from any thread.
    """

    def __init__(self) -> None:
        self._known = KnownValues()

    def add(self, *texts: str | None) -> None:
        """Adds secrets; those of fewer than 4 characters, and None, are left out."""
        found = [part for text in texts if isinstance(text, str) for part in _parts(text)]
        self._known = self._known.with_(found)

    def collect(self, *values: Any) -> None:
        """Adds what `redact` would hide in parsed arguments, an argv or other nested data."""
        self.add(*(secret for value in values for secret in secrets_in(value)))

    def collect_environment(self, environ: Mapping[str, str]) -> None:
        """Adds the values of all variables that look secret, and passwords within the others."""
        self.collect(dict(environ))

    def redact(self, value: Any) -> Any:
        """As `redact`, and without the known secrets, under whatever key they stand."""
        return self.without_known(redact(value))

    def without_known(self, value: Any) -> Any:
        """A text, or nested data, without the known secrets; cheaper than `scrub`, for much text.

        Numbers stay what they are, also one that is written as a secret is.
        """
        if isinstance(value, dict):
            return {self.without_known(k): self.without_known(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self.without_known(item) for item in value])
        return self._known.scrub(value, PLACEHOLDER) if isinstance(value, str) else value

    def scrub(self, text: str) -> str:
        """`text` with each known secret, and what else looks like one in it, replaced by "***"."""
        return hide_in_text(self._known.scrub(text, PLACEHOLDER), lambda _: PLACEHOLDER)


def scrub_unknown(text: str) -> str:
    """`Secrets.scrub` of those that are not known: by what stands around them."""
    return hide_in_text(text, lambda _: PLACEHOLDER)


def secrets_in(value: Any) -> list[str]:
    """What `redact` would hide in a value, such as a text, an argv or a mapping."""
    found: list[str] = []

    def remember(secret: Any) -> str:
        found.extend(_leaves(secret))
        return PLACEHOLDER

    _walk(value, remember)
    return found


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _parts(text: str) -> Iterator[str]:
    """A secret, and those within it: of a name with its password, of headers, of JSON."""
    if text.strip().lower() in _WORDS:
        return
    yield text
    inner = secrets_in(text)
    yield from inner
    for one in (text, *inner):
        _, colon, password = one.partition(":")
        if colon and not any(map(str.isspace, one)) and not password.startswith("//"):
            yield password
    pairs = [_PAIR.fullmatch(pair) for pair in text.split(",")]
    if all(pairs):
        yield from (pair[1] for pair in pairs if pair and len(pair[1]) >= _VALUE_MIN)
