"""The command line. Light on imports: the engine's processes import this module again."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ichat_lifecycle.adapters import closed_output, standard_streams
from ichat_lifecycle.printable import one_line

if TYPE_CHECKING:
    from ichat_lifecycle.config import Settings

PROGRAM = "ichat-lifecycle"
PORT_MAX = 65535


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs one command; never returns. Exit codes: see the README.

    A command whose reader has gone (`schema | head -1`) ends with 0 and without a word.
    """
    try:
        _main(argv)
    except OSError as error:
        closed_output.end_without_a_reader(error)
        raise


def _as_typed(word: str) -> str:
    """A word in UTF-8 under a locale that is ASCII: Python has its bytes as surrogates."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return os.fsencode(word).decode("utf-8", "surrogateescape")
    return word


def _main(argv: list[str] | None) -> NoReturn:
    standard_streams.prepare()
    # From the first moment on, a signal before anything has started is a clean end.
    signal.signal(signal.SIGTERM, _end_before_start)
    signal.signal(signal.SIGINT, _end_before_start)
    typed = list(map(_as_typed, sys.argv[1:])) if argv is None else argv
    words = _with_secret_words(typed)
    with closed_output.flushing():  # what --help has printed
        args, rest = build_parser().parse_known_args(words)
    args.typed = words[1:]  # after the command
    args.seen = typed[1:]  # in the process list
    if args.command != "serve":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if rest and args.command != "serve":
        from ichat_lifecycle.redact import redact

        build_parser().error(f"unrecognized arguments: {' '.join(redact(rest))}")
    with closed_output.flushing():
        code = args.run(args, rest)
    sys.exit(code)


def _with_secret_words(typed: list[str]) -> list[str]:
    """With those of a worker that its supervisor has not put into the process list."""
    if typed[:1] != ["serve"]:
        return typed
    from ichat_lifecycle.secret_words import taken

    try:
        return ["serve", *taken(typed[1:])]
    except ValueError as error:
        build_parser().error(str(error))


def _end_before_start(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


class _Parser(argparse.ArgumentParser):
    """Shows what it complains about, which a script may have from anywhere, as one line."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def build_parser() -> argparse.ArgumentParser:
    """The parser of our own flags; `serve` hands everything else to vLLM's parser."""
    parser: argparse.ArgumentParser = _Parser(
        PROGRAM, description="Run an LLM server with an explicit life.", allow_abbrev=False
    )
    from ichat_lifecycle import __version__
    from ichat_lifecycle.client.fleet_parser import add_commands as add_fleet_commands
    from ichat_lifecycle.client.parser import add_commands
    from ichat_lifecycle.fleet.parser import add_commands as add_file_commands

    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    _add_serve(commands)
    demo = commands.add_parser("demo-model", help="make a tiny model to try things with")
    demo.add_argument("directory", type=Path)
    demo.set_defaults(run=_demo_model)
    docs = commands.add_parser("docs", help="write or check the generated parts of states.md")
    which = docs.add_mutually_exclusive_group(required=True)
    which.add_argument("--write", type=Path, metavar="FILE")
    which.add_argument("--check", type=Path, metavar="FILE")
    docs.set_defaults(run=_docs)
    simulate = commands.add_parser(
        "simulate", help="live a written-down life on fakes, under virtual time, and tell it"
    )
    simulate.add_argument("plan", type=Path, metavar="PLAN.json")
    simulate.set_defaults(run=_simulate)
    add_file_commands(commands)
    add_commands(commands)
    add_fleet_commands(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="run one worker in the foreground",
        description="Run one worker in the foreground. The flags below are ours; --model-path, "
        "--tokenizer-path, --context-length and --gpu-ids are iChat's names for vLLM's; and every "
        "flag of `vllm serve` is taken as it is.",
        epilog="exit codes: 0 stopped as asked, 2 arguments, 66 model missing, 69 address taken, "
        "70 engine start failed, 71 memory or another limit, 75 engine died, 124 stop forced",
        allow_abbrev=False,
    )
    control = serve.add_argument_group("control plane")
    control.add_argument("--control-host", default="127.0.0.1", help="default: %(default)s")
    control.add_argument(
        "--control-port", type=_port, help="default: main port + 10000, or any free one"
    )
    control.add_argument(
        "--control-token",
        help="allows POST on the control plane; or ICHAT_LIFECYCLE_CONTROL_TOKEN, which is not "
        "seen in the process list",
    )
    gateway = serve.add_argument_group("gateway")
    gateway.add_argument("--gateway-address", help="send heartbeats there; default: none")
    gateway.add_argument("--worker-id", help="default: host name and main port")
    gateway.add_argument(
        "--advertise-host",
        type=_advertisable,
        metavar="HOST",
        help="where the Gateway reaches this worker; default: --host, or the address of the "
        "interface that leads to the Gateway",
    )
    gateway.add_argument(
        "--advertise-port", type=_real_port, metavar="PORT", help="default: the main port"
    )
    gateway.add_argument(
        "--heartbeat-interval", type=_period, default=10.0, help="seconds; default: %(default)s"
    )
    gateway.add_argument(
        "--heartbeat-timeout",
        type=_positive,
        default=30.0,
        metavar="SECONDS",
        help="after which the Gateway takes a silent worker for dead; while another worker has "
        "the model name, this one tries to register for 1.5 times as long; default: %(default)s",
    )
    handed = serve.add_argument_group("socket")
    handed.add_argument(
        "--fd",
        type=_natural,
        metavar="NUMBER",
        help="serve on this inherited socket, which listens already, instead of --host and --port",
    )
    handed.add_argument(
        "--accept-from",
        choices=("bound", "ready"),
        default="bound",
        help="the state from which on connections of --fd are accepted; until then somebody else "
        "does; default: %(default)s",
    )
    lifecycle = serve.add_argument_group("lifecycle")
    lifecycle.add_argument(
        "--lifecycle-config", metavar="FILE", help="YAML with deadlines, intervals and budgets"
    )
    lifecycle.add_argument(
        "--set",
        action="append",
        metavar="SECTION.KEY=VALUE",
        help="one value of that file, such as health.interval=5; can be repeated",
    )
    lifecycle.add_argument(
        "--grace-period",
        type=_positive,
        default=30.0,
        metavar="SECONDS",
        help="after which whoever stops this process kills it, such as Kubernetes; a longer bound "
        "on the stop is warned about; default: %(default)s",
    )
    logs = serve.add_argument_group("logs")
    logs.add_argument(
        "--lifecycle-log-format",
        choices=("auto", "json", "console"),
        default="auto",
        help="default: console in a terminal, else JSON lines",
    )
    logs.add_argument(
        "--lifecycle-log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="default: %(default)s",
    )
    serve.set_defaults(run=_serve)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= PORT_MAX:
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and {PORT_MAX}")
    return port


