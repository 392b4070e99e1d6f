"""Records without the secrets that are in their texts."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def scrubbed(value: T, scrub: Callable[[str], str]) -> T:
    """A copy of a dataclass, a tuple or a text with each text in it scrubbed; others as they are.

    Members of enumerations are no texts, even of those whose members are strings.
    """
    copy: Any = _scrubbed(value, scrub)
    return cast("T", copy)


def _scrubbed(value: Any, scrub: Callable[[str], str]) -> Any:
    match value:
        case enum.Enum():
            return value
        case str():
            return scrub(value)
        case tuple():
            return tuple(_scrubbed(item, scrub) for item in value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            clean = {name: _scrubbed(item, scrub) for name, item in fields.items()}
            changes = {name: item for name, item in clean.items() if item != fields[name]}
            return dataclasses.replace(value, **changes) if changes else value
    return value
