"""Whether the kernel takes a worker's command line and environment.

What it does not take (E2BIG) fails at each start of the worker, and never otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

# Linux, in bytes: of one argument or NAME=value without its NUL, and of all together.
ONE_MAX = 32 * 4096 - 1
ALL_MAX = 6 * 2**20
POINTER = 8
MARGIN = 16_384  # for what the supervisor adds itself


def too_large(
    words: Sequence[str], own: Mapping[str, str], inherited: Mapping[str, str]
) -> Iterator[tuple[str | None, str]]:
    """Yield what is too large, and why.

    Args:
        words: of the command.
        own: the worker's variables, which win over `inherited`.

    Yields:
        An item of `words`, the name of a variable, or None for all together; and what is wrong.
    """
    alone = [(word, _size(word)) for word in words]
    alone += [(name, _size(name) + 1 + _size(value)) for name, value in own.items()]
    for what, size in alone:
        if size > ONE_MAX:
            yield what, f"{size:,} bytes in one argument or variable: at most {ONE_MAX:,} can be"
    together = [f"{name}={value}" for name, value in {**inherited, **own}.items()] + [*words]
    total = sum(_size(text) + 1 + POINTER for text in together) + MARGIN
    allowed = min(ALL_MAX, os.sysconf("SC_ARG_MAX"))
    if total > allowed:
        yield None, f"{total:,} bytes of arguments and variables: at most {allowed:,} can be"


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
