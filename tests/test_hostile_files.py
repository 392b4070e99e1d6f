"""Files of strangers, and of mistakes: each ends in words with a place, soon, and in little memory.

What a drawn file comes to is in test_drawn_files.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from waiting import until

from ichat_lifecycle import cli
from ichat_lifecycle.adapters.chat_template import syntax_error
from ichat_lifecycle.adapters.logging_choice import check_file
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.arguments import gpu_ids_of, read_config
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.config import SECONDS_MAX, Settings, load_settings
from ichat_lifecycle.document import KEY_MAX, parse
from ichat_lifecycle.errors import ArgumentsError, InputMissingError, LifecycleError
from ichat_lifecycle.fleet import engine_words, up
from ichat_lifecycle.fleet.command_size import ONE_MAX, too_large
from ichat_lifecycle.fleet.engine_argv import WrongKey
from ichat_lifecycle.fleet.engine_words import Answer, Question, ask_vllm
from ichat_lifecycle.fleet.load import WORKERS_MAX
from ichat_lifecycle.fleet.models import OWN_VARIABLES
from ichat_lifecycle.fleet.plans import TOLD_MAX, BadFileError, Reading, read_plans
from ichat_lifecycle.input_file import TooLargeError, read_input
from ichat_lifecycle.printable import brief
from ichat_lifecycle.scalars import as_json
from ichat_lifecycle.testing.nasty_yaml import BOMBS
from ichat_lifecycle.yaml_nodes import DEPTH_MAX, TEXT_MAX, VALUES_MAX

pytestmark = pytest.mark.hostile

SOON_S = 20.0  # processor time; on a machine with nothing else to do it is one
SECRET = "hunter2hunter2"
FILE = Path("configs.yaml")


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one at ./m."""
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    Path("m/config.json").write_text("{}")


def ask(questions: Sequence[Question]) -> list[Answer]:
    """Stands for vLLM's parser, and takes every key."""
    return [Answer(tuple(f"--{k}={v}" for k, v in q.keys.items()), ()) for q in questions]


def worker(more: str = "", port: str = "1") -> str:
    return f"managed_workers:\n- {{model_name: a, model_path: ./m, port: {port}{more}}}\n"


def reading(text: str, environment: Mapping[str, str] | None = None) -> Reading:
    FILE.write_bytes(text.encode())
    return read_plans(FILE, environment or {}, ask)


def told(text: str, environment: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(BadFileError) as caught:
        reading(text, environment)
    return [line.removeprefix(f"{FILE}:") for line in caught.value.told]


# --- what a text may ask for


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_defused(name: str) -> None:
    """Each has some hundred bytes, or up to a megabyte, and stands for gigabytes or hours."""
    began = time.process_time()
    found = told(BOMBS[name])
    assert time.process_time() - began < SOON_S
    assert all(line.split(":")[0].isdecimal() for line in found[:TOLD_MAX]), "each has its place"
    assert sum(map(len, found)) < 100_000


def test_bombs_take_no_memory() -> None:
    """In a process of its own, whose peak is its own."""
    program = (
        "import resource, sys\n"
        "from ichat_lifecycle.document import parse\n"
        "from ichat_lifecycle.testing.nasty_yaml import BOMBS\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "[parse(text) for text in BOMBS.values()]\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(done.stdout) < 150, "MB"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a: "\\UFFFFFFFF"', "1:"),
        ('a:\n  - "\\U00110000"', "2:"),
        ("%YAML 1." + "1" * 5000 + "\n---\na: 1", "1:"),
        ("a: \x00", "1:4: not YAML: the character U+0000 cannot stand here"),
        ("a: 1\n---\nb: 1", "2:1: not YAML: more than one document"),
        ("a: " + "[" * 300, f"1:{4 + DEPTH_MAX - 1}: more than {DEPTH_MAX} values within each"),
        ("a: !!timestamp 99", "1:1: a: no such section"),
        ("a: !!binary aGVsbG8=", "1:4: the tag !!binary cannot stand here (leave it out)"),
        ("a: !!set {b, c}", "1:4: the tag !!set cannot stand here"),
        ("a: !!python/object/apply:os.system [ls]", "1:4: the tag !!python/object/apply:os.sy"),
        ("a: !foo bar", "1:4: the tag !foo cannot stand here"),
        ("a: !!int ''", "1:4: '' is not a whole number"),
        ("a: !!float '-'", "1:4: '-' is not a number"),
        ("a: !!int '1:a'", "1:4: '1:a' is not a whole number"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "1:17: << stands here twice (first in line 1)"),
        ('a: "b\\0"', "1:4: a NUL character is in it"),
        ('"b\\0": 1', "1:1: a NUL character is in it"),
        ('a: "\\uD800"', "1:4: half of a character (a surrogate) is in it"),
        ("? " + "k" * (KEY_MAX + 1) + "\n: 1", f"1:3: a key of more than {KEY_MAX} characters"),
    ],
)
def test_what_is_not_taken_has_a_place(text: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in told(text)), told(text)


