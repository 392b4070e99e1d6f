"""Drawn configs.yaml files: good ones, good ones with something wrong, and texts of another world.

Each has to come to a fleet or to problems with places, and to nothing else: see `broken`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ichat_lifecycle.errors import InputMissingError
from ichat_lifecycle.fleet.engine_words import Answer, NoEngineError, Question
from ichat_lifecycle.fleet.plans import BadFileError, read_plans

# What each file has to come to, at most.
TOOK_MAX_S = 30.0  # of processor time
TOLD_MAX = 250_000  # characters

SECRET = "a-variables-value"
ENVIRONMENT = {"SECRET": SECRET, "PORT": "8001", "EMPTY": "", "LONG": "x" * 1000, "ODD": "\udcff"}


def _tenfold(first: str, row: Callable[[str], str], times: int = 12) -> str:
    """Each row has the one before ten times."""
    rows = [f"a0: &a0 {first}"]
    rows += [f"a{n}: &a{n} {row(f'*a{n - 1}')}" for n in range(1, times)]
    return "\n".join(rows) + "\n"


_LONG = "k" * 900

# A few bytes that stand for very much, one for each way that was found.
BOMBS: Mapping[str, str] = {
    "lists": _tenfold("[x]", lambda a: f"[{', '.join([a] * 10)}]"),
    "mappings": _tenfold("{k: v}", lambda a: f"{{{', '.join(f'k{n}: {a}' for n in range(10))}}}"),
    "merges": _tenfold("{k: v}", lambda a: f"{{<<: [{', '.join([a] * 10)}]}}"),
    "merges of nothing": _tenfold("{}", lambda a: f"{{<<: [{', '.join([a] * 10)}]}}", 20),
    "merges of problems": _tenfold("{[x]: y}", lambda a: f"{{<<: [{', '.join([a] * 10)}]}}", 20),
    "text": f"a: &a {'x' * 90_000}\nb: [{', '.join(['*a'] * 15_000)}]\n",
    "keys": f"a: &a {{{', '.join(f'{n}{_LONG}: 1' for n in range(99))}}}\n"
    f"b: [{', '.join(['*a'] * 5000)}]\n",
    "itself": "a: &a {b: *a, c: [*a, *a]}\n",
    "deep": "[" * 50_000,
    "deep blocks": "- " * 100_000 + "x\n",
    "deep aliases": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)),
    "deep merges": "a0: &a0 {}\n"
    + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}\n" for n in range(1, 3000)),
    "wide": f"[{'x, ' * 60_000}]",
    "empty lists": f"[{'[], ' * 60_000}]",
    "base 60": f"a: {'1:' * 400_000}1\n",
    "documents": "---\n" * 20_000,
    "directives": "%X\n" * 60_000,
    "lines": f'a: "{chr(92)}{chr(10)}' * 60_000,
}

# Scalars that somebody, somewhere, takes for something else.
SCALARS = (
    *("0", "-1", "8001", "65536", "012", "0o17", "0x1F", "0b101", "1_000", "8:01", "1:30.5", "+5"),
    *("1.0", "1e3", "1e999", "-1e999", ".inf", "-.inf", ".nan", "1e-300", "9" * 50, "9" * 5000),
    *("yes", "no", "on", "off", "true", "~", "null", "''", '""', "=", "<<", "2024-01-01"),
    *("2024-13-45", "2001-12-14t21:59:43.10-05:00", "!!binary aGk=", "!!int ''", "!!int '-'"),
    *("!!float '1:a'", "!!bool maybe", "!!null x", "!!timestamp 9", "!!set {a}", "!!omap [a: 1]"),
    *("!!python/object/apply:os.system [ls]", "!foo bar", "!!str 5", "!!map x", "!!seq {a: 1}"),
    *('"\\0"', '"\\uD800"', '"\\UFFFFFFFF"', '"\\xZZ"', '"\\e[2J"', "'\x85'", "\ufeff", "\u202e"),
    *("${SECRET}", "'${SECRET}'", '"/${SECRET}/x"', "${PORT}", "${NONE}", "${NONE:-5}", "$$", "$"),
    *("'${EMPTY}'", "'${LONG}'", "'${ODD}'", "${", "'${SECRET:-}'", '"${${SECRET}}"'),
    *(
        "*a",
        "&a x",
        "&a [*a]",
        "*none",
        "[1, [2, [3]]]",
        "{a: {b: [c]}}",
        "[]",
        "{}",
        "[true, '1']",
    ),
    *("x" * 300, "k" * 5000, "x" * 140_000, "../../../etc/passwd", "/dev/zero", "/proc/self/mem"),
    *("http://[", "http://u:p@h:99999", "unix:/x", "localhost", "::1", "0.0.0.0", "[::]", "a b"),
    *("./m", "/", ".", "m/config.json", "GPU-1", "[GPU-1, GPU-1]", "[0, 0]", "[-1]", "'[[[['"),
    *("|\n    text\n", ">\n    text\n", "'", '"', "[", "{", "]", "@", "`", "%", "\t", "? a", "- b"),
)
KEYS = (
    *(
        "model_name",
        "model_path",
        "port",
        "host",
        "name",
        "backend",
        "gpu_ids",
        "share_gpus",
        "uds",
    ),
    *("control_port", "control_host", "tokenizer_path", "context_length", "gateway_address"),
    *("worker_id", "advertise_host", "advertise_port", "heartbeat_interval", "lifecycle", "env"),
    *("replace", "config", "shutdown_timeout", "chat_template", "ssl_certfile", "ssl_keyfile"),
    *("ssl_ca_certs", "tensor_parallel_size", "nnodes", "gpu_memory_utilization", "api_key", "x"),
    *("stop", "drain", "warm_up", "extra", "health", "interval", "fleet", "token", "restart"),
    *("log_level", "heartbeat_timeout", "max_parallel_starts", "watchdog", "defaults", "<<"),
    *("managed_workers", "server_settings", "yes", "012", "'a b'", '"\\e"', '"\\0"', "? [a]", "''"),
    *("${SECRET}", "k" * 2000, "ODD-key", "VLLM_PORT", "NOTIFY_SOCKET", "A=B"),
)
GOOD = """\
server_settings: {host: 0.0.0.0, port: 4000, log_level: info, heartbeat_timeout: 30}
fleet: {port: 14000, max_parallel_starts: 2, watchdog: 60, restart: {max: 5, window: 600}}
lifecycle: {stop: {drain: 12}, health: {interval: 5}}
defaults: &d
  model_path: ./m
  env: {A: "1"}
