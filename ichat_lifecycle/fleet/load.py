"""configs.yaml read whole: what it means, or all that is wrong with it at once.

Besides iChat's sections there are `defaults`, which every worker has unless it says otherwise, and
`lifecycle`, the deadlines and budgets of all workers; a worker's own `lifecycle` wins key by key.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from ichat_lifecycle.config import SHOWN, Settings
from ichat_lifecycle.document import VALUES_MAX, Document, Place, Problem, read
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.file_kinds import Kind, kind_of
from ichat_lifecycle.fleet.models import (
    CONTROL_OFFSET,
    PORT_MAX,
    FleetSettings,
    ServerSettings,
    WorkerConfig,
)
from ichat_lifecycle.preflight import scan
from ichat_lifecycle.printable import brief
from ichat_lifecycle.redact import is_secret
from ichat_lifecycle.scalars import Location, is_null, typed
from ichat_lifecycle.shutdown_timeout import overruled, with_shutdown_timeout

Model = TypeVar("Model", bound=BaseModel)

SERVER, WORKERS, FLEET = "server_settings", "managed_workers", "fleet"
DEFAULTS, LIFECYCLE = "defaults", "lifecycle"
SECTIONS = (SERVER, WORKERS, DEFAULTS, LIFECYCLE, FLEET)

# What each worker has to have of its own.
_NO_DEFAULT = ("name", "model_name", "port", "control_port", "advertise_port", "worker_id")
# vLLM's keys that settings depend on; the later ones win.
_SEEN_EARLY = ("config", "shutdown-timeout", "shutdown_timeout")
WORKERS_MAX = 256  # of one supervisor; each of them is an engine
# What `defaults` and `lifecycle` stand for: each worker has a copy of them.
COPIED_MAX = 10 * VALUES_MAX
_NAME_SHOWN = 60  # characters
_TYPO = 0.7  # so alike are a key of iChat's Gateway that we know and one that was meant to be it


@dataclass(frozen=True)
class Planned:
    """A worker as the file has it, and where that stands.

    Attributes:
        name: what messages call it: as it is written, where a variable gives it.
    """

    name: str
    config: WorkerConfig
    settings: Settings
    own: Location
    keys: Mapping[str, Location]

    def at(self, key: str) -> Location:
        """Where a key of it stands, maybe among the defaults."""
        return self.keys.get(key, self.own)


@dataclass(frozen=True)
class Fleet:
    """The whole file, with defaults in their places."""

    server: ServerSettings
    fleet: FleetSettings
    workers: tuple[Planned, ...]

    @property
    def fleet_port(self) -> int:
        """Where the supervisor listens; 0 where any free one will do."""
        if self.fleet.port is not None:
            return self.fleet.port
        wanted = self.server.port + CONTROL_OFFSET
        return wanted if wanted <= PORT_MAX else 0


def load(path: Path, environment: Mapping[str, str]) -> tuple[Fleet | None, Document]:
    """Reads a file. The fleet is what could be understood; the document's problems say what not.

    Raises:
        InputMissingError: it cannot be read.
    """
    document = read(path, environment)
    fleet = None if document.problems and document.value is None else build(document)
    return fleet, document


def wrong(document: Document) -> list[Problem]:
    """The problems that keep the file from being used."""
    return [problem for problem in document.problems if not problem.doubt]


def build(document: Document) -> Fleet | None:
    """What the document means; what is wrong with it goes to its problems, and is left out."""
    data = document.value
    if not isinstance(data, dict):
        what = "there is nothing in it" if data is None else "expected sections"
        document.problems.append(Problem(Place(1, 1), what, f"{SERVER}:, {WORKERS}:"))
        return None
    kind = kind_of(data)
    if kind is not None and kind is not Kind.FLEET:
        message = f"this is {kind.what}, not a configs.yaml"
        document.problems.append(Problem(Place(1, 1), message, kind.hint))
        return None
    reader = _Reader(document, data)
    reader.complain_of_unknown_sections()
    server = reader.section(SERVER, ServerSettings) or ServerSettings()
    fleet = reader.section(FLEET, FleetSettings) or FleetSettings()
    workers = tuple(worker for worker in reader.workers() if worker is not None)
    return Fleet(server, fleet, workers)


class _Reader:
    """Takes the sections apart, and notes what is wrong with each."""

    def __init__(self, document: Document, data: dict[str, Any]) -> None:
        self._document = document
        self._data = data
        self._defaults = self._mapping(DEFAULTS)
        self._common = self._common_settings()
        for key in _NO_DEFAULT:
            if key in self._defaults:
                self._tell((DEFAULTS, key), f"{DEFAULTS}: {key} is each worker's own")

    def _tell(self, location: Location, message: str, hint: str | None = None) -> None:
        place = self._document.place(location)
        self._document.problems.append(Problem(place, message, hint))

    def _mapping(self, section: str) -> dict[str, Any]:
        found = self._data.get(section)
        if is_null(found):
            return {}
        if not isinstance(found, dict):
            self._tell((section,), f"{section}: expected keys and values")
            return {}
        return found

    def complain_of_unknown_sections(self) -> None:
        for name in self._data:
            if name not in SECTIONS:
                self._tell((name,), f"{name}: no such section", _meant(name, SECTIONS))

    def section(self, name: str, model: type[Model]) -> Model | None:
        """A section as its model has it; None where something is wrong with it."""
        data = self._mapping(name)
        if model is ServerSettings:
            self._complain_of_typos(name, data, model)
        data = {key: value for key, value in data.items() if not is_null(value)}
        return self._validated(model, data, _Origins((name,), {}), name)

    def _complain_of_typos(self, name: str, data: dict[str, Any], model: type[BaseModel]) -> None:
        """Of a section that may hold more than we know."""
        for key in data.keys() - model.model_fields.keys():
            if near := difflib.get_close_matches(key, model.model_fields, n=1, cutoff=_TYPO):
                place = self._document.place((name, key))
                message, hint = f"{name}: unknown key {key}", f"did you mean {near[0]}?"
                self._document.problems.append(Problem(place, message, hint, doubt=True))

    def workers(self) -> Iterator[Planned | None]:
        """Each worker; None in place of one that is wrong."""
        found = self._data.get(WORKERS)
        if not isinstance(found, list) or not found:
            self._tell((WORKERS,), f"{WORKERS}: expected a list of at least one worker")
            return
        if len(found) > WORKERS_MAX:
            self._tell((WORKERS, WORKERS_MAX), f"{WORKERS}: more than {WORKERS_MAX} workers")
            return
        if (_size(self._defaults) + _size(self._common)) * len(found) > COPIED_MAX:
            what = f"{DEFAULTS} and {LIFECYCLE}: too many values for {len(found)} workers"
            self._tell((DEFAULTS if self._defaults else LIFECYCLE,), what)
            return
        for number, own in enumerate(found):
            location = (WORKERS, number)
            if isinstance(own, dict):
                yield self._worker(own, location)
            else:
                self._tell(location, "a worker: expected keys and values, such as model_name: NAME")

    def _worker(self, own: dict[str, Any], location: Location) -> Planned | None:
        inherited = {key: (DEFAULTS, key) for key in self._defaults}
        keys = {**inherited, **{key: (*location, key) for key in own}}
        origins = _Origins(location, keys)
        data = {**self._defaults, **own}
        # A null takes a default back.
        data = {key: value for key, value in data.items() if not is_null(value)}
        key = "name" if data.get("name") else "model_name"
        name = self._as_written(data.get(key)) or f"worker {location[1]}"
        # Its deadlines and budgets have a model of their own.
        rest = {k: v for k, v in data.items() if k != LIFECYCLE or not isinstance(v, dict)}
        config = self._validated(WorkerConfig, rest, origins, name)
        settings = self._settings(data, origins, name)
        if config is None or settings is None:
            return None
        if not self._document.is_secret(origins.of((key,))):
            name = config.shown_name
        settings = self._with_shutdown_timeout(name, config, settings, origins)
        return Planned(name, config, settings, location, keys)

    def _as_written(self, name: Any) -> str:
        """For messages; "" for what is no name. A value that is cut first is not found in it."""
        known = isinstance(name, str | int | float)
        return brief(self._document.as_written(str(name)), _NAME_SHOWN) if known else ""

    def _with_shutdown_timeout(
        self, name: str, config: WorkerConfig, settings: Settings, origins: _Origins
    ) -> Settings:
        """The drain that vLLM's own key asks for, or the file that is vLLM's `--config`."""
        words = [f"--{key}={config.vllm[key]}" for key in _SEEN_EARLY if key in config.vllm]
        given = scan(argparse.Namespace(), words).shutdown_timeout
        key = next((key for key in reversed(_SEEN_EARLY) if key in config.vllm), "")
        try:
            found = with_shutdown_timeout(settings, given)
        except ArgumentsError as error:
            self._tell(origins.of((key,)), f"{name}: {error.message}")
            return settings
        if overruled(found, given):
            wins = f"lifecycle: stop.drain is {found.stop.drain:g} and wins"
            message = f"{name}: {key} {given} has no effect"
            place = self._document.place(origins.of((key,)))
            self._document.problems.append(Problem(place, message, wins, doubt=True))
        return found

    def _common_settings(self) -> dict[str, Any]:
        """Everybody's; nothing where something is wrong with them, which is told once."""
        common = self._mapping(LIFECYCLE)
        origins = _Origins((LIFECYCLE,), {})
        return {} if self._validated(Settings, common, origins, LIFECYCLE) is None else common

    def _settings(self, data: dict[str, Any], origins: _Origins, name: str) -> Settings | None:
        """The worker's own deadlines and budgets on top of everybody's."""
        common, own = self._common, data.get(LIFECYCLE)
        if own is not None and not isinstance(own, dict):
            return None  # its model has complained of it
        sections: dict[str, Any] = {}
        places: dict[str, Location] = {}
        for base, given in (((LIFECYCLE,), common), (origins.of((LIFECYCLE,)), own or {})):
            for section, values in given.items():
                before = sections.get(section)
                if isinstance(before, dict) and isinstance(values, dict):
                    sections[section] = {**before, **values}
                else:
                    sections[section] = values
                places |= {section: (*base, section)}
                if isinstance(values, dict):
                    places |= {f"{section}.{key}": (*base, section, key) for key in values}
        return self._validated(Settings, sections, _Dotted(places), f"{name}: {LIFECYCLE}")

    def _validated(
        self, model: type[Model], data: dict[str, Any], origins: Origins, name: str
    ) -> Model | None:
        told: set[Location] = set()

        def complain(location: Location, message: str, hint: str) -> None:
            told.add(location)
            origin = origins.of(location)
            what = f"{name}: {'.'.join(map(str, location))}: {message}"
            self._tell(origin, what, None if self._is_hidden(origin, location) else hint)

        data = typed(data, model, complain)
        try:
            valid = model.model_validate(data)
        except ValidationError as error:
            for one in error.errors():
                location = tuple(one["loc"])
                key = ".".join(str(part) for part in location)
                origin = origins.of(location)
                if self._document.is_unknown(origin) or location in told:
                    continue
                hidden = self._is_hidden(origin, location)
                self._tell(origin, *_complaint(f"{name}: {key}", one, model, hidden=hidden))
            return None
        return None if told else valid

    def _is_hidden(self, origin: Location, location: Location) -> bool:
        return self._document.is_secret(origin) or any(map(is_secret, map(str, location)))