@pytest.mark.parametrize("digits", ["1" * 5000, "1:" * 5000 + "1", "0x" + "f" * 5000])
def test_a_number_that_has_no_end_is_none(digits: str) -> None:
    """It was a ValueError; to base 60, minutes of computing."""
    expected = "2:42: a number of more than 100 characters (quote it where text is meant)"
    assert expected in told(worker(port=digits))
    assert told(worker(f", revision: {digits}")) == [expected.replace("2:42", "2:55")]
    quoted = reading(worker(f", revision: '{digits}'"))
    assert quoted.plans[0].argv[-1] == f"--revision={digits}"


@pytest.mark.parametrize("text", ["=", "2024-13-45", "2024-01-01", "12:30:00"])
def test_text_that_yaml_has_other_ideas_of_stays_text(text: str) -> None:
    assert reading(worker(f", revision: {text}")).plans[0].argv[-1] == f"--revision={text}"


def test_a_file_that_is_too_large_is_not_read() -> None:
    assert told("#" * (TEXT_MAX + 1)) == [f"1:1: more than {TEXT_MAX:,} bytes"]


def test_a_file_that_is_not_text_says_where() -> None:
    FILE.write_bytes("a: 1\nb: é".encode() + b"\xff")
    with pytest.raises(BadFileError) as caught:
        read_plans(FILE, {}, ask)
    assert caught.value.told[0].startswith(f"{FILE}:2:5: not UTF-8: ")


def test_problems_are_counted_and_not_all_told() -> None:
    found = told("managed_workers:\n" + "- x\n" * WORKERS_MAX)
    assert len(found) == TOLD_MAX + 1
    assert found[-1] == f" and {WORKERS_MAX - TOLD_MAX} more problems"


def test_workers_without_number_are_one_problem() -> None:
    found = told("managed_workers:\n" + "- x\n" * (WORKERS_MAX + 1))
    assert found == [f"{WORKERS_MAX + 2}:3: managed_workers: more than {WORKERS_MAX} workers"]


def test_as_many_workers_as_are_allowed_are_planned_soon() -> None:
    rows = [f"- {{model_name: a{n}, port: {n + 1}}}\n" for n in range(WORKERS_MAX)]
    began = time.process_time()
    found = reading("defaults: {model_path: ./m}\nmanaged_workers:\n" + "".join(rows))
    assert len(found.plans) == WORKERS_MAX
    assert time.process_time() - began < SOON_S


