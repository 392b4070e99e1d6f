"""What `vllm serve` can do, and one process with one HTTP server cannot: errors, with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.vllm_flags import VARIABLES, Taker


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a flag is refused. `harmless` are values, as text, that ask for nothing special."""

    reason: str
    hint: str
    harmless: tuple[str, ...] = ()


_ONE_PORT = _Refusal(
    "this process serves on one port only, and has no supervisor of data-parallel servers",
    "leave it out, and start one worker for each rank; `up` supervises them",
)
_HTTP_ONLY = _Refusal("this process serves HTTP only", "leave it out, or use vLLM's own server")


def _probing(default: str) -> _Refusal:
    return _Refusal(_ONE_PORT.reason, _ONE_PORT.hint, (default, f"{default}.0"))


# By the flag's name. The table in vllm_flags has the same flags; a test compares them.
REFUSALS: Mapping[str, _Refusal] = {
    "headless": _Refusal(
        "this process always serves an API", "start headless nodes with vLLM's own server"
    ),
    "api-server-count": _Refusal(
        "this process runs exactly one API server",
        "leave it out, and start more workers for more throughput",
        ("1",),
    ),
    "grpc": _HTTP_ONLY,
    "grpc-port": _HTTP_ONLY,
    "data-parallel-multi-port-external-lb": _ONE_PORT,
    "data-parallel-supervisor-port": _probing("9256"),
    "dp-supervisor-probe-interval-s": _probing("5"),
    "dp-supervisor-probe-timeout-s": _probing("5"),
    "dp-supervisor-probe-failure-threshold": _probing("3"),
}


def refuse_flags(value_of: Callable[[str], Any]) -> None:
    """Raises for the first flag that cannot be served.

    Args:
        value_of: a flag's value by its name, typed or as text; None or False where it is not given.

    Raises:
        ArgumentsError: with the code `not_supported`.
    """
    for name, refusal in REFUSALS.items():
        value = value_of(name)
        if value is None or value is False or str(value) in refusal.harmless:
            continue
        shown = f"--{name}" if value is True else f"--{name} {value}"
        raise ArgumentsError(f"{shown}: {refusal.reason}", code="not_supported", hint=refusal.hint)


def refuse_variables(environment: Mapping[str, str]) -> None:
    """Raises for the first variable that asks for another server than this one.

    Raises:
        ArgumentsError: with the code `not_supported`.
    """
    for name, taker in VARIABLES.items():
        value = environment.get(name, "")
        if taker is Taker.REFUSED and value.strip() not in ("", "0"):
            raise ArgumentsError(
                f"{name}={value}: this process serves with vLLM's Python front end only",
                code="not_supported",
                hint="unset it, or use vLLM's own server",
            )
