"""What can be known before vLLM is imported, which takes seconds: is the address free, is the model
there. Arguments are only skimmed here; arguments.py parses them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichat_lifecycle.adapters import vllm_memory
from ichat_lifecycle.adapters.logging_choice import FILE_FIELD, FILE_FLAG, FILE_VARIABLE, check_file
from ichat_lifecycle.adapters.sockets import check_listening
from ichat_lifecycle.adapters.tls import Tls
from ichat_lifecycle.arguments import (
    PORT_MAX,
    Given,
    agreed,
    config_path,
    gpu_ids_of,
    no_model,
    read_config,
    unexpected,
)
from ichat_lifecycle.errors import ArgumentsError, InputMissingError, LifecycleError
from ichat_lifecycle.refusals import refuse_flags, refuse_variables
from ichat_lifecycle.skim import Skimmed, of_config, skim

DEFAULT_PORT = 8000  # vLLM's own

# What is looked for → the flags that give it, and the framework's attribute that also does.
_FLAGS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "host": (("--host",), "host"),
    "port": (("--port",), "port"),
    "uds": (("--uds",), "uds"),
    "model": (("--model", "--model-path"), "model_path"),
    "tokenizer": (("--tokenizer", "--tokenizer-path"), ""),
    "served_model_name": (("--served-model-name",), "served_model_name"),
    "hf_config_path": (("--hf-config-path",), ""),
    "shutdown_timeout": (("--shutdown-timeout",), ""),
    "memory_fraction": (("--gpu-memory-utilization",), ""),
    "kv_cache_bytes": (("--kv-cache-memory-bytes",), ""),
}


@dataclass(frozen=True, slots=True)
class Scan:
    """What a glance at the arguments shows; None is not given.

    `model_flag` and `tokenizer_flag` name who gave these, for errors. `hf_config_path` is where the
    model's configuration is taken from instead of its directory.
    """

    host: str | None = None
    port: int = DEFAULT_PORT
    uds: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    served_model_name: str | None = None
    hf_config_path: str | None = None
    shutdown_timeout: str | None = None
    memory_fraction: str | None = None
    kv_cache_bytes: str | None = None
    model_flag: str = "--model"
    tokenizer_flag: str = "--tokenizer"


def scan(framework_args: argparse.Namespace, backend_argv: Sequence[str]) -> Scan:
    """Skims the arguments. The last value in `backend_argv` counts, else that of the `--config`
    file, else the framework's. All that is wrong is left for the parser to complain about, but:

    Raises:
        ArgumentsError: the port is not an integer from 0 to 65535.
    """
    argv = [str(token) for token in backend_argv]
    found: dict[str, tuple[str, str]] = {}  # name → flag, value
    for name, (flags, attribute) in _FLAGS.items():
        value = _first(getattr(framework_args, attribute, None))
        if value:
            found[name] = flags[-1], value
    names = {flag: name for name, (flags, _) in _FLAGS.items() for flag in flags}
    for flag, value in (*_in_config(argv), *_in_argv(argv)):
        if flag in names:
            found[names[flag]] = flag, value
    values = {name: value for name, (_, value) in found.items() if name != "port"}
    return Scan(
        port=_port(found["port"][1]) if "port" in found else DEFAULT_PORT,
        model_flag=found.get("model", ("--model",))[0],
        tokenizer_flag=found.get("tokenizer", ("--tokenizer",))[0],
        **values,
    )


def _first(value: Any) -> str:
    """The text of a value, of a list that of its first item; "" for none."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _in_argv(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Flags with their first values, in order; the first token as the model if it is no flag."""
    if argv and argv[0] and not argv[0].startswith("-"):
        yield "--model", argv[0]
    for token, following in itertools.pairwise([*argv, "-"]):
        if token == "--":
            return
        flag, equals, value = token.partition("=")
        if not flag.startswith("--"):
            continue
        if not equals:
            value = following
            if value.startswith("-") and not value[1:].isdecimal():
                continue
        if value:
            yield flag.replace("_", "-"), value


def _in_config(argv: list[str]) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(LifecycleError):
        path = config_path(argv)
        for key, value in read_config(path).items() if path else ():
            if _first(value):
                yield "--" + str(key).replace("_", "-"), _first(value)


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= PORT_MAX:
        raise ArgumentsError(f"--port {text}: expected an integer from 0 to {PORT_MAX}")
    return port


# Refusals -----------------------------------------------------------------------------------------


