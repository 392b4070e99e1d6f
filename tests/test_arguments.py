"""iChat's arguments become vLLM's: each test runs on a small stand-in and on vLLM's own parser."""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ichat_lifecycle.arguments import ParsedArguments, parse
from ichat_lifecycle.errors import ArgumentsError, ExitCode, InputMissingError
from ichat_lifecycle.gpus import GpuId


def length(text: str) -> int:
    return int(text[:-1]) * 1000 if text.endswith("k") else int(text)


def optional_text(text: str) -> str | None:
    return text or None


class StandInParser(argparse.ArgumentParser):
    """The shapes of vLLM's parser: underscores in flags, and `--config FILE` put in front."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> Namespace:
        argv = list(args or ())
        if "--config" in argv:
            at = argv.index("--config")
            found = yaml.safe_load(Path(argv[at + 1]).read_text(encoding="utf-8"))
            config = [token for key, value in found.items() for token in (f"--{key}", str(value))]
            argv = config + argv[:at] + argv[at + 2 :]
        return super().parse_args([dashes(token) for token in argv], namespace)


def dashes(token: str) -> str:
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value if token.startswith("--") else token


def stand_in_parser() -> argparse.ArgumentParser:
    parser = StandInParser(prog="stand-in")
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--api-server-count", "-asc", type=int)
    parser.add_argument("--config")
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--data-parallel-supervisor-port", type=int, default=9256)
    parser.add_argument("--dp-supervisor-probe-interval-s", type=float, default=5.0)
    parser.add_argument("--host", type=optional_text)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--model", type=str, default="Qwen/Qwen3-0.6B")
    parser.add_argument("--tokenizer", type=str)
    parser.add_argument("--dtype", choices=["auto", "bfloat16"], default="auto")
    parser.add_argument("--max-model-len", type=length)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--hf-overrides", type=json.loads, default={})
    parser.add_argument("--served-model-name", nargs="+", type=optional_text)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--nnodes", "-n", type=int, default=1)
    return parser


@functools.cache
def vllm_parser() -> argparse.ArgumentParser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not ours, and pytest makes errors of them
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        try:
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
        except ImportError:
            from vllm.entrypoints.openai.cli_args import make_arg_parser
        made = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    assert isinstance(made, argparse.ArgumentParser)
    return made


@pytest.fixture(params=["stand-in", pytest.param("vllm", marks=pytest.mark.engine)])
def parser(request: pytest.FixtureRequest) -> argparse.ArgumentParser:
    # vLLM's is made once and used by every test: parse() has to leave it usable.
    return stand_in_parser() if request.param == "stand-in" else vllm_parser()


def parsed(parser: argparse.ArgumentParser, argv: str, **framework: Any) -> ParsedArguments:
    return parse(Namespace(**framework), argv.split(), parser)


def refusal(parser: argparse.ArgumentParser, argv: str, **framework: Any) -> ArgumentsError:
    with pytest.raises(ArgumentsError) as caught:
        parsed(parser, argv, **framework)
    assert caught.value.exit_code is ExitCode.BAD_ARGUMENTS
    assert "\n" not in caught.value.line()
    return caught.value


@pytest.mark.parametrize(
    ("argv", "attribute", "value"),
    [
        ("--model-path m", "model", "m"),
        ("--model-path=m", "model", "m"),
        ("--model_path m", "model", "m"),
        ("m", "model", "m"),
        ("--model m", "model", "m"),
        ("m", "model_tag", "m"),
        ("--model-path m", "model_tag", None),
        ("m --tokenizer-path t", "tokenizer", "t"),
        ("m --context-length 4k", "max_model_len", 4000),
        ("m --context_length=4096", "max_model_len", 4096),
        ("m", "max_model_len", None),
        ("m", "port", 8000),
        ("m --port 0", "port", 0),
        ("m", "host", None),
        ("m --served-model-name a b", "served_model_name", ["a", "b"]),
        ("m -tp 2", "tensor_parallel_size", 2),
        ("m -n2", "nnodes", 2),
        ("m --enforce-eager", "enforce_eager", True),
        ("m --host=-x", "host", "-x"),
    ],
)
def test_argv_becomes_vllms_namespace(
    parser: argparse.ArgumentParser, argv: str, attribute: str, value: Any
) -> None:
    """Aliases land in the attribute they stand for; all else is vLLM's, its defaults too."""
    assert getattr(parsed(parser, argv).vllm, attribute) == value