class Origins(Protocol):
    """Where the parts of some data stand in the file."""

    def of(self, location: Location) -> Location: ...


@dataclass(frozen=True)
class _Origins:
    """Data that stand in one place, but for some keys."""

    base: Location
    keys: Mapping[str, Location]

    def of(self, location: Location) -> Location:
        first, *rest = location
        return (*self.keys.get(str(first), (*self.base, first)), *rest)


@dataclass(frozen=True)
class _Dotted:
    """Data of which each value may stand somewhere else."""

    places: Mapping[str, Location]

    def of(self, location: Location) -> Location:
        for length in range(len(location), 0, -1):
            known = self.places.get(".".join(map(str, location[:length])))
            if known is not None:
                return (*known, *location[length:])
        return (LIFECYCLE,)


def _complaint(
    name: str, error: Any, model: type[BaseModel], *, hidden: bool
) -> tuple[str, str | None]:
    """What is wrong in words of ours, and what was meant; without a value that is `hidden`."""
    location = tuple(error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"{name}: unknown key", _meant(str(location[-1]), _known(model, location[:-1]))
        case "missing":
            return f"{name} is missing", None
        case _:
            hidden |= isinstance(error["input"], dict | list)  # a secret may be in it
            hint = None if hidden else f"it is {brief(repr(error['input']), SHOWN)}"
            return f"{name}: {_lower(error['msg'].removeprefix('Value error, '))}", hint


def _size(value: Any) -> int:
    """How many values are in it, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, inner))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _known(model: type[BaseModel], location: Location) -> list[str]:
    for part in location:
        found = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            return []
        model = found
    return list(model.model_fields)


def _meant(name: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else None
