"""Lines of a screen: text that is cut to a width, or folded into it, by what a terminal shows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat

from rich.cells import cell_len, chop_cells
from rich.text import Text

from ichat_lifecycle.client.look import FAINT

GUTTER = 10  # the labels to the left, with the blanks on both of their sides


def cut(text: Text, width: int) -> Text:
    """`text` on one line of at most `width` cells."""
    text = text.copy()
    text.no_wrap = True
    text.truncate(max(0, width), overflow="ellipsis")
    return text


def spread(left: Text, right: Text, width: int) -> Text:
    """Both on one line, at its two ends; the left one is cut where they do not fit."""
    left = cut(left, width - right.cell_len - 2)
    blanks = " " * max(0, width - left.cell_len - right.cell_len)
    return Text.assemble(left, blanks, right)


def folded(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` cells, all of it; long words are broken."""
    width = max(1, width)
    done: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= width:
            line = joined
            continue
        if line:
            done.append(line)
        *whole, line = chop_cells(word, width)
        done += whole
    return [*done, line] if line else done


def labelled(label: str, lines: Iterable[Text], width: int) -> list[Text]:
    """`lines` beside a label in the gutter, each cut to what is left of `width`."""
    return [
        Text.assemble(
            ((f" {label}" if first else "").ljust(GUTTER), FAINT), cut(line, width - GUTTER)
        )
        for first, line in zip(chain([True], repeat(False)), lines, strict=False)
    ]


def columns(texts: Iterable[tuple[str, int]]) -> str:
    """Texts side by side, each in its width; what is longer is cut."""
    cells = []
    for text, width in texts:
        line = Text(text)
        line.truncate(width, overflow="ellipsis", pad=True)
        cells.append(line.plain)
    return "".join(cells)
