"""Secret words of a command line: everybody on a machine can read one, nobody an inherited file.

A supervisor hands the words over in a file in memory, whose descriptor the worker inherits:
`serve --args-fd NUMBER …` stands for `serve WORDS… …`. The worker closes it before anything else
is started, so that no other process ever has it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence

from ichat_lifecycle.redact import redact

ARGS_FD = "--args-fd"
LIMIT = 4 * 2**20  # bytes
_STANDARD = 2  # the last of the standard streams' descriptors
_NUMBER = re.compile(r"-[0-9.]+")


def apart(argv: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words that anybody may see, and those that nobody may; a flag goes with its values."""
    plain: list[str] = []
    secret: list[str] = []
    for flag in _flags(argv):
        (plain if redact(flag) == flag else secret).extend(flag)
    return tuple(plain), tuple(secret)


def secret_flags(argv: Sequence[str]) -> list[str]:
    """The flags whose values are secret, without them."""
    _, secret = apart(argv)
    return [flag[0].partition("=")[0] for flag in _flags(secret) if flag[0].startswith("-")]


def _flags(argv: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with its values; what stands before the first one alone."""
    now: list[str] = []
    for word in argv:
        if word.startswith("-") and not _NUMBER.fullmatch(word) and now:
            yield now
            now = []
        now.append(word)
    if now:
        yield now


def hand_over(words: Sequence[str]) -> int:
    """A descriptor to be inherited, from which `taken` reads these words; to be closed.

    Raises:
        OSError: there is none to be had.
    """
    fd = os.memfd_create("arguments")
    try:
        data = memoryview(json.dumps(list(words)).encode())
        while data:
            data = data[os.write(fd, data) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def taken(words: Sequence[str]) -> list[str]:
    """The words of `serve` with those in the place of `--args-fd NUMBER` that it stands for.

    Only as the first flag: anywhere else it may be another one's value.

    Raises:
        ValueError: there are none to be had from this descriptor.
    """
    if list(words[:1]) != [ARGS_FD]:
        return list(words)
    number = words[1] if len(words) > 1 else ""
    if not re.fullmatch("[0-9]{1,9}", number) or int(number) <= _STANDARD:
        raise ValueError(f"{ARGS_FD}: expected the number of an inherited descriptor")
    return [*_read(int(number)), *words[2:]]


def _read(fd: int) -> list[str]:
    try:
        with os.fdopen(fd, "rb") as file:
            data = file.read(LIMIT + 1)
        found = json.loads(data) if len(data) <= LIMIT else None
    except OSError as error:
        raise ValueError(f"{ARGS_FD} {fd}: {error.strerror}") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise ValueError(f"{ARGS_FD} {fd}: expected a JSON list of at most {LIMIT} bytes")
    return found