@pytest.mark.parametrize(
    ("framework", "attribute", "value"),
    [
        ({"host": "127.0.0.1"}, "host", "127.0.0.1"),
        ({"host": None}, "host", None),
        ({"port": 9000}, "port", 9000),
        ({"port": "9000"}, "port", 9000),
        # A string would be taken apart into letters by vLLM, which expects a list.
        ({"served_model_name": "abc"}, "served_model_name", ["abc"]),
        ({"served_model_name": ["a", "b"]}, "served_model_name", ["a", "b"]),
        ({"served_model_name": []}, "served_model_name", None),
        ({"model_path": Path("/m")}, "model", "/m"),
    ],
)
def test_the_framework_fills_in(
    parser: argparse.ArgumentParser, framework: dict[str, Any], attribute: str, value: Any
) -> None:
    """What the framework gives arrives, converted as the parser converts it."""
    argv = "" if "model_path" in framework else "m"
    assert getattr(parsed(parser, argv, **framework).vllm, attribute) == value


@pytest.mark.parametrize(
    ("argv", "framework"),
    [
        ("--model m --model-path m", {}),
        ("m --model m", {}),
        ("m", {"model_path": "m"}),
        ("--model /a/b/ --model-path /a/./b", {}),
        ("m --tokenizer /t --tokenizer-path /t/", {}),
        ("m --context-length 4000 --max-model-len 4k", {}),
        ("m --host 0.0.0.0", {"host": "0.0.0.0"}),
        ("m --port 8001", {"port": 8001}),
        ("m --port 8000", {"port": "8000"}),
        ("m --served-model-name q", {"served_model_name": "q"}),
        ("m --served-model-name a b", {"served_model_name": ["a", "b"]}),
        ("m --gpu-ids [0,1]", {"gpu_ids": [0, 1]}),
        ("m --gpu-ids=[0,1]", {"gpu_ids": "[0, 1]"}),
    ],
)
def test_equal_values_are_no_conflict(
    parser: argparse.ArgumentParser, argv: str, framework: dict[str, Any]
) -> None:
    """An iChat worker repeats what the framework says; equal means equal to vLLM's own types."""
    assert parsed(parser, argv, **framework).vllm.model


def test_vllms_flag_wins_over_an_equal_alias(parser: argparse.ArgumentParser) -> None:
    """Of two spellings of one path that of vLLM's own flag is kept, for the positional too."""
    found = parsed(parser, "/a/b/ --model /a/b --model-path /a/./b", model_path="/a//b").vllm
    assert (found.model, found.model_tag) == ("/a/b", "/a/b")


