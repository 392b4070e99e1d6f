"""`ichat-lifecycle history`: what has happened in a worker's life, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import tzinfo

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ichat_lifecycle.client.choose import choose_url
from ichat_lifecycle.client.documents import TRANSITION, Entry, as_state
from ichat_lifecycle.client.look import FAINT, STATE_STYLE
from ichat_lifecycle.client.transport import ControlClient
from ichat_lifecycle.client.words import day_and_clock, told, took
from ichat_lifecycle.printable import json_text

COLUMNS = ("seq", "time", "trigger", "from → to", "took", "cause")
COLUMNS_OF_ALL = ("seq", "time", "event", "what", "took", "cause")


async def history_command(
    url: str | None, console: Console, *, as_json: bool = False, everything: bool = False
) -> int:
    """Prints the history of the worker at `url`, or of the only one of this machine; returns 0.

    Args:
        everything: not only transitions; the JSON document always has everything.

    Raises:
        LifecycleError: there is no such worker, or not only one.
    """
    async with ControlClient(await choose_url(url)) as client:
        document, entries = await client.history()
    if as_json:
        console.file.write(json_text(document, indent=2, ascii_only=True) + "\n")
        return 0
    table = all_table if everything else transitions_table
    print_table(console, table(entries, plain=not console.is_terminal))
    return 0


def print_table(console: Console, table: Table) -> None:
    """Without the blanks that fill up a table's last column."""
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def transitions_table(
    entries: Iterable[Entry], *, plain: bool = False, zone: tzinfo | None = None
) -> Table:
    """Transitions only. `plain`: without lines; `zone` None (default): the local one."""
    table = _table(COLUMNS, plain)
    for entry in entries:
        if entry.kind == TRANSITION:
            table.add_row(
                str(entry.count("seq")),
                day_and_clock(entry.at, zone),
                entry.text("trigger"),
                _states(entry),
                took(entry.number("took_s") or 0.0),
                entry.text("cause"),
            )
    return table


def all_table(
    entries: Iterable[Entry], *, plain: bool = False, zone: tzinfo | None = None
) -> Table:
    """All that happened, in the order of time; arguments as for transitions_table()."""
    table = _table(COLUMNS_OF_ALL, plain)
    for entry in entries:
        words = told(entry)
        is_transition = entry.kind == TRANSITION
        table.add_row(
            str(entry.count("seq")) if is_transition else "",
            day_and_clock(entry.at, zone),
            entry.text("trigger") if is_transition else entry.kind,
            _states(entry) if is_transition else Text(words.what),
            words.took,
            words.why,
            style=None if is_transition else FAINT,
        )
    return table


def _table(columns: Iterable[str], plain: bool) -> Table:
    table = Table(
        box=None if plain else box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, expand=False
    )
    for column in columns:
        right = column in ("seq", "took")
        # Whatever is long is folded, never cut.
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _states(entry: Entry) -> Text:
    text = Text()
    for name in ("source", "dest"):
        state = as_state(entry.fields.get(name))
        if text:
            text.append(" → ")
        text.append(entry.text(name), STATE_STYLE[state] if state else "")
    return text
