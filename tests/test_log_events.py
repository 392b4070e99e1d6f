"""README's table of log events is what the code logs: each event, its levels and its fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from ichat_lifecycle.fleet import journal as fleet
from ichat_lifecycle.journal import (
    AttemptRecord,
    Reason,
    RecoveryRecord,
    StageRecord,
    TransitionRecord,
)
from ichat_lifecycle.ports import Notice, Signs

ROOT = Path(__file__).parent.parent
LEVELS = {"debug", "info", "warning", "error", "exception"}
NOT_LOGGED = {"at", "mono_s"}  # of a record: the line has a time of its own


@dataclass
class Event:
    """What is logged under one name."""

    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)

    def add(self, levels: set[str], names: set[str]) -> None:
        self.levels |= {"error" if level == "exception" else level for level in levels}
        self.fields |= names - {"exc_info"}


def names_of(record: type) -> set[str]:
    return {known.name for known in fields(record)} - NOT_LOGGED


def as_documents(record: type) -> set[str]:
    """The fields of a fleet's record as its JSON has them."""
    return {"trigger" if name == "event" else name for name in names_of(record)}


# Those that are logged from what they are in the journal, without their names in the call.
FROM_RECORDS = {
    "transition": ({"info"}, names_of(TransitionRecord)),
    "attempt": ({"info", "warning"}, names_of(AttemptRecord)),
    "stage": ({"info", "error"}, names_of(StageRecord)),
    "recovery": ({"info"}, names_of(RecoveryRecord)),
    "verdict": ({"debug", "info", "warning"}, {"kind"} | names_of(Signs)),
    "life_failed": ({"error"}, names_of(Reason)),
    # What worker._where gives comes on top of the names in the call.
    "ready": ({"info"}, {"model", "api", "page"}),
    "worker_warning": ({"warning"}, names_of(Notice)),
    "worker": ({"info", "error"}, as_documents(fleet.StageRecord)),
    "reload": ({"info"}, as_documents(fleet.ReloadRecord)),
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Each call of a log method, and of the heartbeat's own, with the method's name."""
    for path in sorted((ROOT / "ichat_lifecycle").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                receiver, method = node.func.value, node.func.attr
                if isinstance(receiver, ast.Name) and receiver.id == "log" and method in LEVELS:
                    yield method, node
                elif method == "_failed" and node.args:
                    yield "warning", node


def logged() -> dict[str, Event]:
    found: dict[str, Event] = {}
    for name, (levels, names) in FROM_RECORDS.items():
        found.setdefault(name, Event()).add(levels, names)
    for level, call in calls():
        first = call.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            names = {keyword.arg for keyword in call.keywords if keyword.arg}
            if first.value.startswith("gateway_"):
                names |= {"gateway"}
            found.setdefault(first.value, Event()).add({level}, names)
    return found


def documented() -> dict[str, Event]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Log events")[1]
    found: dict[str, Event] = {}
    for line in section.split("\n## ")[0].splitlines():
        if not line.startswith("| `"):
            continue
        names, levels, fields_, _ = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            event = found.setdefault(name, Event())
            event.add(set(levels.split(", ")), set(filter(None, fields_.split(", "))))
    return found


def test_the_table_is_what_is_logged() -> None:
    assert documented() == logged()


def test_the_search_finds_what_is_logged() -> None:
    """Else an empty table would be as good as a full one."""
    assert len(logged()) > 25
    assert logged()["stop_requested"].fields == {"cause", "now", "bound_s"}