@pytest.mark.parametrize(
    ("argv", "framework", "named"),
    [
        ("--model a --model-path b", {}, ["--model a ", "--model-path b "]),
        ("a --model b", {}, ["--model b ", "positional model a "]),
        ("a --model-path b", {}, ["positional model a ", "--model-path b "]),
        ("--model a", {"model_path": "b"}, ["--model a ", "the framework's --model-path b "]),
        ("m --tokenizer a --tokenizer-path b", {}, ["--tokenizer a ", "--tokenizer-path b "]),
        (
            "m --max-model-len 4096 --context-length 4k",
            {},
            ["--max-model-len 4096 ", "--context-length 4000 "],
        ),
        ("m --host ::1", {"host": "0.0.0.0"}, ["--host ::1 ", "framework's --host 0.0.0.0 "]),
        ("m --port 1", {"port": 2}, ["--port 1 ", "the framework's --port 2 "]),
        # vLLM's default given on purpose is given.
        ("m --port 8000", {"port": 2}, ["--port 8000 ", "the framework's --port 2 "]),
        (
            "m --served-model-name a b",
            {"served_model_name": "a"},
            ["--served-model-name a b ", "the framework's --served-model-name a "],
        ),
        ("m --gpu-ids [0]", {"gpu_ids": [1]}, ["--gpu-ids [0] ", "framework's --gpu-ids [1] "]),
        ("m --gpu-ids [1,0]", {"gpu_ids": [0, 1]}, ["[1, 0]", "[0, 1]"]),
    ],
)
def test_conflicts_name_both_flags_and_values(
    parser: argparse.ArgumentParser, argv: str, framework: dict[str, Any], named: list[str]
) -> None:
    """Two sources that disagree end with exit code 2, and the way out."""
    error = refusal(parser, argv, **framework)
    assert error.code == "arguments_conflict"
    assert error.hint
    for part in named:
        assert part in error.message + " "


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "m --max-modle-len 4096",
            "unknown flag --max-modle-len (did you mean --max-model-len?)",
        ),
        ("m --max_modle_len=4096", "unknown flag --max-modle-len (did you mean --max-model-len?)"),
        ("--model m --gpu-id [0]", "unknown flag --gpu-id (did you mean --gpu-ids?)"),
        ("m --contxt-length 1", "unknown flag --contxt-length (did you mean --context-length?)"),
        ("m --qqqqqqqqqqqq", "unknown flag --qqqqqqqqqqqq"),
        (
            "m --dtpye auto --qqqqqqqqqqqq 1 --no-enforce-eger",
            "unknown flag --dtpye (did you mean --dtype?); unknown flag --qqqqqqqqqqqq; "
            "unknown flag --no-enforce-eger (did you mean --no-enforce-eager?)",
        ),
        # Prefixes of one flag only, which argparse would take for that flag.
        ("m --served-model x", "unknown flag --served-model (did you mean --served-model-name?)"),
        ("m --model-pat x", "unknown flag --model-pat (did you mean --model-path?)"),
        ("m -t 2", "unknown flag -t (did you mean -tp?)"),
        ("-model m", "unknown flag -model (did you mean --model?)"),
        ("m --task embed", "unknown flag --task"),
    ],
)
def test_unknown_flags_are_all_named_with_the_nearest(
    parser: argparse.ArgumentParser, argv: str, message: str
) -> None:
    """No flag is guessed, none is passed over, and the nearest known one is suggested."""
    error = refusal(parser, argv)
    assert (error.message, error.code) == (message, "unknown_flag")


@pytest.mark.parametrize(
    ("argv", "framework", "parts"),
    [
        ("m --port eighty", {}, ["--port", "eighty"]),
        ("m --port", {}, ["--port", "expected one argument"]),
        ("m --port 65536", {}, ["--port 65536", "65535"]),
        ("m", {"port": -1}, ["framework's --port -1"]),
        ("m", {"port": "eighty"}, ["framework's --port", "eighty"]),
        ("m --dtype int3", {}, ["--dtype", "int3", "bfloat16"]),
        ("m --context-length long", {}, ["--context-length", "long"]),
        ("--dtype auto m extra", {}, ["unexpected argument 'extra'"]),
        ("m --hf-overrides.a", {}, ["--hf-overrides.a: expected a value"]),
        ("", {}, ["no model given: --model-path or --model"]),
        ("--port 8000", {"model_path": ""}, ["no model given"]),
    ],
)
def test_wrong_values_are_named_without_a_usage_dump(
    parser: argparse.ArgumentParser,
    capsys: pytest.CaptureFixture[str],
    argv: str,
    framework: dict[str, Any],
    parts: list[str],
) -> None:
    """The parser neither exits nor prints; the error has the flag and the value."""
    line = refusal(parser, argv, **framework).line()
    assert [part for part in parts if part not in line] == []
    assert "usage:" not in capsys.readouterr().err


UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    ("argv", "framework", "ids"),
    [
        ("m", {}, None),
        ("m", {"gpu_ids": None}, None),
        ("m --gpu-ids [0]", {}, (0,)),
        ("m --gpu-ids=[2,0]", {}, (2, 0)),
        ("m --gpu_ids=[0]", {}, (0,)),
        ("m --gpu_ids [7]", {}, (7,)),
        ("m --gpu-ids []", {}, ()),
        ("m", {"gpu_ids": [3]}, (3,)),
        ("m", {"gpu_ids": "[3, 4]"}, (3, 4)),
        ("m --gpu-ids 0,1", {}, (0, 1)),
        ("m --gpu-ids 0, 1", {}, (0, 1)),
        ("m --gpu-ids [0, 1]", {}, (0, 1)),
        ("m --gpu-ids 7", {}, (7,)),
        ("m --gpu-ids GPU-8932f937,GPU-0a", {}, ("GPU-8932f937", "GPU-0a")),
        ('m --gpu-ids ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",1]', {}, (UUID, 1)),
        ("m --gpu-ids MIG-GPU-8932f937/5/0", {}, ("MIG-GPU-8932f937/5/0",)),
        ("m", {"gpu_ids": ["MIG-a", "2"]}, ("MIG-a", 2)),
        ("m", {"gpu_ids": 3}, (3,)),
    ],
)
def test_gpu_ids(
    parser: argparse.ArgumentParser,
    argv: str,
    framework: dict[str, Any],
    ids: tuple[GpuId, ...] | None,
) -> None:
    """Both spellings, from argv and from the framework; none given is not the same as no GPU."""
    assert parsed(parser, argv, **framework).gpu_ids == ids