def test_defaults_are_counted_once_for_each_worker() -> None:
    keys = "".join(f"  k{n}: 1\n" for n in range(VALUES_MAX // 4))
    rows = "".join(f"- {{model_name: a{n}, port: {n + 1}}}\n" for n in range(WORKERS_MAX))
    found = told(f"defaults:\n  model_path: ./m\n{keys}managed_workers:\n{rows}")
    assert found == [
        f"1:1: defaults and lifecycle: too many values for {WORKERS_MAX} workers",
    ]


def test_messages_are_short_and_plain() -> None:
    found = told('"\\e[2J\\x9b\\u202e": 1\n"' + "x" * 900 + '": 2\n')
    assert found[0] == "1:1: \\x1b[2J\\x9b\\u202e: no such section"
    assert all(len(line) < 1200 and line.isprintable() for line in found)
    assert brief("a\nb\x1b", 2) == "a\\n…"


# --- values


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (", gpu_ids: [true, '1']", "2:45: a: gpu_ids: expected GPU numbers or UUIDs"),
        (", gpu_ids: [1024]", "2:45: a: gpu_ids: expected GPU numbers or UUIDs"),
        (f", gpu_ids: [{'9' * 5000}]", "2:45: a: gpu_ids: expected GPU numbers or UUIDs"),
        (", context_length: !!bool 'true'", "2:45: a: context_length: expected a number"),
        (", context_length: 99999999999", "2:45: a: context_length: input should be less"),
        (", heartbeat_interval: 1e300", "2:45: a: heartbeat_interval: input should be less"),
        (", shutdown_timeout: 999999999999", "2:45: a: --shutdown-timeout 999999999999: exp"),
        (f", host: {'h' * 300}", "2:45: a: host: string should have at most 255 characters"),
        (', host: "a\\e"', "2:45: a: host: character 2 is a control character"),
        (', worker_id: "a\\n"', "2:45: a: worker_id: character 2 is a control character"),
        (f", uds: /{'x' * 107}", "2:45: a: uds: more than 107 bytes"),
        (", lifecycle: {stop: {drain: 1e300}}", "2:64: a: lifecycle: stop.drain: input should"),
        (", lifecycle: {health: {give_up_after: 9999999}}", "2:66: a: lifecycle: health.give_up"),
        (", chat_template: pipe", "2:45: a: chat_template: pipe is a pipe, not a file"),
        (", config: pipe.yaml", "2:45: a: config: pipe.yaml is a pipe, not a file"),
        (", ssl_certfile: pipe", "2:45: a: ssl_certfile: pipe is a pipe, not a file"),
        (", ssl_ca_certs: /dev/zero", "2:45: a: ssl_ca_certs: /dev/zero is a device, not a file"),
        (", ssl_ca_certs: [m]", "2:45: a: ssl_ca_certs: expected a path"),
        (", ssl_certfile: m", "2:45: a: ssl_certfile: m is a directory, not a file"),
        (", log-config-file: m", "2:45: a: log_config_file: m is a directory, not a file"),
        (f", x: {'y' * 132_000}", "2:45: a: x: 132,004 bytes in one argument or variable: at most"),
        (f", env: {{A: {'y' * 132_000}}}", "2:51: a: 132,002 bytes in one argument or variable"),
        *((f", env: {{{name}: x}}", f"2:51: a: env.{name}") for name in OWN_VARIABLES),
    ],
)
def test_a_value_that_cannot_be_used_is_told_before_a_worker_starts(
    more: str, expected: str
) -> None:
    os.mkfifo("pipe")
    os.mkfifo("pipe.yaml")
    found = told(worker(more))
    assert found[0].startswith(expected)


def test_variables_that_are_too_much_together_are_told() -> None:
    """The kernel refuses them (E2BIG), and the worker was started again and again."""
    rows = ", ".join(f"A{n}: {'x' * 100_000}" for n in range(9))
    inherited = {f"B{n}": "x" * 100_000 for n in range(60)}
    (found,) = told(worker(f", env: {{{rows}}}"), inherited)
    assert found.startswith("2:3: a: ")
    assert "bytes of arguments and variables: at most" in found


def test_the_kernel_takes_what_is_not_too_large() -> None:
    """And not one byte more."""
    for extra, fits in ((0, True), (1, False)):
        word = "x" * (ONE_MAX + extra)
        assert (not list(too_large([word], {}, {}))) == fits
        try:
            subprocess.run(["/bin/true", word], check=True)
            taken = True
        except OSError:
            taken = False
        assert taken == fits


def test_sizes_that_no_machine_has_end_no_check() -> None:
    sizes = f", tensor_parallel_size: {'9' * 99}, nnodes: 3, gpu_ids: [0]"
    (found,) = told(worker(sizes))
    assert "gpu_ids has 1 of the 3333" in found


