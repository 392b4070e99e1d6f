"""`ichat-lifecycle status`: one line for each worker, or their documents as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ichat_lifecycle.client.address import base_url
from ichat_lifecycle.client.documents import Status
from ichat_lifecycle.client.find import Worker, find_workers
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
from ichat_lifecycle.states import STARTING_STATES

NOT_READY = 1


async def status_command(urls: Sequence[str], console: Console, *, as_json: bool = False) -> int:
    """Prints the workers at `urls`, or those of this machine.

    Returns:
        0 if all are ready, 1 if one is not, 69 if one does not answer.

    Raises:
        ArgumentsError: one of `urls` is none.
        UnreachableError: no worker was found.
    """
    workers, errors = await _ask_all(urls) if urls else (await _all_found(), [])
    if as_json:
        _print_json(console, workers)
    else:
        print_lines(console, workers)
    for error in errors:
        report(error)
    if errors:
        return int(ExitCode.ADDRESS_UNAVAILABLE)
    return 0 if all(worker.status.ready for worker in workers) else NOT_READY


async def _all_found() -> Sequence[Worker]:
    found = await find_workers()
    if not found.workers:
        raise found.nothing()
    return found.workers


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


def _print_json(console: Console, workers: Iterable[Worker]) -> None:
    documents: list[Any] = [{"url": w.url, **w.status.raw} for w in workers]
    console.file.write(json.dumps(documents, indent=2) + "\n")


def print_lines(console: Console, workers: Sequence[Worker]) -> None:
    """One line each, in columns. A line that is too long is left to the terminal to wrap."""
    if not workers:
        return
    with console.capture() as capture:
        console.print(lines(workers), width=UNLIMITED, no_wrap=True, soft_wrap=True)
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
    """What there is to say of one that is not ready."""
    said = []
    if status.state in STARTING_STATES:
        progress = status.progress
        said.append(f"{phase_name(progress.phase, progress.fraction)}, {of_expected(progress)}")
    if status.reason and not status.ready:
        said.append(reason_in_short(status.reason))
    return "; ".join(said)
