"""JSON that somebody else has written: read without a surprise, or refused.

Python's own parser recurses, takes NaN, and makes integers that nothing can print again. Whatever
comes back from here can be written as JSON once more, and its numbers fit into those of others.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic_core import from_json

INTEGER_MAX = 2**63


def parse(text: str | bytes) -> Any:
    """What the text says.

    Raises:
        ValueError: it is no JSON; it is nested deeper than about 200 levels, holds an infinity, NaN
            or an integer of more than 64 bits, or text that is not Unicode.
    """
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")  # the parser refuses what is no UTF-8
    value = from_json(text, allow_inf_nan=False)
    _check(value)
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The same of an object. Raises ValueError for anything else, too."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError("this is JSON, but not an object")
    return value


def _check(value: Any) -> None:
    """1e999 is read as an infinity, whatever the parser was told. The depth is bounded by now."""
    if isinstance(value, dict):
        for one in value.values():
            _check(one)
    elif isinstance(value, list):
        for one in value:
            _check(one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    elif isinstance(value, int) and abs(value) > INTEGER_MAX:
        raise ValueError("an integer has more than 64 bits")
