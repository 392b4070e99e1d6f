"""What may be wrong with a file whose parts are all right: workers in each other's way, models and
certificates that are not there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ichat_lifecycle.adapters.advertise import gateway_host, is_here, is_loopback
from ichat_lifecycle.adapters.sockets import UDS_PATH_MAX
from ichat_lifecycle.adapters.tls import Tls
from ichat_lifecycle.credentials import header_value
from ichat_lifecycle.document import Document, Problem
from ichat_lifecycle.environment import HUB_KEYS, KEYS
from ichat_lifecycle.errors import ArgumentsError, InputMissingError
from ichat_lifecycle.fleet.load import FLEET, SERVER, Fleet, Planned
from ichat_lifecycle.fleet.ports import Listener
from ichat_lifecycle.gpus import gpus_needed
from ichat_lifecycle.input_file import kind_instead
from ichat_lifecycle.preflight import Scan, check_model
from ichat_lifecycle.redact import redact
from ichat_lifecycle.scalars import Location, is_null

# What vLLM takes of a GPU unless it is told otherwise.
DEFAULT_UTILIZATION = 0.92
# What stands in the place of a name in the supervisor's routes.
RESERVED = ("events", "reload", "stop")


def complain(fleet: Fleet, document: Document, *, here: bool) -> None:
    """Notes all of it as problems of the document.

    Args:
        here: the workers are to run on this machine.
    """
    for check in (_keys, _names, _tls, _ports, _gateways, _gpus, _all_gpus, _enough_gpus):
        document.problems.extend(check(fleet, document))
    for look in (_models, _files):
        document.problems.extend(look(fleet, document, here))
    document.problems.sort(key=lambda problem: problem.place)


# Names --------------------------------------------------------------------------------------------


def _names(fleet: Fleet, document: Document) -> Iterator[Problem]:
    shown: dict[str, Planned] = {}
    routed: dict[tuple[str, str], Planned] = {}
    for worker in fleet.workers:
        name, config = worker.name, worker.config
        if config.shown_name in RESERVED:
            place = document.place(worker.at("name" if config.name else "model_name"))
            yield Problem(place, f"{name}: a route has this name", "give the worker another name:")
        first = shown.setdefault(config.shown_name, worker)
        gateway = config.gateway_address or fleet.server.gateway_address
        rival = routed.setdefault((gateway, config.model_name), worker) if gateway else worker
        if rival is not worker:
            place = document.place(worker.at("model_name"))
            yield Problem(
                place,
                f"{name}: the Gateway {gateway} would refuse a second worker for the model name "
                f"{config.model_name}",
                f"{_line(document, rival, 'model_name')} has it, too",
            )
        elif first is not worker:
            key = "name" if config.name else "model_name"
            place = document.place(worker.at(key))
            hint = f"{_line(document, first, key)} has it, too; give one of them another name:"
            yield Problem(place, f"{name}: two workers have this name", hint)


def _line(document: Document, worker: Planned, key: str) -> str:
    return f"the worker in line {document.place(worker.at(key)).line}"


# Keys ---------------------------------------------------------------------------------------------


def _keys(fleet: Fleet, document: Document) -> Iterator[Problem]:
    """What a worker would refuse, or a client could not send."""
    yield from _unsendable("fleet: token", fleet.fleet.token, (FLEET, "token"), document)
    for worker in fleet.workers:
        name = worker.name
        for key in ("api_key", "hf_token"):
            value = _vllm_value(worker, key)
            for one in value if isinstance(value, list) else [value]:
                yield from _unsendable(f"{name}: {key}", one, worker.at(key), document)
        for variable in (*KEYS, *HUB_KEYS):
            at = (*worker.at("env"), variable)
            yield from _unsendable(
                f"{name}: env: {variable}", worker.config.env.get(variable), at, document
            )


def _unsendable(what: str, key: Any, at: Location, document: Document) -> Iterator[Problem]:
    try:
        header_value(what, key if isinstance(key, str) else "")
    except ArgumentsError as error:
        yield Problem(document.place(at), error.message, error.hint)


# Models -------------------------------------------------------------------------------------------


def _models(fleet: Fleet, document: Document, here: bool) -> Iterator[Problem]:
    for worker in fleet.workers:
        config = worker.config
        looked = (
            ("model_path", Scan(model=config.model_path, model_flag="model_path")),
            (
                "tokenizer_path",
                Scan(tokenizer=config.tokenizer_path, tokenizer_flag="tokenizer_path"),
            ),
        )
        for key, scan in looked:
            try:
                check_model(scan)
            except InputMissingError as error:
                place = document.place(worker.at(key))
                elsewhere = not here and _is_elsewhere(scan.model or scan.tokenizer or "")
                message = f"{worker.name}: {error.message}"
                yield Problem(place, message, error.hint, doubt=elsewhere)


def _is_elsewhere(path: str) -> bool:
    """Where even the directory around it is not there, it is on another machine."""
    # os.path, because pathlib raises for a path that is too long.
    return not os.path.exists(os.path.dirname(path) or ".")  # noqa: PTH110, PTH120


# Files --------------------------------------------------------------------------------------------

_TLS_FILES = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
# What vLLM reads as a file. A template may also be given as text.
_FILES = (*_TLS_FILES, "config", "log_config_file", "chat_template")


def _files(fleet: Fleet, document: Document, here: bool) -> Iterator[Problem]:
    for worker in fleet.workers:
        for key in ("uds", *_TLS_FILES):
            path, said = worker.config.vllm.get(key), f"{worker.name}: {key}:"
            place = document.place(worker.at(key))
            if is_null(path):
                continue
            if not isinstance(path, str) or not path or "\0" in path:
                yield Problem(place, f"{said} expected a path")
            elif key == "uds" and len(path.encode()) > UDS_PATH_MAX:
                yield Problem(place, f"{said} more than {UDS_PATH_MAX} bytes, which none can have")
            elif key in _TLS_FILES and not os.access(path, os.R_OK):
                elsewhere = not here and _is_elsewhere(path)
                yield Problem(place, f"{said} {path} cannot be read", doubt=elsewhere)
        for key in _FILES:
            value = _vllm_value(worker, key)
            kind = kind_instead(value) if isinstance(value, str) else None
            if kind is not None:
                place = document.place(worker.at(key if key in worker.keys else _dashed(key)))
                what = f"{worker.name}: {key}: {value} is {kind}, not a file"
                yield Problem(place, what, "give a regular file: it is read more than once")


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _tls(fleet: Fleet, document: Document) -> Iterator[Problem]:
    """What a worker would refuse. Whether the files are there is looked at by `_files`."""
    for worker in fleet.workers:
        given = {k: v for k, v in worker.config.vllm.items() if not is_null(v)}
        paths = [given[key] for key in _TLS_FILES if key in given]
        if not all(isinstance(path, str) and os.access(path, os.R_OK) for path in paths):
            continue
        if any(map(kind_instead, paths)):
            continue  # _files complains of it
        try:
            Tls.of(given.get).check()
        except ArgumentsError as error:
            flag = error.message.partition(":")[0].partition("/")[0].partition(" ")[0]
            key = flag.removeprefix("--").replace("-", "_")
            message = f"{worker.name}: {error.message}"
            yield Problem(document.place(worker.at(key)), message, error.hint)


# Ports --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wish:
    """Who wants to listen where, and where that stands."""

    what: str
    where: Listener
    at: Location
    derived: bool = False  # from another port

    def rivals(self, other: _Wish) -> bool:
        return other.where.collides(self.where) and not (self.derived and other.derived)


def _ports(fleet: Fleet, document: Document) -> Iterator[Problem]:
    before: list[_Wish] = []
    for wish in _wishes(fleet):
        # The first one is enough: two hundred workers on one port are two hundred problems.
        one = next(filter(wish.rivals, before), None)
        before.append(wish)
        if one is not None:
            yield Problem(
                document.place(wish.at),
                f"{wish.what}: {wish.where.uds or wish.where.port} is taken by {one.what}",
                f"see line {document.place(one.at).line}",
            )


def _wishes(fleet: Fleet) -> Iterator[_Wish]:
    supervisor, server = fleet.fleet, fleet.server
    key = "uds" if supervisor.uds else "port"
    listener = Listener(supervisor.host, fleet.fleet_port, supervisor.uds)
    derived = supervisor.port is None and "port" in server.model_fields_set
    yield _Wish(f"{FLEET}: {key}", listener, (FLEET, key), derived)
    if "port" in server.model_fields_set:
        yield _Wish("the Gateway", Listener(server.host, server.port), (SERVER, "port"))
    for worker in fleet.workers:
        config, name = worker.config, worker.name
        key = "uds" if "uds" in config.vllm else "port"
        listener = Listener(config.host, config.port, config.vllm.get("uds"))
        yield _Wish(f"{name}: {key}", listener, worker.at(key))
        if config.control_port is not None:
            yield _Wish(f"{name}: control_port", config.control, worker.at("control_port"))


def control_of(worker: Planned, fleet: Fleet) -> Listener:
    """Where a worker's control plane listens. The default port gives way to one that the file
    gives to anybody: port 0 is any free one."""
    control = worker.config.control
    given = (wish.where for wish in _wishes(fleet))
    if worker.config.control_port is None and any(map(control.collides, given)):
        return Listener(control.host, 0)
    return control


# Gateways -----------------------------------------------------------------------------------------


def _gateways(fleet: Fleet, document: Document) -> Iterator[Problem]:
    """A Gateway on another machine reaches neither 127.0.0.1 nor a Unix socket of this one."""
    for worker in fleet.workers:
        config = worker.config
        gateway = config.gateway_address or fleet.server.gateway_address
        if gateway is None or is_here(gateway_host(gateway)[0]):
            continue
        host = config.advertise_host or config.host
        uds = config.vllm.get("uds") if config.advertise_host is None else None
        if uds or is_loopback(host):
            key = "advertise_host" if config.advertise_host else "uds" if uds else "host"
            yield Problem(
                document.place(worker.at(key if key in worker.keys else "model_name")),
                f"{worker.name}: the Gateway {redact(gateway)} seems to be on another "
                f"machine, and cannot reach {uds or host}",
                "host: 0.0.0.0, or advertise_host: the address at which it reaches this worker",
                doubt=True,
            )


# GPUs ---------------------------------------------------------------------------------------------


def _gpus(fleet: Fleet, document: Document) -> Iterator[Problem]:
    users: dict[str, list[Planned]] = defaultdict(list)
    for worker in fleet.workers:
        for gpu in worker.config.gpu_ids or ():
            users[str(gpu)].append(worker)
    for gpu, workers in users.items():
        if len(workers) == 1 or all(worker.config.share_gpus for worker in workers):
            continue
        if (total := sum(map(_utilization, workers))) > 1 + 1e-9:
            last = workers[-1]
            names = ", ".join(worker.name for worker in workers)
            yield Problem(
                document.place(last.at("gpu_ids")),
                f"{last.name}: GPU {gpu} is given to {names}, which ask for "
                f"{total:.4g} of its memory",
                "lower gpu_memory_utilization to 1 in all, or say share_gpus: true in each",
            )


def _all_gpus(fleet: Fleet, document: Document) -> Iterator[Problem]:
    """Who sees all of them sees those that others have chosen."""
    all_of_them = [worker for worker in fleet.workers if worker.config.gpu_ids is None]
    choosy = [worker for worker in fleet.workers if worker.config.gpu_ids]
    if all_of_them and choosy:
        for worker in all_of_them:
            name, other = worker.name, choosy[0].name
            message = f"{name} sees all GPUs, those of {other}, too"
            place = document.place(worker.at("model_name"))
            yield Problem(place, message, "gpu_ids: [NUMBER, …]", doubt=True)


def _enough_gpus(fleet: Fleet, document: Document) -> Iterator[Problem]:
    """A worker that asks for more processes than it has GPUs fails after its start."""
    for worker in fleet.workers:
        ids = worker.config.gpu_ids
        found = gpus_needed(partial(_vllm_value, worker)) if ids else None
        if ids and found and found[0] > len(ids):
            needed, sizes = found
            message = f"{worker.name}: gpu_ids has {len(ids)} of the {needed} GPUs"
            hint = f"{sizes} needs {needed}"
            yield Problem(document.place(worker.at("gpu_ids")), message, hint)


def _vllm_value(worker: Planned, name: str) -> Any:
    keys = worker.config.vllm
    return keys.get(name, keys.get(_dashed(name)))


def _utilization(worker: Planned) -> float:
    asked = _vllm_value(worker, "gpu_memory_utilization")
    try:
        return float(asked)  # vLLM's parser complains of what is none
    except (TypeError, ValueError):
        return DEFAULT_UTILIZATION