def _real_port(text: str) -> int:
    port = _port(text)
    if not port:
        raise argparse.ArgumentTypeError("0 is not a port that others can reach")
    return port


def _advertisable(text: str) -> str:
    from ichat_lifecycle.adapters.advertise import advertisable

    try:
        return advertisable(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not more than 0 seconds")
    return seconds


def _period(text: str) -> float:
    from ichat_lifecycle.config import PERIOD_MIN

    seconds = _positive(text)
    if seconds < PERIOD_MIN:
        raise argparse.ArgumentTypeError(f"{text} is less than {PERIOD_MIN:g} seconds")
    return seconds


def follow_supervisor(environment: Mapping[str, str]) -> None:
    """A worker of a fleet stops once its supervisor has ended, whatever has ended that."""
    from ichat_lifecycle.adapters.parent import SUPERVISOR_VARIABLE, follow, is_supervised

    if is_supervised(environment) and not follow(int(environment[SUPERVISOR_VARIABLE])):
        sys.exit(0)


def _serve(args: argparse.Namespace, rest: list[str]) -> int:
    follow_supervisor(os.environ)
    from ichat_lifecycle import environment
    from ichat_lifecycle.adapters import termination_log
    from ichat_lifecycle.errors import LifecycleError, report
    from ichat_lifecycle.redact import Secrets
    from ichat_lifecycle.secret_words import secret_flags

    secrets = Secrets()
    try:
        secrets.collect_environment(os.environ)
        secrets.collect(args.typed)
        notes = [*environment.prepare(os.environ), *environment.visible(secret_flags(args.seen))]
        args = _with_config_file(args.typed, rest)
        settings = _check(args, rest)
    except LifecycleError as error:
        termination_log.write(error, scrub=secrets.scrub)
        return report(error, scrub=secrets.scrub)
    from ichat_lifecycle.worker import end_process, serve

    end_process(serve(args, rest, settings, serve_flags(), notes))


class _FileParser(argparse.ArgumentParser):
    """Raises what is wrong, without a usage: nobody has typed these words."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def _serve_parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(add_help=False).add_subparsers(parser_class=kind)
    _add_serve(commands)
    found: argparse.ArgumentParser = commands.choices["serve"]
    return found


def serve_flags() -> tuple[str, ...]:
    """Our own flags of `serve`: to suggest where one is mistyped, and for a `--config` file."""
    flags = _serve_parser(argparse.ArgumentParser)._option_string_actions
    return tuple(flag for flag in flags if flag.startswith("--") and flag != "--help")


def _with_config_file(typed: list[str], rest: list[str]) -> argparse.Namespace:
    """Our own flags as they were typed, and for others what vLLM's `--config` file has.

    Args:
        rest: what of the typed words is not ours.

    Raises:
        ArgumentsError, InputMissingError: the file cannot be used; a value in it is wrong.
    """
    from ichat_lifecycle.arguments import as_flag, config_path, read_config
    from ichat_lifecycle.config_scalars import check_config
    from ichat_lifecycle.errors import ArgumentsError
    from ichat_lifecycle.printable import brief

    path = config_path(rest)
    known = serve_flags()
    keys = read_config(path) if path is not None else {}
    ours = {as_flag(key): value for key, value in keys.items() if as_flag(key) in known}
    parser = _serve_parser(_FileParser)
    if path is not None:
        # Of our own flags a null is not given; vLLM would take the word None.
        check_config(path, {k: v for k, v in keys.items() if v is not None}, parser)
    try:
        words = (word for flag, value in ours.items() for word in _words(flag, value))
        found = parser.parse_args(list(words))
    except ValueError as error:
        raise ArgumentsError(f"--config {path}: {brief(str(error))}") from error
    parser.set_defaults(**vars(found))  # what was typed still wins
    return parser.parse_known_args(typed)[0]


def _words(flag: str, value: object) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [f"{flag}={one}" for one in values]


def _check(args: argparse.Namespace, rest: list[str]) -> Settings:
    """What can be known before vLLM's import, which takes seconds, is told before it."""
    from ichat_lifecycle.adapters.handed_socket import check_handed
    from ichat_lifecycle.adapters.vllm_environment import check as check_variables
    from ichat_lifecycle.config import load_settings
    from ichat_lifecycle.credentials import check_flags
    from ichat_lifecycle.preflight import (
        check_address,
        check_memory,
        check_model,
        refuse_early,
        scan,
    )

    check_variables(os.environ)
    check_flags(args.control_token, rest)
    path = Path(args.lifecycle_config) if args.lifecycle_config else None
    settings = load_settings(path, args.set or ())
    found = scan(args, rest)
    refuse_early(args, rest, os.environ)
    check_model(found)
    check_memory(found)
    if args.fd is None:
        check_address(found)
    else:
        check_handed(args.fd)
    return settings


def _demo_model(args: argparse.Namespace, _: list[str]) -> int:
    from ichat_lifecycle.demo_model import make_demo_model

    try:
        make_demo_model(args.directory)
    except (OSError, RuntimeError) as error:
        print(f"{PROGRAM}: error: {one_line(str(error))}", file=sys.stderr)
        return 66 if isinstance(error, OSError) else 70
    return 0


def _simulate(args: argparse.Namespace, _: list[str]) -> int:
    from ichat_lifecycle.errors import LifecycleError, report
    from ichat_lifecycle.testing.simulate import simulate

    try:
        return simulate(args.plan)
    except LifecycleError as error:
        return report(error)


def _docs(args: argparse.Namespace, _: list[str]) -> int:
    from ichat_lifecycle.docs import check, write

    if args.write:
        write(args.write)
        return 0
    if drift := check(args.check):
        print(f"{PROGRAM}: {args.check}: {drift}; run: make docs", file=sys.stderr)
        return 1
    return 0
