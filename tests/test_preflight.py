"""What is known before vLLM is imported: a glance at the arguments, the address, the model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ichat_lifecycle.arguments import parse
from ichat_lifecycle.errors import AddressError, ArgumentsError, ExitCode, InputMissingError
from ichat_lifecycle.preflight import Scan, check_address, check_model, refuse_early, scan

CERTIFICATE = Path(__file__).with_name("certificate.pem")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", Scan()),
        ("m", Scan(model="m")),
        ("--model m", Scan(model="m")),
        ("--model=m", Scan(model="m")),
        ("--model-path m", Scan(model="m", model_flag="--model-path")),
        ("--model_path=m", Scan(model="m", model_flag="--model-path")),
        ("--tokenizer t", Scan(tokenizer="t")),
        ("--tokenizer_path t", Scan(tokenizer="t", tokenizer_flag="--tokenizer-path")),
        ("--host ::1 --port 1", Scan(host="::1", port=1)),
        ("--port=0", Scan(port=0)),
        ("--uds /s", Scan(uds="/s")),
        ("--served_model_name a b", Scan(served_model_name="a")),
        ("--hf-config-path /c", Scan(hf_config_path="/c")),
        # The last one wins, as in argparse.
        ("--port 1 --port 2", Scan(port=2)),
        ("a --model b", Scan(model="b")),
        # The value of another flag is no model, nor is a token that comes late.
        ("--dtype auto m", Scan()),
        ("--enforce-eager m", Scan()),
        # Odd, and not for us to judge.
        ("--port", Scan()),
        ("--host --port 1", Scan(port=1)),
        ("--host -h", Scan()),
        ("--model", Scan()),
        ("--model=", Scan()),
        ("-- --port x", Scan()),
        ("---- -= --=x -", Scan()),
        ("--speculative-config.model x", Scan()),
        ("--config /nowhere.yaml m", Scan()),
        ("--config", Scan()),
    ],
)
def test_scan(argv: str, expected: Scan) -> None:
    """Both forms of a flag and both spellings; the positional only where vLLM expects it."""
    assert scan(Namespace(), argv.split()) == expected


def test_empty_tokens_give_nothing() -> None:
    """What a shell makes of an unset variable."""
    assert scan(Namespace(), ["", "--host", "", "--model="]) == Scan()


@pytest.mark.parametrize(
    ("framework", "expected"),
    [
        ({"host": "h", "port": 1}, Scan(host="h", port=1)),
        ({"port": "1"}, Scan(port=1)),
        ({"host": None, "port": None, "model_path": None}, Scan()),
        ({"model_path": Path("/m")}, Scan(model="/m", model_flag="--model-path")),
        ({"served_model_name": ["a", "b"]}, Scan(served_model_name="a")),
        ({"served_model_name": []}, Scan()),
    ],
)
def test_the_framework_is_the_fallback(framework: dict[str, Any], expected: Scan) -> None:
    """Its values count where argv has none."""
    assert scan(Namespace(**framework), []) == expected
    assert scan(Namespace(**framework), ["--port", "7"]) == replace(expected, port=7)


def test_the_config_file_comes_between(tmp_path: Path) -> None:
    """Its port is the one that will be bound: another one must not be tried in its place."""
    path = tmp_path / "c.yaml"
    path.write_text("port: 2\nserved_model_name: [a, b]\nuds: null\n", encoding="utf-8")
    given = Namespace(port=1, host="h")
    expected = Scan(host="h", port=2, served_model_name="a")
    assert scan(given, [f"--config={path}"]) == expected
    assert scan(given, ["--port", "3", "--config", str(path)]) == replace(expected, port=3)


@pytest.mark.parametrize("port", ["eighty", "65536", "-1", "8000.0", ""])
def test_a_port_that_is_none(port: str) -> None:
    """Exit code 2, before anything is imported; an empty one is vLLM's to refuse."""
    if not port:
        assert scan(Namespace(), ["--port", port]).port == 8000
        return
    for framework, argv in ((Namespace(), ["--port", port]), (Namespace(port=port), [])):
        with pytest.raises(ArgumentsError, match=f"--port {port}: expected") as caught:
            scan(framework, argv)
        assert caught.value.exit_code is ExitCode.BAD_ARGUMENTS


def test_a_taken_port_is_one_clear_line() -> None:
    """Exit code 69, with the address in it; and once it is free, nothing is left of the check."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = scan(Namespace(), ["--host", "127.0.0.1", f"--port={server.getsockname()[1]}"])
        with pytest.raises(AddressError) as caught:
            check_address(found)
    assert caught.value.exit_code is ExitCode.ADDRESS_UNAVAILABLE
    assert f"127.0.0.1:{found.port} is taken" in caught.value.line()
    check_address(found)
    check_address(found)


def test_a_unix_socket_is_checked_in_place_of_the_port(tmp_path: Path) -> None:
    """With --uds the port does not matter, taken or not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = Scan(host="127.0.0.1", port=server.getsockname()[1])
        check_address(replace(taken, uds=str(tmp_path / "s")))
        with pytest.raises(AddressError, match="--uds"):
            check_address(replace(taken, uds=str(tmp_path / "none" / "s")))


