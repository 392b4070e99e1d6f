"""iChat's standard arguments to vLLM's, with the framework's own merged in.

vLLM's parser comes in as an object: this module knows argparse, and imports no vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ichat_lifecycle.config_scalars import check_config
from ichat_lifecycle.document import Problem
from ichat_lifecycle.document import parse as parse_yaml
from ichat_lifecycle.errors import ArgumentsError, InputMissingError
from ichat_lifecycle.file_kinds import Kind, kind_of
from ichat_lifecycle.gpus import GpuId, parse_gpu_ids
from ichat_lifecycle.input_file import TooLargeError, read_input
from ichat_lifecycle.printable import brief
from ichat_lifecycle.refusals import refuse_flags
from ichat_lifecycle.yaml_nodes import TEXT_MAX, YamlError, as_loaded

PORT_MAX = 65535

# iChat's flag → the attribute of vLLM's that it stands for.
ALIASES: Mapping[str, str] = {
    "--model-path": "model",
    "--tokenizer-path": "tokenizer",
    "--context-length": "max_model_len",
}
GPU_IDS = "--gpu-ids"

# What the framework may give as well → its attribute in framework_args.
_FROM_FRAMEWORK: Mapping[str, str] = {
    "model": "model_path",
    "host": "host",
    "port": "port",
    "served_model_name": "served_model_name",
}
_MERGED = (*ALIASES.values(), "host", "port", "served_model_name")
_PATHS = ("model", "tokenizer")
_OURS = "ichat_"  # begins the attributes that our own flags leave in the namespace
_NOT_GIVEN = object()
_PYDANTIC_LINK = re.compile(r"For further information visit https://\S+")


@dataclass(frozen=True, slots=True)
class ParsedArguments:
    """What the arguments come to.

    Args:
        vllm: vLLM's own namespace, with nothing of ours in it.
        gpu_ids: the devices to show to the engine; None shows all, empty shows none.
        changed: the values that are not the parser's defaults, JSON-safe, for display. May hold
            secrets: see redact.py.
    """

    vllm: argparse.Namespace
    gpu_ids: tuple[GpuId, ...] | None
    changed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Given:
    """One value that somebody gave, and how to name it in an error."""

    source: str
    value: Any

    def __str__(self) -> str:
        value = self.value
        if isinstance(value, list):  # served model names, as they are written in argv
            value = " ".join(value)
        if isinstance(value, tuple):  # GPUs
            value = json.dumps(value)
        return f"{self.source} {value}"


def parse(
    framework_args: argparse.Namespace,
    backend_argv: Sequence[str],
    parser: argparse.ArgumentParser,
    also_known: Sequence[str] = (),
) -> ParsedArguments:
    """Parses `backend_argv` with vLLM's parser and merges what the framework gave.

    Of `framework_args` it reads host, port, served_model_name (str or list), model_path and gpu_ids
    (list or JSON string); an attribute that is missing or None is not given. The parser gains
    iChat's flags, and can be used again. `also_known` are flags of others, to suggest where one is
    mistyped.

    Raises:
        ArgumentsError: a flag is unknown, a value is wrong, two sources disagree, no model is
            given, or this process cannot do what is asked.
        InputMissingError: the file of `--config` cannot be read.
        SystemExit: `--help` was asked for and printed.
    """
    _add_our_flags(parser)
    argv = _with_config_apart(str(token) for token in backend_argv)
    namespace = _parse_strictly(parser, argv, also_known)
    _prefer_command_line(parser, namespace, argv, also_known)
    positional = getattr(namespace, "model_tag", None)
    for dest in _MERGED:
        action = _action(parser, dest)
        if action is not None:
            given = list(_given(dest, namespace, framework_args, action))
            setattr(namespace, dest, agreed(dest, given) if given else _default(action))
            if dest == "model" and not given:
                raise no_model()
    if positional is not None:
        namespace.model_tag = namespace.model
    given_ids = list(_given_gpu_ids(namespace, framework_args))
    gpu_ids = agreed("gpu_ids", given_ids) if given_ids else None
    _remove_ours(namespace)
    refuse_flags(lambda name: getattr(namespace, name.replace("-", "_"), None))
    return ParsedArguments(namespace, gpu_ids, _changed(parser, namespace))


# The parser ---------------------------------------------------------------------------------------


def _action(parser: argparse.ArgumentParser, dest: str) -> argparse.Action | None:
    return next((a for a in parser._actions if a.dest == dest), None)


def _our_dest(flag: str) -> str:
    return _OURS + flag.lstrip("-").replace("-", "_")


def _add_our_flags(parser: argparse.ArgumentParser) -> None:
    """As real flags of the parser, so that spelling, `--config` and `--help` treat them alike."""
    if GPU_IDS in parser._option_string_actions:
        return
    group = parser.add_argument_group("iChat", "iChat's standard arguments.")
    for flag, dest in ALIASES.items():
        target = _action(parser, dest)
        if target is not None and flag not in parser._option_string_actions:
            group.add_argument(
                flag,
                dest=_our_dest(flag),
                type=target.type or str,
                default=argparse.SUPPRESS,
                help=f"The same as {target.option_strings[0]}.",
            )
    group.add_argument(
        GPU_IDS,
        dest=_our_dest(GPU_IDS),
        action=_GpuIds,
        nargs="+",
        default=argparse.SUPPRESS,
        help="The GPUs to use: numbers or UUIDs, such as 0,1.",
    )


class _GpuIds(argparse.Action):
    """One value, or several as a `--config` file gives the items of a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, gpu_ids_of(" ".join(values), GPU_IDS))


