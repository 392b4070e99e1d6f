"""Plans out of a file: how each worker is run, or all that keeps it from being run."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ichat_lifecycle.adapters.last_resort import MARGIN_S, TELLING_S
from ichat_lifecycle.config import Settings
from ichat_lifecycle.document import Document, Place, Problem
from ichat_lifecycle.errors import ArgumentsError, InputMissingError
from ichat_lifecycle.fleet.checks import complain, control_of
from ichat_lifecycle.fleet.command_size import too_large
from ichat_lifecycle.fleet.engine_argv import UNKNOWN
from ichat_lifecycle.fleet.engine_words import Answer, Asker, NoEngineError, Question, ask_vllm
from ichat_lifecycle.fleet.gateway import RunningGateway
from ichat_lifecycle.fleet.load import Fleet, Planned, load, wrong
from ichat_lifecycle.fleet.models import WorkerConfig
from ichat_lifecycle.fleet.ports import KILL_MARGIN_S, Plan
from ichat_lifecycle.input_file import read_input
from ichat_lifecycle.printable import brief
from ichat_lifecycle.redact import SECRET_LENGTH_MIN, Secrets, is_secret, secrets_in
from ichat_lifecycle.scalars import is_null
from ichat_lifecycle.secret_words import apart

# What a Gateway's log level is to a worker; anything else is `info`.
_LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "critical": "error",
    "fatal": "error",
}
_API_KEY, API_KEY_VARIABLE = "api_key", "VLLM_API_KEY"
TOLD_MAX = 100  # problems: what more of them there are is counted
CERTIFICATE_LIMIT = 4 * 2**20  # bytes of a file that are looked at
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")


class BadFileError(ArgumentsError):
    """The file is wrong. `problems` are all that was found."""

    def __init__(self, path: Path, problems: list[Problem]) -> None:
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{brief(str(path))}: {what}", code="bad_file")
        self.told = [problem.told(path) for problem in problems[:TOLD_MAX]]
        if len(problems) > TOLD_MAX:
            self.told.append(f"{brief(str(path))}: and {len(problems) - TOLD_MAX} more problems")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file comes to.

    Attributes:
        plans: in the order of the file.
        doubts: what could not be known on this machine.
        as_written: gives a text with `${NAME}` in place of what variables gave, to be shown.
    """

    content: Fleet
    plans: tuple[Plan, ...]
    doubts: tuple[Problem, ...] = ()
    as_written: Callable[[str], str] = str


def read_plans(
    path: Path,
    environment: Mapping[str, str],
    ask: Asker = ask_vllm,
    *,
    here: bool = True,
    gateway: RunningGateway | None = None,
) -> Reading:
    """Reads a file and makes plans of it.

    Args:
        here: the workers are to run on this machine: their models have to be there.
        gateway: looks for a Gateway that runs where none is named; default: nobody looks.

    Raises:
        InputMissingError: the file cannot be read.
        BadFileError: it is wrong.
        NoEngineError: there is no vLLM to ask for its arguments, and nothing else is wrong.
    """
    content, document = load(path, environment)
    if content is None:
        raise BadFileError(path, _masked(document))
    if gateway is not None:
        content = _registered(content, gateway)
    complain(content, document, here=here)
    try:
        answers = ask([_question(worker) for worker in content.workers])
    except NoEngineError:
        if not wrong(document):
            raise
        answers = ()
    pairs = list(zip(content.workers, answers, strict=False))
    document.problems += [
        p for worker, answer in pairs for p in _problems(worker, answer, document)
    ]
    plans = tuple(_plan(worker, answer, content) for worker, answer in pairs)
    for (worker, _), plan in zip(pairs, plans, strict=True):
        document.problems += _sizes(worker, plan, environment, document)
    document.problems.sort(key=lambda problem: problem.place)
    if wrong(document):
        raise BadFileError(path, _masked(document))
    exposed = _exposed(path, document)
    return Reading(content, plans, (*_masked(document), *exposed), document.as_written)