def test_a_number_that_json_does_not_have_is_none() -> None:
    """It went to vLLM as Infinity."""
    complaints: list[str] = []
    document = parse("a: [1e999, -1e999, 1e3]")
    found = as_json(document.value, lambda at, message, hint: complaints.append(message))
    assert found["a"][2] == 1000
    assert complaints == ["it can be read in two ways"] * 2


# --- variables


@pytest.mark.parametrize(
    "text",
    [
        "managed_workers:\n- {model_name: a, port: 1, model_path: '/${S}/m'}\n",
        worker(", tokenizer_path: './${S}/t'"),
        worker(", ssl_certfile: '/${S}/x.pem'"),
        worker(", ssl_certfile: './${S}'"),
        worker(", config: './${S}'"),
        worker(", gateway_address: '${S}:1'") + "- {model_name: a, model_path: ./m, port: 2}\n",
        worker(", lifecycle: {'${S}': 1}"),
        worker(", uds: '/${S}'") + "- {model_name: b, model_path: ./m, port: 2, uds: '/${S}'}\n",
        "'${S}': 1\n",
        worker(", shutdown_timeout: '${S}'"),
    ],
)
def test_what_a_variable_holds_is_not_told(text: str) -> None:
    Path(SECRET).mkdir()
    try:
        lines = [doubt.told(FILE) for doubt in reading(text, {"S": SECRET}).doubts]
    except BadFileError as error:
        lines = [*error.told, error.line()]
    assert lines
    assert SECRET not in "".join(lines)


LONG = "hunter2 hunter2/" + "hunter2\\" * 70


@pytest.mark.parametrize(
    "text",
    [
        worker(", control_port: 1").replace("model_name: a", "model_name: '${S}'"),
        worker(port="70000").replace("model_name: a", "model_name: 'a ${S}'"),
        worker(", name: '${S}'"),
        worker(", lifecycle: {stop: {drain: soon}}").replace("model_name: a", "model_name: '${S}'"),
        worker(", uds: ''").replace("model_name: a", "model_name: '${S}'"),
        worker(", shutdown_timeout: -1").replace("model_name: a", "model_name: '${S}'"),
        "'${S}': 1\n",
        "fleet: {'${S}': 1, '${S}': 2}\n",
    ],
)
def test_what_a_long_variable_holds_is_not_told_in_part(text: str) -> None:
    """It was cut, or made a name of, before it was looked for."""
    lines = told(text, {"S": LONG})
    assert "hunter2" not in "".join(lines)
    assert "${S}" in "".join(lines)


def test_the_place_of_a_socket_is_shown_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(read_plans, "__defaults__", (ask,))
    monkeypatch.setenv("S", SECRET)
    FILE.write_text(worker(", uds: '/run/${S}/a'"))
    args = build_parser().parse_args(["check", str(FILE)])
    assert args.run(args, []) == 0
    assert capsys.readouterr().out == "a: a on unix:/run/${S}/a\n"


def test_variables_stand_for_no_more_than_their_text() -> None:
    environment = {"A": "${B}${B}", "B": "x" * 100_000}
    assert reading(worker(", x: '${A}'"), environment).plans[0].argv[-1] == "--x=${B}${B}"
    assert "characters, with aliases and variables" in told(f"a: '{'${B}' * 1000}'", environment)[0]


# --- what stands in the place of a file