# The model ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}", encoding="utf-8")
    return directory


def missing(found: Scan) -> InputMissingError:
    with pytest.raises(InputMissingError) as caught:
        check_model(found)
    assert caught.value.exit_code is ExitCode.INPUT_MISSING
    assert "\n" not in caught.value.line()
    return caught.value


@pytest.mark.parametrize(
    "name", ["org/name", "name", "s3://bucket/model", "org/name:Q4_K_M", "", None, "x" * 5000]
)
def test_what_is_not_clearly_local_is_left_to_the_engine(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's name, and anything else that vLLM may know."""
    monkeypatch.chdir(tmp_path)
    check_model(Scan(model=name, tokenizer=name))


def test_a_whole_model_passes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its absolute path and by those that begin where we are."""
    check_model(Scan(model=str(model), tokenizer=str(model)))
    monkeypatch.chdir(model)
    for name in (".", "./", "../model", "./../model"):
        check_model(Scan(model=name))
    monkeypatch.chdir(model.parent)
    check_model(Scan(model="model"))


@pytest.mark.parametrize(
    "name", ["{tmp}/none", "./none", "../none", ".none/model", "~/none", "{tmp}/file/none"]
)
def test_a_missing_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag that gave it, the path as it was given, and what to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    name = name.format(tmp=tmp_path)
    error = missing(Scan(model=name, model_flag="--model-path"))
    assert error.message == f"--model-path {name}: no such file or directory"
    assert error.hint


def test_a_tilde_that_no_shell_expanded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM does not expand it, so that the model is not found though it is there."""
    monkeypatch.setenv("HOME", str(model.parent))
    assert str(model) in str(missing(Scan(model="~/model")).hint)
    assert "no such" in missing(Scan(model="~nobody-has-this-name/model")).message


def test_a_directory_without_a_configuration(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no model, unless --hf-config-path is given, or it is in Mistral's own format."""
    (model / "config.json").unlink()
    error = missing(Scan(model=str(model)))
    assert error.message == f"--model {model}: no readable config.json in it"
    monkeypatch.chdir(model.parent)
    assert "--model model: no readable" in missing(Scan(model="model")).message
    check_model(Scan(model=str(model), hf_config_path="/elsewhere"))
    check_model(Scan(tokenizer=str(model)))
    (model / "params.json").write_text("{}", encoding="utf-8")
    check_model(Scan(model=str(model)))


def test_a_broken_link_in_place_of_the_configuration(model: Path) -> None:
    """As a hub's cache has it when the file behind was deleted."""
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/nowhere/blob")
    assert "config.json" in missing(Scan(model=str(model))).message
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert "config.json" in missing(Scan(model=str(model))).message


@pytest.mark.parametrize(("name", "passes"), [("m.gguf", True), ("m.GGUF", True), ("m.bin", False)])
def test_a_single_file(tmp_path: Path, name: str, passes: bool) -> None:
    """Only a .gguf file is a model by itself."""
    path = tmp_path / name
    path.touch()
    if passes:
        check_model(Scan(model=str(path)))
    else:
        assert "not a .gguf one" in missing(Scan(model=str(path))).message


def test_a_model_without_the_right_to_read_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything: hence the patch."""
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "config.json")
    assert "no readable config.json" in missing(Scan(model=str(model))).message
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not allowed to read it" in missing(Scan(model=str(model))).message


def test_a_path_that_the_system_does_not_take() -> None:
    """Its own words for the rest, such as a name that is too long."""
    name = "/" + "x" * 5000
    assert missing(Scan(model=name)).message == f"--model {name}: File name too long"
    assert "null byte" in missing(Scan(model="/a\0b")).message


def test_a_missing_tokenizer(model: Path) -> None:
    """Only its existence is asked for, and its own flag named."""
    found = Scan(model=str(model), tokenizer="/none", tokenizer_flag="--tokenizer-path")
    assert missing(found).message == "--tokenizer-path /none: no such file or directory"


def test_nothing_heavy_is_imported() -> None:
    """The errors come before the seconds that vLLM's import takes."""
    code = "import sys, ichat_lifecycle.preflight; print({'vllm', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# --- refusals that need no parser of vLLM's


def refused(argv: str, environment: dict[str, str] | None = None, **framework: Any) -> str:
    with pytest.raises(ArgumentsError) as caught:
        refuse_early(Namespace(**framework), argv.split(), environment or {})
    assert caught.value.exit_code is ExitCode.BAD_ARGUMENTS
    return caught.value.line()


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--port 8000 --dtype auto",
        "--max-model-len 512 --enforce-eager",
        "--enforce-eager --no-enable-prefix-caching -tp 2",
        "--gpu-ids 0, 1",
        "--speculative-config.model x",
        "a b",
        "a --model b",
        "a --model-path b",
        "--model a --model-path b",
        "--enforce-eager a --model b",
        "m --headless",
        "m --grpc",
        "m -asc 2",
        "m --api-server-count=0",
        "m --api_server_count 3",
        "m --grpc-port 1",
        "m --data-parallel-multi-port-external-lb",
        "m -dpm",
        "m --data-parallel-supervisor-port 9300",
        "m --dp-supervisor-probe-failure-threshold 4",
        "m --gpu-ids x",
        "m --gpu-ids 0,0",
        "m --gpu-ids [0,",
    ],
)
@pytest.mark.engine
def test_what_is_refused_early_is_what_the_parser_would_say(argv: str) -> None:
    from test_arguments import vllm_parser

    early = refused(argv)
    with pytest.raises(ArgumentsError) as caught:
        parse(Namespace(), argv.split(), vllm_parser())
    assert caught.value.line() == early