def _masked(document: Document) -> list[Problem]:
    """The problems without the values of variables: a path in a message may hold one."""
    written = document.as_written
    return [
        replace(one, message=written(one.message), hint=one.hint and written(one.hint))
        for one in document.problems
    ]


def _exposed(path: Path, document: Document) -> Iterator[Problem]:
    """Secrets in a file that all may read; those that come from variables do not stand there."""
    here = [
        secret
        for secret in secrets_in(document.value)
        if len(secret) >= SECRET_LENGTH_MIN and document.as_written(secret) == secret
    ]
    if here and path.stat().st_mode & stat.S_IROTH:
        what = "every user of this machine can read this file, and there are secrets in it"
        yield Problem(Place(1, 1), what, f"chmod 600 {path}, or ${{NAME}} for each", doubt=True)


def _registered(content: Fleet, gateway: RunningGateway) -> Fleet:
    address = gateway.address(content.server)
    server = content.server.model_copy(update={"gateway_address": address})
    return replace(content, server=server)


def _question(worker: Planned) -> Question:
    engine = tuple(_engine_argv(worker.config))
    keys = {
        k: v for k, v in worker.config.vllm.items() if k != _API_KEY or _api_key(worker) is None
    }
    return Question(engine, keys, tuple(WorkerConfig.model_fields), _environment(worker))


def _api_key(worker: Planned) -> str | None:
    """The only one, if there is only one: vLLM takes that from its environment, too."""
    found = worker.config.vllm.get(_API_KEY)
    one = found[0] if isinstance(found, list) and len(found) == 1 else found
    return str(one) if isinstance(one, str | int) and not isinstance(one, bool) else None


def _environment(worker: Planned) -> Mapping[str, str]:
    """An argument can be read by everybody on the machine, a variable cannot."""
    key = _api_key(worker)
    return worker.config.env if key is None else {**worker.config.env, API_KEY_VARIABLE: key}


def _problems(worker: Planned, answer: Answer, document: Document) -> Iterator[Problem]:
    name = worker.name
    secrets = Secrets()
    secrets.collect(worker.config.vllm, worker.config.env)
    for one in answer.wrong:
        key = one.key or _key_in(one.message, worker)
        what = f"{name}: {key}: {one.message}" if one.key else f"{name}: {one.message}"
        hint, at = one.hint, (*worker.at(key), *one.at)
        hidden = document.is_secret(at) or any(is_secret(str(part)) for part in (key, *one.at))
        if hidden and one.message != UNKNOWN:
            hint = None
            if not one.at:
                what = f"{name}: {key}: vLLM's parser does not take its value"  # it says which
        yield Problem(document.place(at), secrets.scrub(what), hint and secrets.scrub(hint))


def _sizes(
    worker: Planned, plan: Plan, environment: Mapping[str, str], document: Document
) -> Iterator[Problem]:
    for what, why in too_large(plan.argv, plan.env, environment):
        at, said = worker.own, why
        if what in plan.env:
            at = (*worker.at("env"), str(what))
        elif what is not None:
            flag = what if what.startswith("--") else plan.argv[plan.argv.index(what) - 1]
            name = flag.partition("=")[0]
            key = "lifecycle" if name == "--set" else _key_in(name, worker)
            at, said = worker.at(key), f"{key}: {why}"
        yield Problem(document.place(at), f"{worker.name}: {said}")


def _key_in(message: str, worker: Planned) -> str:
    """The key whose flag a message is about; the worker's first one where none is."""
    for flag in _FLAG.findall(message):
        key = flag.replace("-", "_")
        for known in (key, key.removeprefix("no_")):
            if known in worker.keys:
                return str(known)
    return next(iter(worker.keys), "model_name")


