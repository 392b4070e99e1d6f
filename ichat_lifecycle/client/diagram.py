"""`ichat-lifecycle diagram`: the table as a picture, with the way of a worker if one is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console

from ichat_lifecycle.client.address import base_url
from ichat_lifecycle.client.documents import TRANSITION, Entry, as_state
from ichat_lifecycle.client.transport import ControlClient
from ichat_lifecycle.diagram import BARE, Edge, Way, mermaid, svg
from ichat_lifecycle.states import Trigger


async def diagram_command(url: str | None, console: Console, form: str) -> int:
    """Prints it; returns 0.

    Args:
        form: `svg` or `mermaid`.

    Raises:
        LifecycleError: there is no such worker.
    """
    way = await _way(base_url(url)) if url is not None else BARE
    console.file.write((svg(way) if form == "svg" else mermaid(way)) + "\n")
    return 0


async def _way(url: str) -> Way:
    async with ControlClient(url) as client:
        _, entries = await client.history()  # first: a transition after it is missing, not a state
        status = await client.status()
    return Way.of(status.state, _edges(entries))


def _edges(entries: Iterable[Entry]) -> Iterator[Edge]:
    """Those of a newer version, which this one does not know, are left out."""
    for entry in entries:
        source, trigger = as_state(entry.fields.get("source")), entry.text("trigger")
        if entry.kind == TRANSITION and source and trigger in set(Trigger):
            yield Trigger(trigger), source
