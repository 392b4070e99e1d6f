"""Keys and tokens as they come from flags, files, and variables: each has to fit an HTTP header.

A key that does not is never right: no client can send it, and neither can our own probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ichat_lifecycle.errors import ArgumentsError

API_KEY_FLAG = "--api-key"
HUB_TOKEN_FLAG = "--hf-token"
CONTROL_TOKEN_FLAG = "--control-token"

# Of a token that is no warning. The right one is never held back, so its length alone protects it.
SHORTEST = 16
WEAK_HINT = f"give one of at least {SHORTEST} characters, such as from: openssl rand -hex 16"

HINT = "printf '%s' KEY > FILE writes a key without the newline that echo appends"


def header_value(name: str, text: str) -> str:
    """A key without the white space around it, which Kubernetes Secrets often end with.

    Args:
        name: who gave it: a flag, a variable, or a setting. The key itself is never shown.
        text: the key; "" means that there is no key, and is returned unchanged.

    Raises:
        ArgumentsError: there is nothing but white space, or a character that a header cannot have.
    """
    stripped = text.strip()
    if text and not stripped:
        raise ArgumentsError(
            f"{name} holds nothing but white space",
            code="bad_key",
            hint="give the key, or leave it out: an empty one protects nothing",
        )
    for place, character in enumerate(stripped, start=1):
        if not (character.isascii() and character.isprintable()):
            kind = "a control character" if character.isascii() else "not ASCII"
            raise ArgumentsError(
                f"{name} cannot be sent in an HTTP header: character {place} of {len(stripped)} is "
                f"{kind}",
                code="bad_key",
                hint="use printable ASCII characters only",
            )
    return stripped


def is_weak(token: str) -> bool:
    """Whether a token can be guessed: it is shorter than SHORTEST characters."""
    return len(token) < SHORTEST


def check_flags(control_token: str | None, argv: Sequence[str]) -> None:
    """Checks the token and the keys of a command line, before anything is imported.

    Raises:
        ArgumentsError: as header_value().
    """
    header_value(CONTROL_TOKEN_FLAG, control_token or "")
    for flag in (API_KEY_FLAG, HUB_TOKEN_FLAG):
        for key in _values(flag, argv):
            header_value(flag, key)


def _values(wanted: str, argv: Sequence[str]) -> Iterator[str]:
    """The values of a flag, of which it may take several, up to the next flag."""
    inside = False
    for word in argv:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            inside = flag.replace("_", "-") == wanted and not equals
            if flag.replace("_", "-") == wanted and equals:
                yield value
        elif inside:
            yield word