@pytest.mark.parametrize(
    "text",
    [
        *("[0,", "[-1]", "[0,0]", "[true]", "[0.5]", "{}", "gpu", "0,,x", "0-3", "GPU-", "0;1"),
        *("GPU-a,gpu-A", "GPU-a,GPU-A", "CUDA0", '["0","0"]', "1e0", "\u0663"),
    ],
)
@pytest.mark.parametrize("by_framework", [False, True])
def test_bad_gpu_ids(parser: argparse.ArgumentParser, text: str, by_framework: bool) -> None:
    """Anything but different numbers and UUIDs is refused with an example."""
    framework = {"gpu_ids": text} if by_framework else {}
    error = refusal(parser, "m" if by_framework else f"m --gpu-ids {text}", **framework)
    assert "--gpu-ids" in error.message
    assert "such as [0,1]" in error.message


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("m --headless", "--headless"),
        ("m --api-server-count 2", "--api-server-count 2"),
        ("m -asc 0", "--api-server-count 0"),
        ("m --grpc", "--grpc"),
        ("m --data-parallel-supervisor-port 9300", "--data-parallel-supervisor-port 9300"),
        ("m --dp-supervisor-probe-interval-s 1.5", "--dp-supervisor-probe-interval-s 1.5"),
    ],
)
def test_what_one_process_cannot_do_is_refused(
    parser: argparse.ArgumentParser, argv: str, flag: str
) -> None:
    """Never accepted and ignored."""
    error = refusal(parser, argv)
    assert (error.message.startswith(flag), error.code) == (True, "not_supported")


def test_one_api_server_is_what_this_process_is(parser: argparse.ArgumentParser) -> None:
    """The count that asks for nothing special passes."""
    assert parsed(parser, "m --api-server-count 1").vllm.api_server_count == 1


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("joined", [False, True])
def test_the_config_file_counts(
    parser: argparse.ArgumentParser, tmp_path: Path, joined: bool
) -> None:
    """Also as --config=FILE, from which vLLM's parser alone reads nothing; argv comes first."""
    path = config_file(tmp_path, "port: 9000\ncontext_length: 4k\nmodel: m\n")
    found = parsed(parser, f"--config{'=' if joined else ' '}{path} --port 9001").vllm
    assert (found.model, found.port, found.max_model_len) == ("m", 9001, 4000)


@pytest.mark.parametrize(
    ("config", "argv", "model", "length"),
    [
        ("model: a", "b", "b", None),
        ("model: a", "--model b", "b", None),
        ("model: a", "--model-path b", "b", None),
        ("model-path: a", "--model b", "b", None),
        ("model_path: a", "b", "b", None),
        ("model: a\nmax-model-len: 1", "--context-length 2", "a", 2),
        ("model: a\ncontext-length: 1", "--max-model-len 2", "a", 2),
        ("model: a", "b --model-path b", "b", None),
    ],
)
def test_the_command_line_wins_over_the_config_file_under_any_name(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    config: str,
    argv: str,
    model: str,
    length: int | None,
) -> None:
    """As for vLLM, which has no second names but the positional model."""
    path = config_file(tmp_path, config)
    for words in (f"{argv} --config {path}", f"{argv} --config={path}"):
        found = parsed(parser, words).vllm
        assert (found.model, found.max_model_len) == (model, length)
        assert found.model_tag in (None, model)