managed_workers:
  - model_name: one
    port: 8001
    gpu_ids: [0]
    tensor_parallel_size: 1
    lifecycle:
      warm_up: {extra: [{path: /v1/x, body: {a: [1, 2.5, "b"]}}]}
  - model_name: two
    port: ${PORT2:-8002}
    gpu_ids: [1]
    shutdown_timeout: 5
    advertise_host: w.example
    gateway_address: 127.0.0.1:4000
"""

# Gives a number from 0 to what it is asked for, without that: a generator's, or hypothesis's.
Choose = Callable[[int], int]


def draw(choose: Choose) -> str:
    """One text."""
    kind = choose(8)
    if kind == 0:
        return _pick(choose, tuple(BOMBS.values())) if not choose(8) else _soup(choose)
    if kind <= 2:  # noqa: PLR2004  # two in eight
        return _grown(choose)
    return _mutated(choose)


def _pick(choose: Choose, options: Sequence[str]) -> str:
    return options[choose(len(options))]


def _soup(choose: Choose) -> str:
    """Pieces without any order."""
    return "".join(
        _pick(choose, SCALARS if choose(2) else KEYS)
        + _pick(choose, (": ", "\n", " ", ", ", "\n- "))
        for _ in range(choose(12))
    )


def _grown(choose: Choose) -> str:
    """The shape of a fleet, with anything in its places."""
    rows = []
    for _ in range(1 + choose(3)):
        keys = [f"    {_pick(choose, KEYS)}: {_flow(choose, 3)}\n" for _ in range(choose(7))]
        rows += ["  - model_name: ", _pick(choose, SCALARS), "\n", *keys]
    sections = "".join(f"{_pick(choose, KEYS)}: {_flow(choose, 3)}\n" for _ in range(choose(4)))
    return f"{sections}managed_workers:\n{''.join(rows)}"


def _flow(choose: Choose, levels: int) -> str:
    kind = choose(4) if levels else 0
    if kind <= 1:
        return _pick(choose, SCALARS)
    inner = [_flow(choose, levels - 1) for _ in range(choose(4))]
    if kind == 2:  # noqa: PLR2004
        return f"[{', '.join(inner)}]"
    return f"{{{', '.join(f'{_pick(choose, KEYS)}: {one}' for one in inner)}}}"


def _mutated(choose: Choose) -> str:
    """The good one, with some of it changed."""
    text = GOOD
    for _ in range(1 + choose(3)):
        lines = text.split("\n")
        at = choose(len(lines))
        key, colon, value = lines[at].partition(": ")
        match choose(7):
            case 0 | 1:
                lines[at] = f"{key}{colon or ': '}{_flow(choose, 2)}"
            case 2:
                lines.insert(at, " " * choose(6) + f"{_pick(choose, KEYS)}: {_flow(choose, 2)}")
            case 3:
                lines.insert(at, lines[choose(len(lines))])
            case 4:
                del lines[at]
            case 5:
                lines[at] = f"{key.replace(key.strip(' -'), _pick(choose, KEYS))}{colon}{value}"
            case _:
                place = choose(len(lines[at]) + 1)
                lines[at] = lines[at][:place] + _pick(choose, SCALARS) + lines[at][place:]
        text = "\n".join(lines)
    return text


def _ask(questions: Sequence[Question]) -> list[Answer]:
    """In place of vLLM's parser: takes each key, or is not there."""
    if any("x" in question.keys for question in questions):
        raise NoEngineError("no vLLM is asked here")
    return [
        Answer(tuple(f"--{key}={value}" for key, value in question.keys.items()), ())
        for question in questions
    ]


