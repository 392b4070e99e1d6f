"""A simulated life as lines that a person can read, in the order in which things happened."""

from __future__ import annotations

from collections.abc import Iterator

from ichat_lifecycle.testing.fakes import Call
from ichat_lifecycle.testing.life import Life


def timeline(life: Life) -> Iterator[str]:
    """One line for each transition, event, and call with its end; the end of run() last."""
    lines = [
        *_transitions(life),
        *((at, 0, f"      ! {what}") for at, what in life.happened),
        *(line for call in life.world.history for line in _call(call)),
        *_requests(life),
    ]
    for at, _, text in sorted(lines, key=lambda line: line[:2]):
        yield f"{at:9.3f}  {text}"
    if life.ended_s is None:
        yield "run() has not ended"
    else:
        how = "returned" if life.error is None else f"raised {life.error!r}"
        yield f"{life.ended_s:9.3f}  run() {how}, state {life.lifecycle.snapshot.state}"
    for note in getattr(life.error, "__notes__", ()):
        yield f"           {note}"


def _transitions(life: Life) -> Iterator[tuple[float, int, str]]:
    for record in life.lifecycle.journal.transitions:
        cause = f"  ({record.cause})" if record.cause else ""
        text = f"{record.source} -> {record.dest}  by {record.trigger}{cause}"
        yield record.mono_s, 2, text


def _call(call: Call) -> Iterator[tuple[float, int, str]]:
    if call.ended_s == call.began_s and call.error is None:
        yield call.began_s, 1, f"        {call.name}"
        return
    yield call.began_s, 1, f"        {call.name} ..."
    if call.ended_s is not None:
        how = f"failed: {call.error!r}" if call.error is not None else "done"
        swallowed = ", its cancellation ignored" if call.cancelled and call.error is None else ""
        yield call.ended_s, 1, f"        ... {call.name} {how}{swallowed}"


def _requests(life: Life) -> Iterator[tuple[float, int, str]]:
    for exchange in life.clients.exchanges if life.clients else ():
        if exchange.ended_s is not None:
            how = "in full" if b"[DONE]" in exchange.body else "with an error"
            text = f"        request of {exchange.asked_s:g} s: {exchange.status}, {how}"
            yield exchange.ended_s, 1, text