@pytest.mark.parametrize(
    ("config", "argv"),
    [
        ("model: a\nmodel-path: b", ""),
        ("model: a", "b --model c"),
        ("model: a", "b --model-path c"),
    ],
)
def test_what_is_in_conflict_within_one_source_stays_so(
    parser: argparse.ArgumentParser, tmp_path: Path, config: str, argv: str
) -> None:
    path = config_file(tmp_path, config)
    assert refusal(parser, f"{argv} --config {path}").code == "arguments_conflict"


def test_flags_of_the_embedding_program_in_the_config_file(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    """The program has taken them; without such a program they are unknown, as in argv."""
    text = "model: m\ncontrol_port: 9000\nset: [a.b=1, c.d=2]\nport: 1\n"
    path = config_file(tmp_path, text)
    known = ("--control-port", "--set")
    for argv in (["--config", str(path)], ["--dtype", "auto", "--config", str(path)]):
        found = parse(Namespace(), argv, parser, known).vllm
        assert (found.model, found.port) == ("m", 1)
    assert "--control-port" in refusal(parser, f"--config {path}").message
    with pytest.raises(ArgumentsError, match="unknown flag --control-port"):
        parse(Namespace(), ["m", "--control-port", "1"], parser, known)


def test_values_of_the_config_file_are_explicit(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    """They can be in conflict with the framework's, as a flag can."""
    path = config_file(tmp_path, "port: 8000\n")
    assert "--port 8000" in refusal(parser, f"--model m --config {path}", port=8001).message
    assert parsed(parser, f"--model m --config {path}", port=8000).vllm.port == 8000


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "expected lines"), ("- 1\n", "expected lines"), ("a: [", "not YAML")],
)
def test_a_bad_config_file(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str, part: str
) -> None:
    """It is named, with what is wrong with it."""
    path = config_file(tmp_path, text)
    error = refusal(parser, f"m --config {path}")
    assert str(path) in error.message
    assert part in error.message


@pytest.mark.parametrize(
    "argv",
    ["m --config", "m --config --port 1", "m --config a.yaml --config b.yaml", "m --config x"],
)
def test_config_without_one_yaml_file(parser: argparse.ArgumentParser, argv: str) -> None:
    """One file, whose name vLLM accepts."""
    assert "--config" in refusal(parser, argv).message


def test_a_missing_config_file_is_a_missing_input(parser: argparse.ArgumentParser) -> None:
    """Exit code 66, as for a model."""
    with pytest.raises(InputMissingError, match=r"--config /nowhere\.yaml: No such file"):
        parsed(parser, "m --config /nowhere.yaml")


def test_nothing_of_ours_is_left(parser: argparse.ArgumentParser) -> None:
    """vLLM gets just what its own parser makes of the same arguments; the parser is whole."""
    argv = "--model m --port 1 --served-model-name a --enforce-eager --middleware x"
    ours = parsed(parser, f"{argv} --gpu-ids [0] --model-path m", host=None).vllm
    # Not ==: some of vLLM's defaults do not compare.
    assert repr(sorted(vars(ours).items())) == repr(
        sorted(vars(parser.parse_args(argv.split())).items())
    )
    assert {"error", "parse_known_args"}.isdisjoint(vars(parser))
    assert parser.allow_abbrev


def test_changed_shows_what_is_not_a_default(parser: argparse.ArgumentParser) -> None:
    """Given by whomever, JSON-safe, and no default among it."""
    argv = ["--hf-overrides", '{"a": [1, null]}', "--middleware", "x", "-tp", "1", "--port", "8000"]
    found = parse(Namespace(model_path="m", host="::1", gpu_ids=[0]), argv, parser)
    assert found.changed == {
        "model": "m",
        "host": "::1",
        "hf_overrides": {"a": [1, None]},
        "middleware": ["x"],
    }
    assert json.loads(json.dumps(found.changed, allow_nan=False)) == found.changed


def test_odd_values_are_shown_by_their_repr() -> None:
    """What JSON has no word for does not break whoever shows it."""
    parser = stand_in_parser()
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--part", type=float, default=0.5)
    parser.add_argument("--names", type=lambda text: frozenset([text]))
    parser.add_argument("--kind", type=lambda _: Limits)
    found = parsed(parser, "m --fraction inf --part 0.25 --names a --kind any")
    assert found.changed == {
        "model": "m",
        "fraction": "inf",
        "part": 0.25,
        "names": "frozenset({'a'})",
        "kind": repr(Limits),
    }


