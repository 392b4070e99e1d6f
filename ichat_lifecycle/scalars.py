"""Plain scalars of YAML in the types that the keys have.

YAML 1.1 guesses a type from the shape of a word: `0123456` is octal, `12:30:00` a number to base
60, `3.10` is 3.1, `no` is false. A reader of the file sees text. So a plain scalar keeps its text
beside YAML's guess until the type of its key is known: text stays as it is written, a number that
would surprise is a complaint, and in JSON, which has no types of keys, so is what can be read in
two ways.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Location = tuple[str | int, ...]
# Gets where in the value it is, what is wrong, and what to do about it.
Complain = Callable[[Location, str, str], None]

_NUMBERS = (int, float)
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_BASE_60 = re.compile(r"[-+]?[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)?(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_LIKE_A_VERSION = re.compile(r"-?[0-9]+\.[0-9]*0")  # 3.10, but not the 0.0 and 3.0 of a float
_WHOLE = re.compile(r"-?[0-9]+\.0")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")


class Plain(str):
    """The text of a scalar without quotes. `value` is what YAML takes it for."""

    __slots__ = ("value",)
    value: str | int | float | None

    def __new__(cls, text: str, value: Any) -> Plain:
        plain = super().__new__(cls, text)
        plain.value = value
        return plain


def is_json_number(text: str) -> bool:
    """Whether JSON would have it as a number; `1e6` is text to YAML 1.1."""
    return any(map(str.isdecimal, text)) and bool(_JSON_NUMBER.fullmatch(text))


def is_null(value: Any) -> bool:
    """Whether a key is there without a value, or with that of an empty variable."""
    return value is None or (isinstance(value, Plain) and value.value is None)


def surprise(plain: Plain) -> str | None:
    """Why a number is not the one that its text shows; None where it is."""
    if isinstance(plain.value, int | float) and not isinstance(plain.value, bool):
        if _OCTAL.fullmatch(plain):
            return "a number that begins with 0 is octal in YAML"
        if _BASE_60.fullmatch(plain):
            return "a number with colons is to base 60 in YAML"
    return None


FAILED = object()


def converted(word: str, kind: Any) -> Any:
    """What a parser's `type` makes of a word; FAILED where it does not take it."""
    try:
        return kind(word) if callable(kind) else word
    except Exception:  # vLLM's own conversions raise whatever they meet
        return FAILED


# Keys of ours -------------------------------------------------------------------------------------


def typed(value: Any, annotation: Any, complain: Complain, at: Location = ()) -> Any:
    """A value as its key's type wants it: text, a number, a switch, or lists and mappings of these.

    Args:
        annotation: of a field of a pydantic model, or a model itself. Other types are left to
            validation; `Any` is JSON.
        complain: called with each value that would have to be guessed.
    """
    kinds = tuple(_kinds(annotation))
    match value:
        case Plain():
            items = _of_items(kinds)  # of a list that one item may stand for
            alone = items is not _Untyped and Any not in kinds
            return _scalar(value, _kinds(items) if alone else kinds, complain, at)
        case dict():
            return {
                key: typed(item, _of_key(kinds, key), complain, (*at, key))
                for key, item in value.items()
            }
        case list():
            inner = _of_items(kinds)
            return [typed(item, inner, complain, (*at, n)) for n, item in enumerate(value)]
        case _:
            return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """All types that an annotation allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(args[0])
    if origin in (Union, types.UnionType):
        return tuple(kind for arg in args for kind in _kinds(arg))
    if origin is Literal:
        return tuple({type(arg) for arg in args})
    return (annotation,)


def _of_key(kinds: tuple[Any, ...], key: str) -> Any:
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(key)
            return field.annotation if field else _Untyped
        if get_origin(kind) in (dict, Mapping):
            return get_args(kind)[1]
    return Any if Any in kinds else _Untyped


def _of_items(kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        if get_origin(kind) in (list, tuple):
            return get_args(kind)[0]
    return Any if Any in kinds else _Untyped


class _Untyped:
    """Stands for the type of what is not a key of ours: it stays plain."""


def _scalar(plain: Plain, kinds: tuple[Any, ...], complain: Complain, at: Location) -> Any:
    if Any in kinds:
        return as_json(plain, complain, at)
    if _Untyped in kinds:
        return plain
    text = str in kinds
    numeric = any(number in kinds for number in _NUMBERS)
    if plain.value is None:
        value: Any = str(plain) if text and type(None) not in kinds else None
    elif isinstance(plain.value, bool):
        value = str(plain) if text and bool not in kinds else plain.value
        if numeric and not text:
            complain(at, "expected a number", _as_yaml(plain))
    elif numeric:
        value = plain.value  # text that is no number is left for validation
        if (why := surprise(plain)) is not None:
            complain(at, why, f"{_as_yaml(plain)}: write that, or quote it where text is meant")
    else:
        value = str(plain) if text else plain.value
    return value


def _as_yaml(plain: Plain) -> str:
    """What YAML takes it for."""
    value = str(plain.value).lower() if isinstance(plain.value, bool) else str(plain.value)
    return f"it is {value}" if value == plain.lower() else f"{plain} is {value} in YAML"


# JSON ---------------------------------------------------------------------------------------------


def as_json(value: Any, complain: Complain, at: Location = ()) -> Any:
    """A value as JSON has it. A plain scalar that is text to one reader, and something else to
    another, has to be quoted."""
    match value:
        case Plain():
            return _json_scalar(value, complain, at)
        case dict():
            return {key: as_json(item, complain, (*at, key)) for key, item in value.items()}
        case list():
            return [as_json(item, complain, (*at, n)) for n, item in enumerate(value)]
        case _:
            return value


def _json_scalar(plain: Plain, complain: Complain, at: Location) -> Any:
    if plain.value is None:
        return None
    if plain in _TRUE or plain in _FALSE:
        return plain in _TRUE
    if is_json_number(plain):
        looks_like_text = _LIKE_A_VERSION.fullmatch(plain) and not _WHOLE.fullmatch(plain)
        number = int(plain) if plain.lstrip("-").isdecimal() else float(plain)
        if not looks_like_text and math.isfinite(number):  # JSON has no infinity for 1e999
            return number
    shown = str(plain.value).lower() if isinstance(plain.value, bool) else plain.value
    is_json = not isinstance(plain.value, float) or math.isfinite(plain.value)
    other = f", or {shown}" if is_json else ""
    complain(at, "it can be read in two ways", f'write "{plain}" with quotes{other}')
    return plain.value
