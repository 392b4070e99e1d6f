"""`ichat-lifecycle status`: one line for each worker, or their documents as JSON."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ichat_lifecycle.client.address import base_url
from ichat_lifecycle.client.documents import Status, as_number
from ichat_lifecycle.client.find import OTHERS_HINT, Worker, find_workers
from ichat_lifecycle.client.fleet_table import fleet_table, own_document, workers_of
from ichat_lifecycle.client.fleets import fleets_here
from ichat_lifecycle.client.look import FAINT, UNLIMITED, state_text
from ichat_lifecycle.client.transport import ControlClient
from ichat_lifecycle.client.words import (
    counted,
    of_expected,
    phase_name,
    reason_in_short,
    span,
)
from ichat_lifecycle.errors import ExitCode, LifecycleError, report
from ichat_lifecycle.printable import json_text
from ichat_lifecycle.states import STARTING_STATES

NOT_READY = 1
WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class Overview:
    """The fleets, and the workers that are in none of them; what could not be asked."""

    fleets: Sequence[Mapping[str, Any]]
    workers: Sequence[Worker]
    errors: Sequence[LifecycleError] = ()
    others: str = ""  # those that were found and not asked

    @property
    def ready(self) -> bool:
        """Whether everybody serves."""
        fleet = [one for document in self.fleets for one in workers_of(document)]
        serving = all(one.get("stage") == "serving" and _is_ready(one) for one in fleet)
        return serving and all(worker.status.ready for worker in self.workers)


def _is_ready(worker: Mapping[str, Any]) -> bool:
    return own_document(worker).get("ready") is True


async def status_command(
    urls: Sequence[str], console: Console, *, as_json: bool = False, watch: bool = False
) -> int:
    """Prints the workers at `urls`, or the fleets and workers of this machine.

    Args:
        watch: again and again, until Ctrl-C.

    Returns:
        0 if all are ready, 1 if one is not, 69 if one does not answer.

    Raises:
        ArgumentsError: one of `urls` is none.
        UnreachableError: no worker was found.
    """
    if watch:
        await _watch(urls, console)
    overview = await _overview(urls)
    if as_json:
        _print_json(console, overview)
    else:
        print_overview(console, overview)
    for error in overview.errors:
        report(error)
    if overview.others:
        print(f"ichat-lifecycle: not asked: {overview.others}; {OTHERS_HINT}", file=sys.stderr)
    if overview.errors:
        return int(ExitCode.ADDRESS_UNAVAILABLE)
    return 0 if overview.ready else NOT_READY


async def _watch(urls: Sequence[str], console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            overview = await _overview(urls)
            live.update(Group(*_tables(overview)), refresh=True)
            await asyncio.sleep(WATCH_S)


async def _overview(urls: Sequence[str]) -> Overview:
    if urls:
        workers, errors = await _ask_all(urls)
        return Overview((), workers, errors)
    fleets, found = await asyncio.gather(fleets_here(), find_workers())
    if not fleets and not found.workers:
        raise found.nothing()
    pids = {as_number(one.get("pid")) for document in fleets for one in workers_of(document)}
    alone = [w for w in found.workers if w.status.pid is None or w.status.pid not in pids]
    return Overview(fleets, alone, others=found.others())


async def _ask_all(urls: Sequence[str]) -> tuple[list[Worker], list[LifecycleError]]:
    answers = await asyncio.gather(*(_ask(base_url(url)) for url in urls))
    workers = [answer for answer in answers if isinstance(answer, Worker)]
    return workers, [answer for answer in answers if isinstance(answer, LifecycleError)]


async def _ask(url: str) -> Worker | LifecycleError:
    async with ControlClient(url) as client:
        try:
            return Worker(url, await client.status())
        except LifecycleError as error:
            return error


def _print_json(console: Console, overview: Overview) -> None:
    """A list of the workers' own documents; those of a fleet with what it says of them."""
    documents: list[Any] = []
    for worker in (one for document in overview.fleets for one in workers_of(document)):
        seen = {name: value for name, value in worker.items() if name != "lifecycle"}
        own = own_document(worker)
        documents.append({"url": own.get("control_url"), **own, "fleet": seen})
    documents += [{"url": w.url, **w.status.raw} for w in overview.workers]
    console.file.write(json_text(documents, indent=2, ascii_only=True) + "\n")


def print_overview(console: Console, overview: Overview) -> None:
    """Tables of the fleets, and a line for each other worker."""
    for table in map(fleet_table, overview.fleets):
        _print_table(console, table)
    print_lines(console, overview.workers)


def _tables(overview: Overview) -> list[Table]:
    return [*map(fleet_table, overview.fleets), lines(overview.workers)]


def print_lines(console: Console, workers: Sequence[Worker]) -> None:
    """One line each, in columns. A line that is too long is left to the terminal to wrap."""
    if workers:
        _print_table(console, lines(workers))


def _print_table(console: Console, table: Table) -> None:
    with console.capture() as capture:
        console.print(table, width=UNLIMITED, no_wrap=True, soft_wrap=True)
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def lines(workers: Iterable[Worker]) -> Table:
    """A row for each worker."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for worker in workers:
        status = worker.status
        table.add_row(
            Text(status.model or "?", "bold"),
            state_text(status.state, ready=status.ready),
            Text(f"for {span(status.for_s)}"),
            Text(f"{status.in_flight} in flight"),
            Text(counted(status.restarts, "restart")),
            Text(worker.url, FAINT),
            Text(_more(status)),
        )
    return table


def _more(status: Status) -> str:
    """What there is to say of one that is not ready, or has a warning."""
    said = []
    if status.state in STARTING_STATES:
        progress = status.progress
        said.append(f"{phase_name(progress.phase, progress.fraction)}, {of_expected(progress)}")
        said += [progress.download] if progress.download else []
    if status.reason and not status.ready:
        said.append(reason_in_short(status.reason))
    said += [f"warning: {reason_in_short(warning)}" for warning in status.warnings]
    return "; ".join(said)
