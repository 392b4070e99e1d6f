"""What three signals together say of an engine: a bounded RPC, vLLM's own counters, and a token.

One alone misleads. `/health` only looks at a flag; an RPC waits behind a long prefill, though the
engine works; and it is answered while the worker process is stuck, as long as nothing is generated.
A death is no verdict: it is an event, told by the process's own handle.
"""

from __future__ import annotations

from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.slept import LAG_S

TOLERANCE_S = 1e-6  # times are sums of floats


def judge(signs: Signs, timeout_s: float) -> VerdictKind:
    """The verdict on these signs; `timeout_s` is how long an answer may take."""
    if signs.loop_lag_s >= LAG_S:
        return VerdictKind.LOOP_BLOCKED
    if signs.error or silence_s(signs) >= timeout_s - TOLERANCE_S:
        return VerdictKind.HUNG
    if signs.asleep:
        return VerdictKind.ASLEEP
    working = signs.progressed or signs.in_flight or signs.answered_s is None
    return VerdictKind.BUSY if working else VerdictKind.IDLE


def told(verdict: Verdict) -> str:
    """What is wrong, in words."""
    signs = verdict.signs
    if signs.error:
        return f"{_whom(signs)} cannot be asked"
    what = "no token" if signs.token_silent_s > signs.silent_s else "no answer"
    return f"{what} from {_whom(signs)} for {silence_s(signs):.0f} s"


def _whom(signs: Signs) -> str:
    if not signs.ranks:
        return "the engine"
    ranks = ", ".join(map(str, signs.ranks))
    return f"rank{'s' if len(signs.ranks) > 1 else ''} {ranks} of the engine"


def silence_s(signs: Signs) -> float:
    """For how long the engine has owed an answer without any progress, in seconds."""
    return max(signs.silent_s, signs.token_silent_s)


def misses(signs: Signs, timeout_s: float, before: int) -> int:
    """How many misses in a row these signs of a hung engine make, after `before` of them.

    One for each `timeout_s` of silence, however often that is told; and one for each failed probe.
    """
    if signs.error:
        return before + 1
    return max(1, int((silence_s(signs) + TOLERANCE_S) // timeout_s))