@pytest.mark.parametrize(
    "argv",
    [
        "m",
        "--model m --model-path m",
        "m --model m",
        "--model-path ./m --model m",
        "--model a --model m",
        # A word that may be the model, or that only the parser can place.
        "--enforce-eager m",
        "--port 1 m",
        "--served-model-name a m",
        "--no-such-flag m",
        "-n2 m",
        "--port=1 m",
        "-- m",
        "m --served-model-name a b",
        "m --api-server-count 1",
        "m -asc 1",
        "m --data-parallel-supervisor-port 9256 --dp-supervisor-probe-interval-s 5",
        "m --no-data-parallel-multi-port-external-lb",
        "m --gpu-ids [0,1]",
        "m --gpu-ids 0, 1",
        "m --gpu-ids GPU-8932f937",
        "m --cpu-offload-gb -1 --speculative-config.model x",
        "m --hf-overrides {} --compilation-config.level=3",
    ],
)
def test_what_may_be_right_is_left_to_the_parser(argv: str) -> None:
    refuse_early(Namespace(), argv.split(), {})


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (f"--ssl-keyfile {CERTIFICATE}", "a key without a certificate"),
        ("--ssl_certfile=none.pem", "--ssl-certfile none.pem"),
        (f"--ssl-certfile {CERTIFICATE} --ssl-cert-reqs 5", "--ssl-cert-reqs 5"),
        (f"--ssl-certfile {CERTIFICATE} --ssl-ciphers none", "--ssl-ciphers none"),
    ],
)
def test_tls_that_no_server_can_speak_is_refused_early(argv: str, part: str) -> None:
    assert part in refused(f"m {argv}")


@pytest.mark.parametrize(
    "argv",
    [
        f"--ssl-certfile {CERTIFICATE}",
        f"--ssl-certfile {CERTIFICATE} --ssl-keyfile {CERTIFICATE} --ssl-cert-reqs 2",
        # Without TLS there is nothing that these are about, and of these the parser knows more.
        "--ssl-cert-reqs 5",
        f"--no-such-flag x --ssl-keyfile {CERTIFICATE}",
        f"--ssl-keyfile {CERTIFICATE} --ssl-certfile",
    ],
)
def test_other_tls_is_left_to_the_server(argv: str) -> None:
    refuse_early(Namespace(), ["m", *argv.split()], {})


def test_a_flag_without_its_value_is_shown_as_that() -> None:
    assert refused("m --gpu-ids").endswith("got nothing")


def test_a_conflict_with_the_framework_is_seen_early() -> None:
    assert "the framework's --model-path b" in refused("--model a", model_path="b")
    refuse_early(Namespace(model_path="a"), ["--port", "1"], {})


@pytest.mark.parametrize(
    ("text", "argv", "part"),
    [
        ("headless: true", "m", "--headless"),
        ("grpc_port: 1", "m", "--grpc-port 1"),
        ("port: 1", "", "no model given"),
        ("model: a\nmodel-path: b", "", "are in conflict"),
        ("gpu-ids: [a]", "m", "--gpu-ids"),
    ],
)
def test_a_config_file_is_refused_early_too(
    tmp_path: Path, text: str, argv: str, part: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    assert part in refused(f"{argv} --config {path}")


@pytest.mark.parametrize("text", ["model: a", "model_path: a", "model: a\ngpu_ids: [0, GPU-1]"])
@pytest.mark.parametrize("argv", ["", "b", "--model b"])
def test_a_model_in_a_config_file_is_one(tmp_path: Path, text: str, argv: str) -> None:
    """And no conflict with another one in argv, which wins."""
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    refuse_early(Namespace(), [*argv.split(), "--config", str(path)], {})
    found = scan(Namespace(), [*argv.split(), "--config", str(path)])
    assert found.model == ("b" if argv else "a")


def test_another_front_end_is_refused() -> None:
    line = refused("m", {"VLLM_USE_RUST_FRONTEND": "1"})
    assert "VLLM_USE_RUST_FRONTEND=1" in line
    for off in ("", "0", " 0 "):
        refuse_early(Namespace(), ["m"], {"VLLM_USE_RUST_FRONTEND": off})
