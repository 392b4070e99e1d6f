"""The JSON documents of the control plane, as pure functions of one snapshot. No web framework.

Each document reads the clock first and the snapshot once: the clock can then only be the older of
the two, which clamps to zero, and no document mixes two states. All times are in seconds.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from ichat_lifecycle.config import Settings
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.diagram import Way
from ichat_lifecycle.journal import Journal, Kind, Progress, Snapshot, verdict_as_dict
from ichat_lifecycle.ports import Verdict
from ichat_lifecycle.states import STARTING_STATES, State

Probe = Literal["livez", "readyz", "startupz"]

OK, UNAVAILABLE = 200, 503

# What a client is told to wait when nobody knows better, and at most while a model loads.
DEFAULT_RETRY_S = 5
LONGEST_RETRY_S = 30

TURNING = LoopHealth()

# Deeper than any argument or engine report; what lies below is shown as text.
DEPTH_LIMIT = 8


class Life(Protocol):
    """What the documents need of a Lifecycle; readable from any thread."""

    @property
    def snapshot(self) -> Snapshot: ...

    @property
    def journal(self) -> Journal: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def restarts_left(self) -> int: ...

    def monotonic(self) -> float:
        """The clock of the snapshot's `…_mono_s`, in seconds; 0 before run()."""
        ...


class Identity(Protocol):
    """Who the worker is. Read anew for each document, from any thread."""

    @property
    def model(self) -> str: ...

    @property
    def vllm_version(self) -> str | None:
        """None until vLLM has been imported."""
        ...

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The effective arguments, secrets already redacted."""
        ...

    @property
    def pid(self) -> int: ...

    @property
    def start_id(self) -> str:
        """Tells this life from others of the same worker; the ids of events begin with it."""
        ...

    @property
    def control_url(self) -> str | None:
        """Where the control plane answers; None before it does."""
        ...

    @property
    def download(self) -> Mapping[str, Any] | None:
        """Of a model that is being downloaded from a hub: bytes, rate, and time left."""
        ...

    @property
    def in_flight(self) -> int:
        """Inference requests under way now."""
        ...


def lifecycle_document(
    life: Life, identity: Identity, loop: LoopHealth = TURNING
) -> dict[str, Any]:
    """The body of `GET /lifecycle`: where the worker is, since when, why, and what comes next."""
    now, snapshot = life.monotonic(), life.snapshot
    return {
        "state": snapshot.state.value,
        "since": snapshot.since.isoformat(),
        "for_s": _elapsed(snapshot.since_mono_s, now),
        "ready": takes_requests(snapshot, loop),
        "reason": _reason(snapshot, loop),
        "loop": {"lag_s": loop.lag_s, "blocked": loop.blocked},
        "allowed": [trigger.value for trigger in snapshot.allowed],
        "progress": _progress(snapshot.progress, now) | {"download": plain(identity.download)},
        "in_flight": identity.in_flight,
        "restarts": snapshot.restarts,
        "seq": snapshot.seq,
        "stop_asked": snapshot.stop_asked,
        "stop_bound_s": round(life.settings.stop_bound, 3),
        "evidence": snapshot.evidence,
        "warnings": [notice.as_dict() for notice in snapshot.warnings],
        "last_verdict": _verdict(snapshot.last_verdict),
        "model": identity.model,
        "pid": identity.pid,
        "start_id": identity.start_id,
        "control_url": identity.control_url,
        "vllm_version": identity.vllm_version,
        "arguments": plain(identity.arguments),
    }


def summary_document(life: Life, identity: Identity) -> dict[str, Any]:
    """What a supervisor is told with each change. Nothing in it changes by itself."""
    snapshot = life.snapshot
    progress = snapshot.progress
    return {
        "state": snapshot.state.value,
        "stop_asked": snapshot.stop_asked,
        "reason": snapshot.reason.as_dict() if snapshot.reason else None,
        "phase": progress.phase,
        "fraction": progress.fraction,
        "expected_s": progress.expected_s,
        "restarts": snapshot.restarts,
        "start_id": identity.start_id,
        "control_url": identity.control_url,
    }


def takes_requests(snapshot: Snapshot, loop: LoopHealth) -> bool:
    """Readiness as everybody outside is told it: in READY, unless nothing can be served."""
    return snapshot.ready and not loop.blocked


_HISTORY = {
    "attempts": Kind.ATTEMPT,
    "verdicts": Kind.VERDICT,
    "phases": Kind.PHASE,
    "stages": Kind.STAGE,
    "recoveries": Kind.RECOVERY,
}


def history_document(life: Life, after: int = 0) -> dict[str, Any]:
    """The body of `GET /lifecycle/history`: the transitions with a `seq` above `after`; and of the
    rest all that is kept: attempts in vain, verdicts with their signs, phases of starts, stages of
    drains and releases, and steps of recoveries."""
    journal = life.journal
    transitions = [record.as_dict() for record in journal.transitions if record.seq > after]
    rest = {
        name: [record.as_dict() for record in journal.records(kind)]
        for name, kind in _HISTORY.items()
    }
    return {"transitions": transitions, **rest}


def way_of(life: Life) -> Way:
    """Where the worker is in the table, and how it came there."""
    state = life.snapshot.state
    return Way.of(state, ((record.trigger, record.source) for record in life.journal.transitions))


def probe_document(
    life: Life, probe: Probe, loop: LoopHealth = TURNING
) -> tuple[int, dict[str, Any]]:
    """Status and body of a Kubernetes probe.

    `livez` fails only once the worker is STOPPED: one that loads or is DEGRADED is alive, and to
    restart it would make things worse. `readyz` passes only in READY, and not while the event loop
    is blocked: nothing is served then. `startupz` passes from the first READY on.
    """
    snapshot = life.snapshot
    passed = {
        "livez": snapshot.state is not State.STOPPED,
        "readyz": takes_requests(snapshot, loop),
        "startupz": snapshot.ever_ready,
    }[probe]
    body = {
        "status": "ok" if passed else "unavailable",
        "state": snapshot.state.value,
        "reason": _reason(snapshot, loop),
    }
    return (OK if passed else UNAVAILABLE), body


def retry_after_s(life: Life) -> int:
    """The `Retry-After` of a 503, in whole seconds, at least 1.

    The expected rest of a start or recovery where it is known, at most 30; else 5. A start that is
    overdue may end at any time, or never: it is not known either.
    """
    now, snapshot = life.monotonic(), life.snapshot
    rest_s: float | None = None
    if snapshot.state in STARTING_STATES:
        rest_s = _eta(snapshot.progress, now)
    elif snapshot.state is State.DEGRADED and _is_replaced(snapshot):
        rest_s = snapshot.engine_took_s
    return min(LONGEST_RETRY_S, math.ceil(rest_s)) if rest_s else DEFAULT_RETRY_S


# Why a worker is DEGRADED and keeps its engine.
_ENGINE_STAYS = frozenset({"engine_unresponsive", "asleep"})


def _is_replaced(snapshot: Snapshot) -> bool:
    """Whether a new engine comes, as far as the reason shows it."""
    return snapshot.reason is not None and snapshot.reason.code not in _ENGINE_STAYS


def error_document(code: str, message: str, hint: str | None = None) -> dict[str, Any]:
    """The body of every answer that is an error."""
    return {"error": {"code": code, "message": message, "hint": hint}}


def plain(value: Any, depth: int = DEPTH_LIMIT) -> Any:
    """`value` as something JSON can carry: what it cannot becomes text, never an error.

    Arguments and the engine's own report hold paths, enums, dtypes, infinities.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):  # numpy's numbers are registered as such
        return _number(value)
    if depth > 0 and isinstance(value, Mapping):
        return {str(key): plain(item, depth - 1) for key, item in value.items()}
    if depth > 0 and isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth - 1) for item in _ordered(value)]
    return str(value)


