"""What a worker tells its supervisor of itself, checked at the door.

A worker is a stranger to its supervisor: what it runs may be anybody's code, and its words may hold
a client's. Nothing but what is named here gets in; each field has a type and a size. Whoever reads
a `Told` need not doubt it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ichat_lifecycle.adapters.sd_notify import ALIVE, LIFECYCLE, WORDS_LIMIT
from ichat_lifecycle.printable import one_line
from ichat_lifecycle.states import State

NAME_LIMIT, URL_LIMIT = 64, 300  # characters
LONGEST_S = 1e9  # of an expected time, in seconds: 30 years


def shortened(text: str, limit: int = WORDS_LIMIT) -> str:
    """One line without control characters, and at most so long."""
    return one_line(text[:limit])


def _with_port(url: str) -> str:
    parts = urlsplit(url)  # a port that is none is a ValueError
    if parts.scheme != "http" or not parts.port:
        raise ValueError("this is no URL of a control plane")
    return url


class Why(BaseModel):
    """Why a worker is not READY, or why it ends."""

    model_config = ConfigDict(strict=True, frozen=True)

    # An honest message may be long: it is cut, and the state that it comes with counts.
    message: Annotated[str, AfterValidator(shortened)]


class Told(BaseModel):
    """What control.view.summary_document says, as far as a supervisor needs it.

    Attributes:
        fraction: of the phase, 0 to 1.
        expected_s: how long the start should take, in seconds.
        control_url: where its control plane answers. Only the port of it counts: a worker does not
            say on which host its supervisor asks.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    state: State
    reason: Why | None = None
    phase: Annotated[str, AfterValidator(lambda text: shortened(text, NAME_LIMIT))] | None = None
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    expected_s: Annotated[float, Field(ge=0, le=LONGEST_S)] | None = None
    control_url: Annotated[str, Field(max_length=URL_LIMIT), AfterValidator(_with_port)] | None = (
        None
    )

    def scrubbed(self, scrub: Callable[[str], str]) -> Told:
        """The same without secrets: clients of the worker's port are told the reason."""
        reason = self.reason and Why(message=scrub(self.reason.message))
        phase = self.phase and scrub(self.phase)
        return self.model_copy(update={"reason": reason, "phase": phase})

    @property
    def message(self) -> str | None:
        """The words of the reason."""
        return self.reason.message if self.reason else None

    @property
    def control_port(self) -> int | None:
        """Of its control plane; None before that answers."""
        return urlsplit(self.control_url).port if self.control_url else None


@dataclass(frozen=True, slots=True)
class Message:
    """What a datagram of a worker comes to.

    Attributes:
        alive: it shows that the worker's event loop turns. Nonsense does not: any thread of a
            worker that hangs could send that.
        problem: what is wrong with it; "" where nothing is.
    """

    alive: bool = False
    told: Told | None = None
    problem: str = ""


def message_in(data: bytes) -> Message:
    """What a datagram says. Never raises, whatever it holds."""
    lines = data.split(b"\n")  # by the protocol; str.splitlines knows more line ends
    alive = f"{ALIVE}=1".encode() in lines
    begin = f"{LIFECYCLE}=".encode()
    told = [line.removeprefix(begin) for line in lines if line.startswith(begin)]
    if not told:
        return Message(alive)
    if len(told) > 1:
        return Message(alive, problem=f"{LIFECYCLE} stands there more than once")
    try:
        return Message(True, Told.model_validate_json(told[0]))
    except ValidationError as error:
        return Message(alive, problem=_first_of(error))


def _first_of(error: ValidationError) -> str:
    """Without the value, which is a stranger's."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return shortened(f"{place}: {first['msg']}" if place else first["msg"])
