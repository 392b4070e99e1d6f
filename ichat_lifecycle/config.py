"""Deadlines, intervals and budgets. All times are in seconds.

Set from a YAML file (`--lifecycle-config`) or one by one (`--set health.interval=5`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from ichat_lifecycle.document import Document, parse, read
from ichat_lifecycle.errors import ArgumentsError, InputMissingError
from ichat_lifecycle.printable import brief
from ichat_lifecycle.scalars import Location, is_null, typed

# Where a control token may come from without being seen in the process list.
TOKEN_VARIABLE = "ICHAT_LIFECYCLE_CONTROL_TOKEN"

# Three years. Ten of them together still fit what a thread can wait for.
SECONDS_MAX = 100_000_000
COUNT_MAX = 1_000_000
Seconds = Annotated[float, Field(le=SECONDS_MAX)]
Count = Annotated[int, Field(le=COUNT_MAX)]
# A loop that waits for less is one that never rests.
PERIOD_MIN = 0.01
Period = Annotated[float, Field(ge=PERIOD_MIN, le=SECONDS_MAX)]
# Starts count within a window: in a shorter one none does, and one may follow another without end.
WINDOW_MIN = 1


def off_or_from(least: float) -> AfterValidator:
    """For a time that 0 turns off: 0, or at least so many seconds."""

    def check(seconds: float) -> float:
        if 0 < seconds < least:
            raise ValueError(f"it has to be 0, or at least {least:g} s")
        return seconds

    return AfterValidator(check)


SHOWN = 200  # characters of a wrong value in an error


class _Section(BaseModel):
    # No infinite deadline: it is none, and the last resort's thread cannot wait for it.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Start(_Section):
    """Deadlines of a start."""

    arguments_timeout: Seconds = Field(300, gt=0, description="parsing, which imports vLLM")
    bind_timeout: Seconds = Field(10, gt=0, description="binding the socket")
    engine_timeout: Seconds = Field(3600, gt=0, description="loading the model")
    stall_timeout: Period = Field(300, description="a load in which nothing moves")
    serve_timeout: Seconds = Field(120, gt=0, description="building vLLM's app")
    ready_timeout: Seconds = Field(600, gt=0, description="/health and all warm-up requests")
    poll_interval: Period = Field(0.1, description="between two asks for /health")


# Of one request of `warm_up.extra`: a large prompt fits, a mistake such as a whole file does not.
BODY_LIMIT = 100_000
# Answers that come before the work is done: nothing would be warm.
_ANSWERED_EARLY = ("stream", "background")


class WarmUpRequest(_Section):
    """One more request that comes before READY, as a client would make it."""

    path: str = Field(
        pattern=r"^/[!-~]{1,199}$", description="of vLLM's API, such as /v1/chat/completions"
    )
    body: dict[str, Any] = Field(description="what is posted, as JSON; `model` is filled in")
    name: str = Field("", max_length=100, description="what errors call it; by default its path")
    required: bool = Field(True, description="false: a failure is a warning, not a failed start")

    @field_validator("body")
    @classmethod
    def _is_a_request(cls, body: dict[str, Any]) -> dict[str, Any]:
        try:
            size = len(json.dumps(body, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if size > BODY_LIMIT:
            raise ValueError(f"{size} bytes of JSON, at most {BODY_LIMIT} are allowed")
        for key in _ANSWERED_EARLY:
            if body.get(key):
                raise ValueError(f"{key!r} is of no use here: the whole answer is waited for")
        return body


class WarmUp(_Section):
    """The requests that come before READY."""

    requests: int = Field(2, ge=0, le=100, description="how many; 0 skips them and the canary")
    max_tokens: int = Field(8, ge=1, le=1024, description="tokens that each generates")
    prompt: str = Field("Hello", min_length=1, max_length=BODY_LIMIT, description="what is asked")
    extra: tuple[WarmUpRequest, ...] = Field(
        (), max_length=50, description="requests that follow, each with a path and a body"
    )


class Health(_Section):
    """The watchdog."""

    interval: Period = Field(5, description="between two probes while READY")
    timeout: Period = Field(10, description="how long an answer may take")
    recovery_interval: Period = Field(1, description="between two probes while DEGRADED")
    degrade_after: Count = Field(1, ge=1, description="misses in a row that lead to DEGRADED")
    recover_after: Count = Field(2, ge=1, description="answers in a row that lead back to READY")
    give_up_after: Count = Field(
        6, ge=1, description="misses in a row, one per timeout of silence, that end service"
    )
    compile_timeout: Seconds = Field(
        300, ge=0, description="an engine that is silent because it compiles does not hang; 0: no"
    )
    admin_timeout: Seconds = Field(
        1800,
        ge=0,
        description="an engine that is silent because of an administrative request, such as "
        "/stop_profile, does not hang; 0: no",
    )
    canary_timeout: Seconds = Field(30, gt=0, description="how long the canary may take")
    evidence_timeout: Seconds = Field(
        5, gt=0, description="saving what can be seen of a lost engine before it is ended"
    )
    token_interval: Annotated[Seconds, off_or_from(PERIOD_MIN)] = Field(
        15, ge=0, description="an engine that has not moved for so long is asked for a token; 0: no"
    )


# A name as in a Host header, without a port.
HostList = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9._:\[\]-]{1,253})$")], ...],
    Field(max_length=100),
]


class Http(_Section):
    """The main port; `hosts` is for the control plane, too."""

    health: Literal["ready", "live"] = Field(
        "ready",
        description="what /health and /ping report: ready (200 in READY alone) or live (always)",
    )
    models: Literal["open", "gated"] = Field(
        "open",
        description="GET /v1/models outside READY: open (vLLM answers once it can) or gated (503)",
    )
    header_timeout: Seconds = Field(
        20, gt=0, description="within which a request's head has to be complete"
    )
    body_timeout: Seconds = Field(
        60, gt=0, description="silence of a client in the middle of a request's body"
    )
    max_connections: Count = Field(
        0, ge=0, description="connections at a time; 0: as many as the limit on open files allows"
    )
    hosts: HostList = Field(
        (),
        description="names besides localhost that a request's Host may have, where the port is on "
        "a loopback address; with any, vLLM's own routes ask for them, too; '*': any name",
    )


class Restart(_Section):
    """Restarts of the engine within the process."""

    max: int = Field(3, ge=0, le=1000, description="how many in a window; 0 means stop instead")
    window: Seconds = Field(3600, ge=WINDOW_MIN, description="in which restarts count")
    backoff: Period = Field(1, description="before the second in a window; then it doubles")
    backoff_max: Period = Field(60, description="what it doubles up to")


class Stop(_Section):
    """Deadlines of a stop, one per stage: their sum is the longest possible stop."""

    cancel: Seconds = Field(1, gt=0, description="an interrupted action's own clean-up")
    drain: Seconds = Field(12, ge=0, description="running requests may finish")
    cut: Seconds = Field(1, gt=0, description="ending the rest with an explicit error")
    watchdog: Seconds = Field(1, gt=0, description="stopping the watchdog")
    app: Seconds = Field(2, gt=0, description="shutting vLLM's app down")
    engine: Seconds = Field(5, gt=0, description="ending the engine and its processes")
    server: Seconds = Field(1.5, gt=0, description="closing the HTTP server")
    socket: Seconds = Field(0.5, gt=0, description="closing the socket")
    companion: Seconds = Field(1, gt=0, description="each of control plane and heartbeat")
    leftovers: Seconds = Field(0.5, gt=0, description="what ignored its cancellation so far")


# An engine that is asked something may be busy; longer than any RPC should take, short of for ever.
COMMAND_S = 60.0
# Between a command's own deadline, whose error says more, and that of the one who waits for it.
COMMAND_MARGIN_S = 5.0

COMPANIONS_AT_MOST = 2  # the control plane and the heartbeat


class Settings(_Section):
    """All of them. Defaults suit one worker under Kubernetes' grace period of 30 s."""

    start: Start = Start()
    warm_up: WarmUp = WarmUp()
    health: Health = Health()
    http: Http = Http()
    restart: Restart = Restart()
    stop: Stop = Stop()

    def stop_stages(self) -> dict[str, Seconds]:
        """Each stage of a stop with its deadline, in the order in which they happen."""
        s = self.stop
        return {
            "cancel the running action": s.cancel,
            "drain": s.drain,
            "cut": s.cut,
            "watchdog": s.watchdog,
            "app": s.app,
            "engine": s.engine,
            "server": s.server,
            "socket": s.socket,
            "heartbeat and control plane": s.companion * COMPANIONS_AT_MOST,
            "what ignored its cancellation": s.leftovers,
        }

    def command_deadline(self, name: str) -> Seconds:
        """How long an operator's command may take, in seconds, up to a restart's releases."""
        drains = name in ("restart", "sleep")
        return COMMAND_S + (self.stop.drain + self.stop.cut if drains else 0.0)

    def command_bound(self, name: str) -> Seconds:
        """How long whoever asked for a command waits for its outcome, in seconds.

        Longer than command_deadline(): a restart also cuts what is left and releases the engine
        and what stands on it, each within its own deadline.
        """
        s = self.stop
        releases = s.cancel + s.cut + s.watchdog + s.app + s.engine if name == "restart" else 0.0
        return self.command_deadline(name) + releases + COMMAND_MARGIN_S

    @cached_property
    def stop_bound(self) -> Seconds:
        """The longest possible stop, from the ask to the end of run()."""
        return sum(self.stop_stages().values())


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue  # an item of a list, whose model is known already
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _complaint(error: Mapping[str, Any]) -> str:
    location = tuple(error["loc"])
    name = brief(".".join(str(part) for part in location), SHOWN)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(location[-1]), _known_keys(Settings, location[:-1]), n=1, cutoff=0.5
        )
        return f"{name}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
    got = repr(error["input"])
    return f"{name}: {brief(error['msg'])} (got {brief(got, SHOWN)})"