def _number(value: numbers.Real) -> int | float | str:
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(value)  # JSON has no infinity


def _ordered(values: Iterable[Any]) -> Iterable[Any]:
    """Sets in an order of their own: two documents of one worker must not differ by chance."""
    return sorted(values, key=str) if isinstance(values, set | frozenset) else values


def _elapsed(began_s: float, now_s: float) -> float:
    return round(max(0.0, now_s - began_s), 3)


def _reason(snapshot: Snapshot, loop: LoopHealth) -> dict[str, Any] | None:
    # A blocked loop first: while it lasts, the snapshot's own reason is of before.
    reason = loop.reason or snapshot.reason
    return reason.as_dict() if reason is not None else None


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return verdict_as_dict(verdict)


def _progress(progress: Progress, now_s: float) -> dict[str, Any]:
    ended = progress.ended_mono_s
    return {
        "phase": progress.phase,
        "fraction": progress.fraction,
        "elapsed_s": _elapsed(progress.began_mono_s, now_s if ended is None else ended),
        "eta_s": _eta(progress, now_s),
        "expected_s": progress.expected_s,
        "expected_from": progress.expected_from,
        "phases": [
            {
                "phase": phase,
                "began_s": _elapsed(progress.began_mono_s, began_mono_s),
                "took_s": round(took_s, 3),
            }
            for (phase, began_mono_s), (_, took_s) in zip(
                progress.phases, progress.took(now_s), strict=True
            )
        ],
    }


def _eta(progress: Progress, now_s: float) -> float | None:
    """What is left of a start that is under way; None once it has ended."""
    if progress.expected_s is None or progress.ended_mono_s is not None:
        return None
    return round(max(0.0, progress.expected_s - _elapsed(progress.began_mono_s, now_s)), 3)