def broken(text: str, directory: Path) -> str | None:
    """Say what a text comes to that none should; None where it comes to a fleet or to problems.

    Args:
        directory: where its file is written; a model is made in it.
    """
    (directory / "m").mkdir(exist_ok=True)
    (directory / "m/config.json").write_text("{}")
    path = directory / "configs.yaml"
    path.write_bytes(text.replace("./m", str(directory / "m")).encode("utf-8", "surrogatepass"))
    began = time.process_time()
    try:
        lines = [doubt.told(path) for doubt in read_plans(path, ENVIRONMENT, _ask).doubts]
    except BadFileError as error:
        lines = list(error.told)
        if not lines:
            return "a wrong file without a problem"
    except (InputMissingError, NoEngineError):
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return _wrong_with(lines, path, time.process_time() - began)


def _wrong_with(lines: Sequence[str], path: Path, took_s: float) -> str | None:
    """What is wrong with what a person is told."""
    if took_s > TOOK_MAX_S:
        return f"it took {took_s:.0f} s"
    if sum(map(len, lines)) > TOLD_MAX:
        return f"{sum(map(len, lines))} characters are told"
    for line in lines:
        if not line.isprintable():
            return f"not plain: {line!r}"
        if SECRET in line:
            return f"a variable's value is told: {line}"
        where = line.removeprefix(f"{path}:")
        if where == line or not (where.split(":")[0].isdecimal() or where.startswith(" and ")):
            return f"without a place: {line}"
    return None


def fuzz_files(seconds: float, seed: int, files_max: int | None = None) -> str | None:
    """Draw files until one is broken; return it with what is wrong, or None where none is.

    Args:
        seconds: for how long.
        files_max: how many, at most; None: as many as the time allows.
    """
    generator = random.Random(seed)
    until, count = time.monotonic() + seconds, 0
    with TemporaryDirectory(prefix="ichat-fuzz-") as name:
        while time.monotonic() < until and count != files_max:
            count += 1
            text = draw(lambda below: generator.randrange(below) if below else 0)
            if wrong := broken(text, Path(name)):
                return f"seed {seed}, file {count}: {wrong}\n{text[:5000]}"
    return None