@dataclass
class Limits:
    """As vLLM's config objects, which are values of single flags."""

    low: int = 1
    high: int = 2


@pytest.mark.parametrize(
    ("default", "expected"), [(Limits(), {"high": 3}), (None, {"low": 1, "high": 3})]
)
def test_of_a_config_object_only_what_differs_is_shown(
    default: Limits | None, expected: dict[str, int]
) -> None:
    """As a dict, in which secrets can be found by their keys."""
    parser = stand_in_parser()
    parser.add_argument("--limits", type=lambda text: Limits(high=int(text)), default=default)
    assert parsed(parser, "m --limits 3").changed == {"model": "m", "limits": expected}


def test_a_parser_that_differs() -> None:
    """Where vLLM has no such flag there is no alias for it; a flag of its own is left to it."""
    parser = StandInParser(prog="other")
    parser.add_argument("--model")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--context-length", type=int)
    found = parsed(parser, "--model-path m --context-length 5").vllm
    assert vars(found) == {"model": "m", "max_model_len": None, "context_length": 5}
    assert refusal(parser, "--model m --tokenizer-path t").code == "unknown_flag"


def test_a_default_that_is_text_is_compared_as_its_type() -> None:
    """argparse converts it, too: it does not show as changed."""
    parser = stand_in_parser()
    parser.add_argument("--limit", type=length, default="4k")
    parser.add_argument("--level", type=length, default=argparse.SUPPRESS)  # it leaves nothing
    assert parsed(parser, "m").changed == {"model": "m"}
    assert parsed(parser, "m --level 5").changed == {"model": "m", "level": 5}


def test_help_is_printed_and_exits_clean(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one exit that is left to the parser; iChat's flags are part of it."""
    with pytest.raises(SystemExit) as caught:
        parsed(parser, "--help")
    assert caught.value.code == 0
    assert "iChat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "words"), [(KeyError("no key"), "no key"), (RuntimeError(), "RuntimeError")]
)
def test_the_error_of_a_foreign_conversion_is_a_line(
    parser: argparse.ArgumentParser, error: Exception, words: str
) -> None:
    """A conversion that raises anything at all ends as an error about the arguments."""

    def explode(text: str) -> str:
        raise error

    action = next(a for a in parser._actions if a.dest == "dtype")
    kind, choices, action.type, action.choices = action.type, action.choices, explode, None
    try:
        assert words in refusal(parser, "m --dtype auto").message
    finally:
        action.type, action.choices = kind, choices


@pytest.mark.engine
@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ("m --compilation-config.mode 3", {"compilation_config": {"mode": 3}}),
        ("m -O3", {"optimization_level": "3"}),
        ("m --hf-overrides.a.b=1", {"hf_overrides": {"a": {"b": 1}}}),
        ("m --hf-overrides.a.b 1", {"hf_overrides": {"a": {"b": 1}}}),
        ("m --lora-modules a=b", {"lora_modules": [{"name": "a", "path": "b"}]}),
    ],
)
def test_vllms_own_forms_pass(argv: str, changed: dict[str, Any]) -> None:
    """Dotted JSON, -O, and config objects shown by what differs."""
    found = parsed(vllm_parser(), argv).changed
    text = json.dumps(found, allow_nan=False)
    for key, value in changed.items():
        if key == "compilation_config":
            assert list(found[key]) == ["mode"], text
        elif key == "lora_modules":
            assert found[key][0].items() >= value[0].items(), text
        else:
            assert found[key] == value, text


@pytest.mark.engine
@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("m --compilation-config.mode", "--compilation-config.mode: expected a value"),
        ("m --compilation-confg.mode 3", "(did you mean --compilation-config?)"),
        ("m --lora-modules {", "--lora-modules"),
        ("m --kv-transfer-config {}x", "--kv-transfer-config"),
        ("m --kv-transfer-config.nonsense 1", "--kv-transfer-config"),
        ("m --data-parallel-multi-port-external-lb", "--data-parallel-multi-port-external-lb"),
    ],
)
def test_vllms_own_forms_fail_clearly(argv: str, part: str) -> None:
    """The parser's inner errors name the flag, on one line."""
    line = refusal(vllm_parser(), argv).line()
    assert part in line
    assert "https://" not in line