def gpu_ids_of(value: Any, source: str) -> tuple[GpuId, ...]:
    """The GPUs that a value names.

    Raises:
        ArgumentsError: it names none, or one twice; begins with `source`.
    """
    try:
        return parse_gpu_ids(value)
    except ValueError as error:
        got = "nothing" if value is True else brief(repr(value))  # a flag without a value
        raise ArgumentsError(f"{source}: {error}, got {got}") from error


def _parse_strictly(
    parser: argparse.ArgumentParser, argv: list[str], also_known: Sequence[str]
) -> argparse.Namespace:
    # argparse sets a default only where the attribute is absent: one that is still _NOT_GIVEN
    # afterwards was given neither in argv nor in the --config file.
    merged = {dest: _NOT_GIVEN for dest in _MERGED if _action(parser, dest)}
    namespace = argparse.Namespace(**merged)
    if argv and argv[-1].startswith("--") and "." in argv[-1] and "=" not in argv[-1]:
        # vLLM's parser would look past the end for the value of a dotted flag.
        raise ArgumentsError(f"{argv[-1]}: expected a value")
    path = config_path(argv)
    # Read here for its errors, too, which are clearer than those of vLLM's own reader.
    content = read_config(path) if path is not None else {}
    if path is not None:
        check_config(path, content, parser)
    with _strict(parser, _taken_already(content, also_known)) as extras:
        try:
            parser.parse_args(argv, namespace)
        except ArgumentsError:
            raise
        except Exception as error:
            # vLLM's own conversions raise whatever they meet.
            raise ArgumentsError(f"the arguments cannot be parsed: {_words(error)}") from error
    _refuse_unknown([*parser._option_string_actions, *also_known], extras)
    return namespace


def _taken_already(content: Mapping[Any, Any], also_known: Sequence[str]) -> frozenset[str]:
    """The flags of a `--config` file that its reader's own program has taken (see cli)."""
    return frozenset({as_flag(key) for key in content} & set(also_known))


def as_flag(key: object) -> str:
    """The flag that a key of a `--config` file stands for."""
    return "--" + str(key).replace("_", "-")


def _prefer_command_line(
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    argv: list[str],
    also_known: Sequence[str],
) -> None:
    """For flags with another name, too, argv comes before the `--config` file, as for vLLM."""
    if "--config" not in argv:
        return
    at = argv.index("--config")
    alone = _parse_strictly(parser, argv[:at] + argv[at + 2 :], also_known)
    for dest in ALIASES.values():
        names = [dest, *(_our_dest(alias) for alias, to in ALIASES.items() if to == dest)]
        names += ["model_tag"] if dest == "model" else []
        given = {name: getattr(alone, name, None) for name in names}
        if any(value not in (None, _NOT_GIVEN) for value in given.values()):
            for name in names:
                setattr(namespace, name, given[name])


def _without(args: Iterable[str], flags: frozenset[str]) -> list[str]:
    """The words without these flags and their values, as a `--config` file's reader writes them."""
    kept: list[str] = []
    dropping = False
    for token in args:
        if token.startswith("--"):
            dropping = token.replace("_", "-") in flags
        if not dropping:
            kept.append(token)
    return kept


