"""A fleet's document as a table, for terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ichat_lifecycle.client.documents import as_list, as_number, as_text
from ichat_lifecycle.client.look import BAD, FAINT, STATE_STYLE
from ichat_lifecycle.client.words import phase_name, span
from ichat_lifecycle.states import State

COLUMNS = ("NAME", "STAGE", "STATE", "FOR", "IN FLIGHT", "RESTARTS", "ADDRESS", "GPU", "WHY")
STAGE_STYLE = {
    "pending": FAINT,
    "starting": "cyan",
    "serving": "green",
    "backing_off": "yellow",
    "stopping": "magenta",
    "stopped": "magenta",
    "given_up": BAD,
}


def workers_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The workers of a fleet's document, whatever else may stand there."""
    return [one for one in as_list(document.get("workers")) if isinstance(one, Mapping)]


def own_document(worker: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a worker of a fleet says of itself; empty where it does not answer."""
    found = worker.get("lifecycle")
    return found if isinstance(found, Mapping) else {}


def fleet_table(document: Mapping[str, Any]) -> Table:
    """A row for each worker."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(*(Text(name, FAINT) for name in COLUMNS))
    for worker in workers_of(document):
        table.add_row(*_cells(worker))
    return table


class FleetBoard:
    """The newest document, as a table; before there is one, that the file is read."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.document: Mapping[str, Any] = {}

    def table(self) -> Table | Text:
        if not self.document:
            return Text(f"reading {as_text(self._file)}, and asking vLLM's parser", FAINT)
        return fleet_table(self.document)


def _cells(worker: Mapping[str, Any]) -> Iterator[Text]:
    stage, state = as_text(worker.get("stage")), as_text(worker.get("state"))
    asked = own_document(worker)
    in_flight = as_number(asked.get("in_flight"))
    yield Text(as_text(worker.get("name")), "bold")
    yield Text(stage.replace("_", " "), STAGE_STYLE.get(stage, ""))
    yield _state(state, worker)
    yield Text(span(as_number(worker.get("for_s")) or 0.0))
    yield Text("" if in_flight is None else str(int(in_flight)), justify="right")
    yield Text(str(_restarts(worker, asked)), justify="right")
    yield Text(as_text(worker.get("address")), FAINT)
    yield Text(_gpus(worker.get("gpu_ids")))
    yield Text(_why(worker, asked))


def _gpus(ids: Any) -> str:
    """Numbers, or UUIDs."""
    shown = (as_text(one if isinstance(one, str) else repr(one)) for one in as_list(ids))
    return ", ".join(shown)


def _restarts(worker: Mapping[str, Any], asked: Mapping[str, Any]) -> int:
    """Of its process, and in that of its engine."""
    of_process = max(0, int(as_number(worker.get("starts")) or 0) - 1)
    return of_process + int(as_number(asked.get("restarts")) or 0)


def _state(state: str, worker: Mapping[str, Any]) -> Text:
    """The worker's own; while it loads, with the phase."""
    if state not in STATE_STYLE:
        return Text(state)
    text = Text(state, STATE_STYLE[State(state)])
    phase = as_text(worker.get("phase"))
    if worker.get("stage") == "starting" and phase:
        text.append(f" {phase_name(phase, as_number(worker.get('fraction')))}", FAINT)
    return text


def _why(worker: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    again_s = as_number(worker.get("starts_again_in_s"))
    said = [f"starts again in {span(again_s)}"] if again_s is not None else []
    own = asked.get("reason")
    reason = as_text(worker.get("reason")) or as_text(
        own.get("message") if isinstance(own, Mapping) else None
    )
    return "; ".join([*said, reason] if reason else said)