def _plan(worker: Planned, answer: Answer, fleet: Fleet) -> Plan:
    config = worker.config
    argv, secret_argv = apart((*_engine_argv(config), *_our_argv(worker, fleet), *answer.words))
    certificate, key, ca = (
        _path(config.vllm.get(f"ssl_{name}")) for name in ("certfile", "keyfile", "ca_certs")
    )
    return Plan(
        name=config.shown_name,
        model=config.model_name,
        host=config.host,
        port=config.port,
        uds=_path(config.vllm.get("uds")),
        control=control_of(worker, fleet),
        argv=argv,
        secret_argv=secret_argv,
        env=_environment(worker),
        stop_bound_s=_longest_stop_s(worker),
        replace=config.replace,
        gpu_ids=tuple(config.gpu_ids) if config.gpu_ids is not None else None,
        certificate=(certificate, key) if certificate else None,
        certificate_digest=_digest(certificate, key, ca),
        answer_headers=answer.headers,
        hosts=worker.settings.http.hosts,
    )


def _digest(*paths: str | None) -> str:
    """Of what is in these files; "" where there is none, or none that can be read."""
    found = hashlib.sha256()
    for path in filter(None, paths):
        try:
            found.update(hashlib.sha256(read_input(path, CERTIFICATE_LIMIT)).digest())
        except InputMissingError:
            return ""
    return found.hexdigest() if any(paths) else ""


def _path(value: Any) -> str | None:
    return None if is_null(value) else str(value)


def _engine_argv(config: WorkerConfig) -> Iterator[str]:
    """What iChat's own keys are to `serve`."""
    yield from ("--model-path", config.model_path)
    if "served_model_name" not in config.vllm:
        yield from ("--served-model-name", config.model_name)
    if "uds" not in config.vllm:
        yield from ("--host", config.host, "--port", str(config.port))
    if config.gpu_ids is not None:
        yield from ("--gpu-ids", json.dumps(config.gpu_ids, separators=(",", ":")))
    if config.tokenizer_path is not None:
        yield from ("--tokenizer-path", config.tokenizer_path)
    if config.context_length is not None:
        yield from ("--context-length", str(config.context_length))


def _our_argv(worker: Planned, fleet: Fleet) -> Iterator[str]:
    """The flags of `serve` that are ours."""
    config = worker.config
    yield from ("--control-host", config.control_host)
    port = control_of(worker, fleet).port
    if config.control_port is not None or not port:  # otherwise it is serve's own default
        yield from ("--control-port", str(port))
    yield from ("--grace-period", f"{_killed_after_s(worker):g}")  # then we kill it
    yield from ("--lifecycle-log-format", "json")
    yield from ("--lifecycle-log-level", _LEVELS.get(fleet.server.log_level.lower(), "info"))
    gateway = config.gateway_address or fleet.server.gateway_address
    if gateway is not None:
        yield from ("--gateway-address", gateway)
        yield from ("--heartbeat-interval", str(config.heartbeat_interval))
        yield from ("--heartbeat-timeout", str(fleet.server.heartbeat_timeout))
        if config.advertise_host is not None:
            yield from ("--advertise-host", config.advertise_host)
        if config.advertise_port is not None:
            yield from ("--advertise-port", str(config.advertise_port))
        # Without a pid: a worker that is started again is the same to the Gateway.
        worker_id = config.worker_id or f"{socket.gethostname()}-{config.shown_name}"
        yield from ("--worker-id", worker_id)
    for name, value in _changed(worker.settings):
        yield from ("--set", f"{name}={_as_yaml(value)}")


def _longest_stop_s(worker: Planned) -> float:
    """With its last resort."""
    return worker.settings.stop_bound + MARGIN_S + TELLING_S


def _killed_after_s(worker: Planned) -> float:
    return _longest_stop_s(worker) + KILL_MARGIN_S


def _changed(settings: Settings) -> Iterator[tuple[str, Any]]:
    """What was set, the defaults among it too: set is more than the same by default."""
    for section, values in settings.model_dump(exclude_unset=True).items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def _as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
