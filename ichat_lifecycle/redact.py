"""Secrets stay out of what people see: by the name of their key, and by their text."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

PLACEHOLDER = "***"
SECRET_LENGTH_MIN = 4  # characters; shorter ones would hide half of a log
ENVIRONMENT = ("VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of snake_case, kebab-case and camelCase
# Names end with these. Plain `tokens` are counted, a plain `key` sorts.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:auth|authorization|cookie|credentials?|passphrase|passwd|passwords?|secrets?|token"
    r"|apikeys?|(?:access|api|encryption|master|private|secret|shared|signing)_keys?"
    r"|(?:access|api|auth|bearer|hf|hub|refresh)_tokens)$"
)
# A `token` is a secret, but not those that models read and write; and CORS has a switch.
_INNOCENT_NAME = re.compile(
    r"(?:^|_)(?:audio|begin|bos|by|cls|end|eos|first|image|input|last|mask|max|min|next|num|output"
    r"|pad|per|prompt|sep|special|start|stop|think|time|to|unk|video)_token$"
    r"|^allow_credentials$"
)
# What stands before the @ of a URL.
_USERINFO = re.compile(r"(?<=://)[^\s/?#\"'<>]+(?=@)")


def is_secret(name: str) -> bool:
    """Whether a key or flag of this name holds a secret: `hf_token` does, `max_tokens` does not."""
    words = "_".join(_WORD.findall(name)).lower()
    return bool(_SECRET_NAME.search(words)) and not _INNOCENT_NAME.search(words)


def redact(value: Any) -> Any:
    """A copy of nested mappings and sequences with each secret replaced by "***".

    Hidden are values under a key that looks secret, those after a flag that does in a list of
    arguments, and what stands before the @ of a URL. None, booleans and "" are no secrets.
    """
    return _walk(value, lambda _: PLACEHOLDER)


def _walk(value: Any, hide: Callable[[Any], Any]) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _pair(str(key), item, hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = _sequence(value, hide)
        return tuple(items) if isinstance(value, tuple) else items
    return _text(value, hide) if isinstance(value, str) else value


def _pair(key: str, value: Any, hide: Callable[[Any], Any]) -> Any:
    if value is None or isinstance(value, bool) or value == "" or not is_secret(key):
        return _walk(value, hide)
    return hide(value)


def _sequence(items: list[Any] | tuple[Any, ...], hide: Callable[[Any], Any]) -> list[Any]:
    walked = []
    after_secret_flag = False
    for item in items:
        if isinstance(item, str) and item.startswith("-"):
            flag, equals, value = item.partition("=")
            after_secret_flag = not equals and is_secret(flag)
            walked.append(f"{flag}={_pair(flag, value, hide)}" if equals else item)
        elif after_secret_flag:
            # --api-key takes several values: all are hidden, up to the next flag.
            walked.append(hide(item))
        else:
            walked.append(_walk(item, hide))
    return walked


def _text(text: str, hide: Callable[[Any], Any]) -> str:
    if text.lstrip().startswith(("{", "[")):
        try:
            data = json.loads(text)
        except ValueError:
            pass
        else:
            walked = _walk(data, hide)
            return text if walked == data else json.dumps(walked)
    return _USERINFO.sub(lambda match: str(hide(match[0])), text)


class Secrets:
    """The secrets themselves, to be struck out of texts that have no keys, such as log lines.

    May be added to at any time; `scrub` may be called from any thread.
    """

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()
        self._pattern: re.Pattern[str] | None = None

    def add(self, *texts: str | None) -> None:
        """Adds secrets; those of fewer than 4 characters, and None, are left out."""
        # Without the white space around them, as they are used (see credentials).
        bare = {text.strip() for text in texts if isinstance(text, str)}
        long_enough = {text for text in bare if len(text) >= SECRET_LENGTH_MIN}
        # A log line in JSON has them escaped.
        escaped = {json.dumps(text)[1:-1] for text in long_enough}
        self._known |= long_enough | escaped
        # The longest first, so that one that begins with another is hidden whole.
        ordered = sorted(self._known, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def collect(self, *values: Any) -> None:
        """Adds what `redact` would hide in parsed arguments, an argv or other nested data."""
        for value in values:
            _walk(value, self._remember)

    def collect_environment(self, environ: Mapping[str, str]) -> None:
        """Adds the values of VLLM_API_KEY, HF_TOKEN and HUGGING_FACE_HUB_TOKEN."""
        self.add(*(environ.get(name) for name in ENVIRONMENT))

    def _remember(self, value: Any) -> None:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            for item in value:
                self._remember(item)
        elif isinstance(value, str):
            self.add(value)

    def scrub(self, text: str) -> str:
        """`text` with each known secret replaced by "***"."""
        pattern = self._pattern
        return pattern.sub(PLACEHOLDER, text) if pattern else text