@pytest.fixture(params=["pipe", "device", "directory", "socket", "dangling", "loop"])
def odd(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A path that ends in .yaml, and is not a file."""
    path = Path("odd.yaml")
    with socket.socket(socket.AF_UNIX) as sock:
        match request.param:
            case "pipe":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "directory":
                path.mkdir()
            case "socket":
                sock.bind(str(path))
            case "dangling":
                path.symlink_to("nothing")
            case _:
                path.symlink_to(path.name)
        yield path


def test_what_is_no_file_is_an_error_at_once(odd: Path) -> None:
    """A reload hung for ever on a pipe, and so did each one after it."""
    with pytest.raises(InputMissingError, match=r"^odd\.yaml: "):
        read_plans(odd, {}, ask)
    with pytest.raises(InputMissingError, match=r"^--lifecycle-config odd\.yaml: "):
        load_settings(odd)
    with pytest.raises(InputMissingError, match=r"^--config odd\.yaml: "):
        read_config(odd)
    with pytest.raises(InputMissingError, match=r"^--log-config-file odd\.yaml: "):
        check_file(str(odd), "--log-config-file", {})


def test_a_template_that_is_a_pipe_is_not_waited_for() -> None:
    os.mkfifo("pipe")
    arguments = VllmArguments(argparse.Namespace(), [])
    arguments.layout = Layout("0", {"load_chat_template": syntax_error})
    with pytest.raises(ArgumentsError, match="--chat-template pipe: a pipe, not a file"):
        arguments._check_chat_template(argparse.Namespace(chat_template="pipe"))


def test_a_file_that_never_ends_is_too_large() -> None:
    """Its size says nothing: those in /proc have none."""
    Path("large").write_bytes(b"x" * 101)
    with pytest.raises(TooLargeError, match="more than 100 bytes"):
        read_input("large", 100)
    assert read_input("large", 101) == b"x" * 101
    assert read_input("/proc/self/status", 100_000)


def test_a_path_that_is_none_is_an_error() -> None:
    with pytest.raises(InputMissingError):
        read_input("a\0b", 1)


# --- other files of the same kind


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_vllms_config_file_or_in_ours_is_defused(name: str) -> None:
    path = Path("bomb.yaml")
    path.write_text(BOMBS[name])
    began = time.process_time()
    for load in (read_config, load_settings):
        with pytest.raises(LifecycleError) as caught:
            load(path)
        assert str(path) in caught.value.line()
        assert len(caught.value.line()) < 2000
    assert time.process_time() - began < SOON_S


@pytest.mark.parametrize("text", ["=", "2024-13-45", "!!timestamp 9"])
def test_what_vllms_reader_cannot_read_has_to_be_quoted(text: str) -> None:
    """It would end its reading with an exception of any kind."""
    Path("vllm.yaml").write_text(f"model: org/m\nrevision: {text}\n")
    with pytest.raises(ArgumentsError, match=r"^--config vllm\.yaml:\d:\d+: .*\(quote the value\)"):
        read_config(Path("vllm.yaml"))


def test_a_wrong_value_without_end_is_cut() -> None:
    Path("vllm.yaml").write_text(f"model: org/m\ncontrol-port: {'k' * 100_000}\n")
    words = ["--config", "vllm.yaml"]
    with pytest.raises(ArgumentsError) as caught:
        cli._with_config_file(words, words)
    assert len(caught.value.line()) < 1000
    with pytest.raises(ArgumentsError) as caught:
        gpu_ids_of("k" * 100_000, "--gpu-ids")
    assert len(caught.value.line()) < 1000


@pytest.mark.parametrize(
    "assignment",
    [
        'health.interval="\\UFFFFFFFF"',
        f"health.interval={'[' * 2000}",
        f"health.interval={'9' * 5000}",
        "health.interval=1e999",
        "health.interval=!!python/object:a {}",
        f"stop.{'x' * 5000}=1",
        "warm_up.prompt=\x1b[2J: :",
    ],
)
def test_an_assignment_is_read_by_the_same_rules(assignment: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        load_settings(None, [assignment])
    assert len(caught.value.line()) < 1000
    assert caught.value.line().isprintable()


def test_all_deadlines_together_are_ones_that_a_thread_can_wait_for() -> None:
    largest = dict.fromkeys(Settings().stop.model_dump(), SECONDS_MAX)
    assert Settings.model_validate({"stop": largest}).stop_bound * 2 < threading.TIMEOUT_MAX


def test_logging_that_is_nested_without_end_is_an_error() -> None:
    Path("log.json").write_text("[" * 200_000)
    with pytest.raises(ArgumentsError, match="not JSON"):
        check_file("log.json", "--log-config-file", {})


# --- vLLM's parser, whatever it prints


def answering(program: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys\n{program}"]


@pytest.mark.parametrize(
    "program",
    [
        "print('no JSON')",
        "print('[' * 100000)",
        "print('[]')",
        "print('null')",
        "print('{}')",
        "print('{\"workers\": [1]}')",
        "print('{\"workers\": []}')",
        'print(\'{"workers": [{"words": "ab", "wrong": [], "headers": {}}]}\')',
        'print(\'{"workers": [{"words": ["a\\\\u0000"], "wrong": [], "headers": {}}]}\')',
        'print(\'{"workers": [{"words": [], "wrong": [{"k": 1}], "headers": {}}]}\')',
        'print(\'{"workers": [{"words": [], "wrong": [], "headers": {"allowed_origins": 1}}]}\')',
        "sys.stdout.buffer.write(b'\\xff')",
        "sys.stderr.write('\\x1b[2J' * 100000)",
        "while True: os.write(1, b'x' * 65536)",
        "os.close(1); os.kill(os.getpid(), 9)",
    ],
)
def test_an_answer_that_is_none_is_an_error(program: str) -> None:
    with pytest.raises(LifecycleError, match="vLLM's parser has failed") as caught:
        ask_vllm([Question((), {}, ())], answering(program))
    assert caught.value.line().isprintable()
    assert len(caught.value.line()) < 1000


def test_a_parser_that_prints_without_end_takes_no_memory() -> None:
    """Beside its answer: 200 MB on stderr."""
    good = '{"workers": [{"words": [], "wrong": [], "headers": {}}]}'
    program = f"[os.write(2, b'x' * 1000000) for _ in range(200)]\nprint('{good}')"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ask_vllm([Question((), {}, ())], answering(program))[0].words == ()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KB"


def test_a_parser_that_hangs_and_its_children_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_words, "TIMEOUT_S", 1.0)
    program = (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid))\ntime.sleep(600)"
    )
    with pytest.raises(LifecycleError, match="has not answered"):
        ask_vllm([Question((), {}, ())], answering(program))
    child = Path("child").read_text() if Path("child").exists() else ""
    until(lambda: not child or state_of(child) in ("", "Z"), "the end of the child")


def state_of(pid: str) -> str:
    """Of a process, as the kernel has it; "" without one."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    return ""


def test_a_parser_that_leaves_somebody_behind_is_not_waited_for() -> None:
    good = '{"workers": [{"words": [], "wrong": [], "headers": {}}]}'
    program = (
        "import subprocess\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=2)\n"
        f"print('{good}')"
    )
    began = time.monotonic()
    assert ask_vllm([Question((), {}, ())], answering(program))[0].words == ()
    assert time.monotonic() - began < 60


def test_a_complaint_of_the_parser_without_end_is_cut() -> None:
    def complain(questions: Sequence[Question]) -> list[Answer]:
        return [Answer((), (WrongKey(None, "\x1b" * 10**6, None),)) for _ in questions]

    FILE.write_text(worker())
    with pytest.raises(BadFileError) as caught:
        read_plans(FILE, {}, complain)
    assert len(caught.value.told[0]) < 3000
    assert caught.value.told[0].isprintable()


def test_a_text_of_a_flag_is_no_document_without_end() -> None:
    assert parse("x" * (TEXT_MAX + 1)).problems[0].message == f"more than {TEXT_MAX:,} bytes"


# --- a reload


def test_a_reload_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may never answer; the file that was meant is read by the next reload."""
    monkeypatch.setattr(up, "READING_S", 0.2)
    reads: list[int] = []
    goes_on = threading.Event()

    def read() -> Reading:
        reads.append(len(reads))
        if len(reads) == 1:
            goes_on.wait()
        raise ArgumentsError("it was read")

    async def reloads() -> list[BaseException | Mapping[str, object]]:
        supervisor = up.Supervisor(FILE, read, io.StringIO())
        both = (supervisor.reload(), supervisor.reload())
        return list(await asyncio.gather(*both, return_exceptions=True))

    try:
        first, second = asyncio.run(reloads())
    finally:
        goes_on.set()
    assert "configs.yaml: not read within 0.2 s" in str(first)
    assert str(second) == "it was read"