def refuse_early(
    framework_args: argparse.Namespace,
    backend_argv: Sequence[str],
    environment: Mapping[str, str],
) -> None:
    """Raises what `arguments.parse` would raise, where the words alone show it.

    Raises:
        ArgumentsError: no model, two different ones or one word too many; GPUs that are not named
            as such; a flag or a variable that asks for what this process cannot do; TLS that
            no server can speak; a logging configuration that is not one.
        InputMissingError: a file for that, or of `--config`, cannot be read.
    """
    argv = [str(token) for token in backend_argv]
    refuse_variables(environment)
    command = skim(argv)
    path = config_path(argv)
    file = of_config(read_config(path)) if path else Skimmed()
    if not command.doubtful and len(command.models) > 1:
        raise unexpected(command.models[1])
    given = list(_models(command)) or list(_models(file))
    if value := _first(getattr(framework_args, "model_path", None)):
        given.append(Given("the framework's --model-path", value))
    if given:
        agreed("model", given)
    elif not command.doubtful:
        raise no_model()
    both = {**file.given, **command.given}
    if (ids := both.get("gpu-ids")) is not None:
        gpu_ids_of(ids, "--gpu-ids")
    refuse_flags(both.get)
    if not command.doubtful:
        _check_tls(both)
    sources = {
        FILE_FLAG: both.get("log-config-file"),
        FILE_FIELD: both.get(FILE_FIELD),
        FILE_VARIABLE: environment.get(FILE_VARIABLE),
    }
    if (source := next((name for name, given in sources.items() if given), None)) is not None:
        check_file(str(sources[source]), source, environment)


def _check_tls(given: Mapping[str, Any]) -> None:
    flags = {name: value for name, value in given.items() if name.startswith("ssl-")}
    if not any(isinstance(value, bool) for value in flags.values()):  # one without its value
        Tls.of(lambda name: flags.get(name.replace("_", "-"))).check()


def _models(found: Skimmed) -> Iterator[Given]:
    """In the order in which `arguments.parse` names them."""
    for source, value in (
        ("--model", found.given.get("model")),
        ("the positional model", next(iter(found.models), None)),
        ("--model-path", found.given.get("model-path")),
    ):
        if value is not None and not isinstance(value, bool):
            yield Given(source, str(value))


# Address ------------------------------------------------------------------------------------------


def check_address(scan: Scan) -> None:
    """Binds the address and lets it go again.

    Raises:
        AddressError: it is taken, not allowed, or not an address of this machine.
    """
    check_listening(scan.host, scan.port, scan.uds)


# Files --------------------------------------------------------------------------------------------


def check_memory(scan: Scan) -> None:
    """Compares the memory that vLLM wants on a CPU with what is free.

    Raises:
        LimitError: it is not enough.
    """
    with contextlib.suppress(ValueError):  # no number: that is the parser's to complain about
        fraction = None if scan.memory_fraction is None else float(scan.memory_fraction)
        vllm_memory.check(fraction, scan.kv_cache_bytes, os.environ)


def check_model(scan: Scan) -> None:
    """Looks at the model and the tokenizer where they are clearly local paths. Anything else, such
    as `org/name`, is left to the engine.

    Raises:
        InputMissingError: one is not there, cannot be read, or is no model.
    """
    if scan.model and _is_local(scan.model):
        where = f"{scan.model_flag} {scan.model}"
        _check_readable(where, scan.model)
        _check_holds_model(where, Path(scan.model), needs_config=not scan.hf_config_path)
    if scan.tokenizer and _is_local(scan.tokenizer):
        _check_readable(f"{scan.tokenizer_flag} {scan.tokenizer}", scan.tokenizer)


def _is_local(text: str) -> bool:
    # os.path, because pathlib raises for a path that is too long, and vLLM asks it the same way.
    # No name of a hub begins with a dot.
    return text.startswith(("/", ".", "~")) or os.path.exists(text)  # noqa: PTH110


def _check_readable(where: str, text: str) -> None:
    path = Path(text)
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissingError(
            f"{where}: no such file or directory", code="model_missing", hint=_hint(text)
        ) from None
    except (OSError, ValueError) as error:
        raise InputMissingError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    if not os.access(path, os.R_OK | (os.X_OK if is_directory else 0)):
        raise InputMissingError(
            f"{where}: not allowed to read it", hint="give this user the right to read it"
        )


def _hint(text: str) -> str:
    if text.startswith("~"):
        # os.path, because pathlib raises for a user that does not exist.
        return f"~ is not expanded here: write {os.path.expanduser(text)}"  # noqa: PTH111
    return "check the path; a model of a hub is written ORG/NAME"


def _check_holds_model(where: str, path: Path, *, needs_config: bool) -> None:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputMissingError(
                f"{where}: a file, but not a .gguf one", hint="give the model's directory"
            )
        return
    # params.json is what Mistral's own format has in its place.
    configs = [path / "config.json", path / "params.json"]
    readable = [config for config in configs if config.is_file() and os.access(config, os.R_OK)]
    if needs_config and not readable:
        raise InputMissingError(
            f"{where}: no readable config.json in it",
            code="model_incomplete",
            hint="give the directory that holds the model's config.json",
        )
