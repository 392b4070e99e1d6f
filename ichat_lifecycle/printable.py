"""The one filter for text that came from elsewhere, before it is shown.

A model's name, an engine's last words, a client's prompt in a log, and another server's answer may
hold anything: sequences that a terminal obeys (titles, colors, the clipboard), control characters
of one byte that do the same (U+009B), marks that reverse what is read, and line ends that forge a
line of somebody else. Whatever prints such text calls one of these first:

- `plain` for text that may have lines of its own;
- `one_line` for a field, which never begins a further line;
- `brief` for a value that somebody has given, in a message about it;
- `json_text` for JSON, in which nothing is lost: what cannot be shown is escaped.
"""

from __future__ import annotations

import json
import re
from typing import Any

SHOWN_INSTEAD = "\ufffd"
SHOWN_MAX = 500  # characters of a message

# A sequence ends with its line at the latest: what follows an unfinished one is not hidden.
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colors, cursor, erase
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # OSC and its kin: titles, links, the clipboard
    r"|\x1b[ -/]*[0-~]?"
)
# Of what has no glyph, all but the two joiners (U+200C, U+200D) that scripts and emoji need.
_INVISIBLE = (
    r"\xad\u061c\u180e\u200b\u200e\u200f"
    r"\u2028-\u202e"  # line and paragraph ends, and embeddings that reverse what is read
    r"\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff"  # surrogates, which stand for bytes that were no text
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_CONTROLS = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_INVISIBLE}]")
_NOT_IN_JSON = re.compile(rf"[\x7f-\x9f{_INVISIBLE}]")


def plain(text: str) -> str:
    """`text` without terminal sequences, and with U+FFFD for other characters that are not shown.

    Tabs and line feeds stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub(SHOWN_INSTEAD, _ESCAPES.sub("", text))


def one_line(text: str, limit: int | None = None) -> str:
    """`text` as one line: as `plain`, and each run of white space is one blank.

    Args:
        limit: how many characters are kept, the last of which is then "…"; default: all.
    """
    if limit is not None and len(text) > limit:
        text = text[: max(0, limit - 1)] + "…"
    text = _ESCAPES.sub("", text)
    if not text.isprintable():
        shown = (c if c.isprintable() or c.isspace() else SHOWN_INSTEAD for c in text)
        text = "".join(shown)
    return " ".join(text.split())


def brief(text: str, limit: int = SHOWN_MAX) -> str:
    """`text` for a message: one line of at most `limit` characters, what is not shown escaped."""
    cut = text[:limit] + ("…" if len(text) > limit else "")
    return cut if cut.isprintable() else "".join(map(_visible, cut))


def _visible(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as JSON without characters that a terminal would obey.

    Args:
        indent: as json.dumps's.
        ascii_only: default: letters of all scripts stay as they are, for people.
    """
    return _NOT_IN_JSON.sub(_escaped, json.dumps(value, ensure_ascii=ascii_only, indent=indent))


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