def _assign(data: dict[str, Any], assignment: str) -> tuple[str, str]:
    """Puts one assignment into the data; returns the section and the key that it was for."""
    shown = f"--set {brief(assignment, SHOWN)}"
    name, equals, value = assignment.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not key:
        raise ArgumentsError(f"{shown}: expected SECTION.KEY=VALUE, for example health.interval=5")
    inner = data.setdefault(section, {})
    if not isinstance(inner, dict):
        raise ArgumentsError(f"{shown}: {brief(section)!r} is not a section")
    document = parse(value)
    for problem in document.problems:
        raise ArgumentsError(f"{shown}: {brief(problem.message)}", hint=problem.hint)
    inner[key] = document.value
    return section, key


def _refuse_other_kind(path: Path | None, data: dict[str, Any]) -> None:
    from ichat_lifecycle.file_kinds import Kind, kind_of  # which knows these settings

    kind = kind_of(data)
    if kind is not None and kind is not Kind.SETTINGS:
        message = f"--lifecycle-config {path}: this is {kind.what}, not one of settings"
        raise ArgumentsError(message, hint=kind.hint)


def load_settings(path: Path | None = None, assignments: Iterable[str] = ()) -> Settings:
    """Settings from a YAML file, if any, with `--set` assignments on top.

    Raises:
        InputMissingError: the file cannot be read.
        ArgumentsError: the file is not YAML, or a key or a value is wrong; names file and line.
    """
    document = Document() if path is None else _read(path)
    data = {} if is_null(document.value) else document.value
    if not isinstance(data, dict):
        raise ArgumentsError(f"{path}:1:1: expected sections such as 'health:' at the top level")
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    assigned = {_assign(merged, assignment) for assignment in assignments}

    def where(location: Location) -> str:
        if location[0] not in data or location[:2] in assigned:
            return "--set "
        place = document.place(location)
        return f"{path}:{place.line}:{place.column}: "

    def complain(location: Location, message: str, hint: str) -> None:
        name = ".".join(map(str, location))
        raise ArgumentsError(f"{where(location)}{name}: {message}", hint=hint)

    try:
        return Settings.model_validate(typed(merged, Settings, complain))
    except ValidationError as error:
        _refuse_other_kind(path, data)
        first = error.errors()[0]
        raise ArgumentsError(where(first["loc"]) + _complaint(first)) from None


def _read(path: Path) -> Document:
    try:
        document = read(path)
    except InputMissingError as error:
        raise InputMissingError(f"--lifecycle-config {error.message}") from error
    for problem in document.problems:
        raise ArgumentsError(problem.told(path))
    return document