@contextlib.contextmanager
def _strict(
    parser: argparse.ArgumentParser, taken: frozenset[str] = frozenset()
) -> Iterator[list[str]]:
    """While it lasts, errors are raised and only whole flags match; yields what is left over.

    Args:
        taken: flags that only a `--config` file can still bring, and that are passed over.
    """
    extras: list[str] = []
    parse_known_args = parser.parse_known_args
    option_tuples: Callable[[str], list[Any]] = getattr(parser, "_get_option_tuples", lambda _: [])

    def known(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(_without(args, taken) if taken else args, namespace)
        extras.extend(rest)
        return namespace, []

    def whole(option_string: str) -> list[Any]:
        # allow_abbrev does not hold for `-t`, which would match `-tp`. What stays is `-n2`.
        return [match for match in option_tuples(option_string) if len(match[1]) == len("-n")]

    patches = {
        "error": _raise,
        "parse_known_args": known,
        "_get_option_tuples": whole,
        "allow_abbrev": False,
    }
    attributes = vars(parser)
    saved = {name: attributes[name] for name in patches if name in attributes}
    attributes.update(patches)
    try:
        yield extras
    finally:
        for name in patches:
            del attributes[name]
        attributes.update(saved)


def _raise(message: str) -> NoReturn:
    raise ArgumentsError(_one_line(message).removeprefix("argument "))


def _one_line(text: str) -> str:
    return " ".join(_PYDANTIC_LINK.sub("", text).split())


def _words(error: Exception) -> str:
    return _one_line(str(error)) or type(error).__name__


def _refuse_unknown(known: Sequence[str], extras: list[str]) -> None:
    # The value after an unknown flag is left over too, and is not worth naming.
    unknown = dict.fromkeys(token.partition("=")[0] for token in extras if token.startswith("-"))
    if unknown:
        flags = "; ".join(f"unknown flag {flag}{_nearest(known, flag)}" for flag in unknown)
        raise ArgumentsError(flags, code="unknown_flag")
    if extras:
        raise unexpected(extras[0])


def unexpected(token: str) -> ArgumentsError:
    """The error for a word that belongs to no flag."""
    return ArgumentsError(
        f"unexpected argument {token!r}", hint="only the model may be given without a flag"
    )


def no_model() -> ArgumentsError:
    """The error for arguments without a model."""
    return ArgumentsError(
        "no model given: --model-path or --model",
        code="no_model",
        hint="ichat-lifecycle serve --model-path DIRECTORY, or ORG/NAME of a hub",
    )


def _nearest(known: Sequence[str], flag: str) -> str:
    if flag.startswith("--"):  # a short flag is never what a long one was meant to be
        known = [option for option in known if option.startswith("--")]
    near = difflib.get_close_matches(flag, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


# The --config file --------------------------------------------------------------------------------


def _with_config_apart(argv: Iterable[str]) -> list[str]:
    """`--config=FILE` as two tokens: vLLM silently reads no file from the joined form."""
    apart: list[str] = []
    for token in argv:
        flag, equals, value = token.partition("=")
        apart += [flag, value] if equals and flag == "--config" else [token]
    return apart


def config_path(argv: Iterable[str]) -> Path | None:
    """The file that `--config` names, or None.

    Raises:
        ArgumentsError: it is given more than once, or without a file.
    """
    tokens = _with_config_apart(argv)
    if "--config" not in tokens:
        return None
    if tokens.count("--config") > 1:
        raise ArgumentsError("--config is given more than once", hint="join the files into one")
    value = tokens[tokens.index("--config") + 1 :][:1]
    if not value:
        raise ArgumentsError("--config: expected the path of a YAML file")
    return Path(value[0])


def read_config(path: Path) -> dict[str, Any]:
    """The flags in a `--config` file, as written there.

    Raises:
        InputMissingError: the file cannot be read.
        ArgumentsError: it is not YAML, or holds no keys.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ArgumentsError(f"--config {path}: expected a file that ends in .yaml or .yml")
    try:
        text = read_input(path, TEXT_MAX).decode("utf-8")
    except TooLargeError as error:
        raise ArgumentsError(f"--config {error.message}") from error
    except InputMissingError as error:
        raise InputMissingError(f"--config {error.message}", hint=error.hint) from error
    except UnicodeDecodeError as error:
        raise ArgumentsError(f"--config {path}: not UTF-8: {error.reason}") from error
    # First by our own reader: what it takes is small, whatever the aliases in it repeat.
    for problem in parse_yaml(text).problems:
        raise ArgumentsError(f"--config {problem.told(path)}")
    try:
        content = as_loaded(text)
    except YamlError as error:
        problem = Problem(error.place, error.message, "quote the value")
        raise ArgumentsError(f"--config {problem.told(path)}") from error
    if not isinstance(content, dict):
        raise ArgumentsError(f"--config {path}: expected lines such as 'port: 8000'")
    kind = kind_of(content)
    if kind is not None and kind is not Kind.FLAGS:
        message = f"--config {path}: this is {kind.what}, not one of vLLM's flags"
        raise ArgumentsError(message, hint=kind.hint)
    return content


# Who gave what ------------------------------------------------------------------------------------


def _given(
    dest: str,
    namespace: argparse.Namespace,
    framework_args: argparse.Namespace,
    action: argparse.Action,
) -> Iterator[Given]:
    """Every value for one attribute, the one that wins first. A None is not given."""
    flag = action.option_strings[0]
    candidates = [(flag, getattr(namespace, dest))]
    if dest == "model":
        candidates.append(("the positional model", getattr(namespace, "model_tag", None)))
    for alias, target in ALIASES.items():
        if target == dest:
            flag = alias
            candidates.append((alias, getattr(namespace, _our_dest(alias), None)))
    name = _FROM_FRAMEWORK.get(dest)
    value = getattr(framework_args, name, None) if name else None
    if value not in (None, "", []):
        source = f"the framework's {flag}"
        candidates.append((source, _convert(action, value, source)))
    for source, value in candidates:
        if value is not None and value is not _NOT_GIVEN:
            yield Given(source, value)


def _given_gpu_ids(
    namespace: argparse.Namespace, framework_args: argparse.Namespace
) -> Iterator[Given]:
    if hasattr(namespace, _our_dest(GPU_IDS)):
        yield Given(GPU_IDS, getattr(namespace, _our_dest(GPU_IDS)))
    value = getattr(framework_args, "gpu_ids", None)
    if value is not None:
        source = f"the framework's {GPU_IDS}"
        yield Given(source, gpu_ids_of(value, source))


def _convert(action: argparse.Action, value: Any, source: str) -> Any:
    """A framework's value as the parser would have made it of the text."""
    kind = _kind(action)
    try:
        if action.nargs in ("+", "*"):
            return [kind(str(item)) for item in ([value] if isinstance(value, str) else value)]
        return kind(str(value))
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise ArgumentsError(f"{source}: invalid value {value!r}") from error


def agreed(dest: str, given: list[Given]) -> Any:
    """The value that all sources agree on: the first one's.

    Raises:
        ArgumentsError: two of them differ, with the code `arguments_conflict`.
    """
    first = given[0]
    for other in given[1:]:
        if not _same(dest, first.value, other.value):
            raise ArgumentsError(
                f"{first} and {other} are in conflict",
                code="arguments_conflict",
                hint="give one of them, or the same value to both",
            )
    if dest == "port" and not 0 <= first.value <= PORT_MAX:
        raise ArgumentsError(f"{first}: expected a port from 0 to {PORT_MAX}")
    return first.value


def _same(dest: str, one: Any, other: Any) -> bool:
    if dest in _PATHS:
        one, other = os.path.normpath(one), os.path.normpath(other)
    return bool(one == other)


def _default(action: argparse.Action) -> Any:
    """A default as it arrives in the namespace: argparse converts those that are strings."""
    default = action.default
    if isinstance(default, str) and default != argparse.SUPPRESS:
        return _kind(action)(default)
    return default


def _kind(action: argparse.Action) -> Callable[[str], Any]:
    return action.type if callable(action.type) else str


def _remove_ours(namespace: argparse.Namespace) -> None:
    for name in [name for name in vars(namespace) if name.startswith(_OURS)]:
        delattr(namespace, name)


# The result ---------------------------------------------------------------------------------------


def _changed(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> dict[str, Any]:
    defaults = {a.dest: _default(a) for a in parser._actions if a.dest != "model_tag"}
    return {
        dest: _json_safe(value, defaults[dest])
        for dest, value in vars(namespace).items()
        if dest in defaults and not _equal(value, defaults[dest])
    }


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a foreign type's comparison may raise anything
        return False


def _json_safe(value: Any, default: Any = None) -> Any:
    """The value for display; of one of vLLM's config objects only what differs from `default`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return {
            name: _json_safe(item)
            for name, item in fields.items()
            if not _equal(item, getattr(default, name, _NOT_GIVEN))
        }
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    # Of exactly these types: a subclass, such as an enum of integers, says more by its repr.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return repr(value)
