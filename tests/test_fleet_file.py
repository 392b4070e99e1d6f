"""configs.yaml: what it comes to, and what a person is told of a bad one."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.errors import InputMissingError
from ichat_lifecycle.fleet.engine_argv import WrongKey
from ichat_lifecycle.fleet.engine_words import Answer, NoEngineError, Question
from ichat_lifecycle.fleet.plans import BadFileError, Reading, read_plans
from ichat_lifecycle.fleet.ports import Plan
from ichat_lifecycle.fleet.schema import file_schema
from ichat_lifecycle.gpus import parse_gpu_ids

CONFIGS = Path(__file__).parent.parent / "configs"
CERTIFICATE = Path(__file__).with_name("certificate.pem")
ENCRYPTED = Path(__file__).with_name("encrypted_certificate.pem")
EXAMPLES = sorted(
    path.name for path in CONFIGS.glob("*.yaml") if "managed_workers" in path.read_text()
)


def ask(questions: Sequence[Question]) -> list[Answer]:
    """Stands for vLLM's parser: knows no key that begins with x, and takes all others."""
    return [_answer(question.keys) for question in questions]


def _answer(keys: Mapping[str, Any]) -> Answer:
    wrong = [WrongKey(key, "unknown key", "did you mean y?") for key in keys if key[0] == "x"]
    words = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
    return Answer(tuple(words), tuple(wrong))


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one at ./m."""
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    Path("m/config.json").write_text("{}")


def reading(text: str, environment: Mapping[str, str] | None = None) -> Reading:
    path = Path("configs.yaml")
    path.write_text(text, encoding="utf-8")
    return read_plans(path, environment or {}, ask)


def planned(worker: str, more: str = "") -> Plan:
    text = f"managed_workers:\n  - {{model_name: a, model_path: ./m, port: 8001{worker}}}\n{more}"
    return reading(text).plans[0]


def told(text: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong, without the path of the file."""
    with pytest.raises(BadFileError) as caught:
        reading(text, environment)
    return [line.removeprefix("configs.yaml:") for line in caught.value.told]


# --- good ones


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_pass_unchanged(name: str) -> None:
    """Their models are on other machines: that is said, and no more."""
    found = read_plans(CONFIGS / name, {}, ask, here=False)
    assert found.plans
    assert all("no such file" in doubt.message for doubt in found.doubts)


def test_ichats_own_example_passes_unchanged() -> None:
    text = """\
server_settings: {host: 0.0.0.0, port: 4000, log_level: info, heartbeat_timeout: 30}
managed_workers:
  - model_name: qwen-7b-chat
    model_path: /models/qwen-7b-chat
    backend: vllm
    gpu_ids: [0]
    port: 8001
    heartbeat_interval: 10
    tensor_parallel_size: 1        # every key that is not the framework's is a vLLM argument
    gpu_memory_utilization: 0.9
"""
    path = Path("configs.yaml")
    path.write_text(text)
    (plan,) = read_plans(path, {}, ask, here=False).plans
    assert (plan.name, plan.address, plan.gpu_ids) == ("qwen-7b-chat", "127.0.0.1:8001", (0,))
    assert plan.argv == (
        *("--model-path", "/models/qwen-7b-chat", "--served-model-name", "qwen-7b-chat"),
        *("--host", "127.0.0.1", "--port", "8001", "--gpu-ids", "[0]"),
        *("--control-host", "127.0.0.1", "--grace-period", "34.5"),
        *("--lifecycle-log-format", "json", "--lifecycle-log-level", "info"),
        *("--tensor-parallel-size=1", "--gpu-memory-utilization=0.9"),
    )


@pytest.mark.parametrize(
    "other",
    ["fleet: {port: 18001}", "- {model_name: b, model_path: ./m, port: 18001}"],
)
def test_a_default_control_port_gives_way_to_one_that_the_file_gives(other: str) -> None:
    text = f"managed_workers:\n- {{{WORKER}, port: 8001}}\n"
    plan = reading(text + other).plans[0]
    assert tuple(plan.argv[plan.argv.index("--control-port") :][:2]) == ("--control-port", "0")
    assert plan.control.port == 0
    alone = reading(text).plans[0]
    assert "--control-port" not in alone.argv
    assert alone.control.port == 18001


def test_a_key_of_ours_is_a_flag_of_ours() -> None:
    plan = planned(
        ", name: n, host: 0.0.0.0, control_host: 0.0.0.0, control_port: 0, tokenizer_path: ./m, "
        "context_length: 99, gateway_address: 'g:1', worker_id: w, heartbeat_interval: 3, "
        "advertise_host: w.example, advertise_port: 443",
        "server_settings: {heartbeat_timeout: 90}",
    )
    flags = dict(zip(plan.argv[::2], plan.argv[1::2], strict=True))
    assert flags == {
        "--model-path": "./m",
        "--served-model-name": "a",
        "--host": "0.0.0.0",
        "--port": "8001",
        "--tokenizer-path": "./m",
        "--context-length": "99",
        "--control-host": "0.0.0.0",
        "--control-port": "0",
        "--grace-period": "34.5",
        "--lifecycle-log-format": "json",
        "--lifecycle-log-level": "info",
        "--gateway-address": "g:1",
        "--heartbeat-interval": "3.0",
        "--heartbeat-timeout": "90.0",
        "--advertise-host": "w.example",
        "--advertise-port": "443",
        "--worker-id": "w",
    }
    assert (plan.name, plan.model) == ("n", "a")


def test_a_worker_is_the_same_to_the_gateway_whatever_its_process() -> None:
    plan = planned(", gateway_address: 'g:1'")
    worker_id = plan.argv[plan.argv.index("--worker-id") + 1]
    assert worker_id == f"{socket.gethostname()}-a"


def test_a_workers_lifecycle_wins_over_everybodys_key_by_key() -> None:
    plan = planned(
        ", lifecycle: {stop: {drain: 60}, health: {interval: 2}}",
        "lifecycle: {stop: {drain: 30, cut: 2}, restart: {max: 0}}",
    )
    words = [word for flag, word in zip(plan.argv, plan.argv[1:], strict=False) if flag == "--set"]
    assert sorted(words) == [
        "health.interval=2.0",
        "restart.max=0",
        "stop.cut=2.0",
        "stop.drain=60.0",
    ]
    assert plan.stop_bound_s == pytest.approx(26.5 - 12 + 60 + 1 + 3)


def test_a_default_holds_until_a_worker_says_otherwise() -> None:
    text = """\
defaults: {model_path: ./m, host: 0.0.0.0, dtype: half, env: {A: '1'}}
managed_workers:
  - {model_name: a, port: 1}
  - {model_name: b, port: 2, host: 127.0.0.1, dtype: null, env: {B: '2'}}
"""
    a, b = reading(text).plans
    assert (a.host, b.host) == ("0.0.0.0", "127.0.0.1")
    assert ("--dtype=half" in a.argv, "--dtype=half" in b.argv) == (True, False)
    assert (a.env, b.env) == ({"A": "1"}, {"B": "2"})


def test_variables_are_what_the_environment_says() -> None:
    text = """\
managed_workers:
  - model_name: a
    model_path: ${WHERE}/m
    port: ${PORT:-8001}
    seed: ${SEED}
    price: $$5
    word: "${SEED}"
"""
    environment = {"WHERE": ".", "SEED": "7"}
    (plan,) = reading(text, environment).plans
    assert plan.port == 8001
    assert {"--seed=7", "--price=$5", "--word=7"} <= set(plan.argv)


@pytest.mark.parametrize(
    ("said", "level"),
    [("INFO", "info"), ("WARN", "warning"), ("critical", "error"), ("odd", "info")],
)
def test_the_gateways_log_level_is_the_workers(said: str, level: str) -> None:
    plan = planned("", f"server_settings: {{log_level: {said}}}")
    assert plan.argv[plan.argv.index("--lifecycle-log-level") + 1] == level


def test_a_unix_socket_is_an_address() -> None:
    plan = planned(", uds: /run/a.sock")
    assert plan.address == "unix:/run/a.sock"
    assert "--host" not in plan.argv


@pytest.mark.parametrize(
    "workers",
    [
        "{gpu_ids: [0], gpu_memory_utilization: 0.5}, {gpu_ids: [0], gpu_memory_utilization: 0.5}",
        "{gpu_ids: [0], share_gpus: true}, {gpu_ids: [0], share_gpus: true}",
        "{gpu_ids: [0]}, {gpu_ids: [1]}",
        "{}, {}",
    ],
)
def test_gpus_may_be_shared_where_their_memory_suffices(workers: str) -> None:
    first, second = workers.split("}, {")
    text = (
        "defaults: {model_path: ./m}\nmanaged_workers:\n"
        f"  - {first}{',' if ':' in first else ''} model_name: a, port: 1}}\n"
        f"  - {{model_name: b, port: 2{',' if ':' in second else ''} {second}\n"
    )
    assert len(reading(text).plans) == 2


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ("[0, 1]", (0, 1)),
        ("0,1", (0, 1)),
        ("3", (3,)),
        ("[GPU-8932f937, MIG-1/2]", ("GPU-8932f937", "MIG-1/2")),
        ("GPU-8932f937", ("GPU-8932f937",)),
        ("['2']", (2,)),
    ],
)
def test_gpus_by_number_or_uuid(said: str, ids: tuple[int | str, ...]) -> None:
    """What `serve` is given means the same again."""
    quoted = said if said.startswith("[") or "," not in said else f"'{said}'"
    plan = planned(f", gpu_ids: {quoted}")
    assert plan.gpu_ids == ids
    assert parse_gpu_ids(plan.argv[plan.argv.index("--gpu-ids") + 1]) == ids


@pytest.mark.parametrize(
    "keys",
    [
        "gpu_ids: [0, 1], tensor_parallel_size: 2",
        "gpu_ids: [0], tensor_parallel_size: 4, distributed_executor_backend: ray",
        "gpu_ids: [0, 1], tensor_parallel_size: 4, nnodes: 2",
        "gpu_ids: [0, 1], tensor_parallel_size: 2, data_parallel_size: 4, data_parallel_rank: 1",
        "gpu_ids: [0], data_parallel_size: 2, data_parallel_size_local: 1",
        "gpu_ids: [], tensor_parallel_size: 4",
        "tensor_parallel_size: 4",
    ],
)
def test_gpus_that_suffice(keys: str) -> None:
    assert planned(f", {keys}")


# --- bad ones

WORKER = "model_name: a, model_path: ./m"
GPUS = "GPU numbers or UUIDs, all different, such as [0,1] or 0,1 or GPU-8932f937"
# The file, and what a person should be told of it, with line and column.
BAD = {
    "": ["1:1: there is nothing in it (server_settings:, managed_workers:)"],
    "- a": ["1:1: expected sections (server_settings:, managed_workers:)"],
    "a: [1": ["1:6: not YAML: expected ',' or ']', but got '<stream end>'"],
    "managed_workers:\n\t- a": ["2:1: not YAML: found character '\\t' that cannot start any token"],
    "manged_workers: []": [
        "1:1: manged_workers: no such section (did you mean managed_workers?)",
        "1:1: managed_workers: expected a list of at least one worker",
    ],
    "managed_workers: []": ["1:1: managed_workers: expected a list of at least one worker"],
    "managed_workers: {a: 1}": ["1:1: managed_workers: expected a list of at least one worker"],
    "managed_workers: [a]": ["1:19: a worker: expected keys and values, such as model_name: NAME"],
    "managed_workers:\n- {model_name: a}": [
        "2:3: a: model_path is missing",
        "2:3: a: port is missing",
    ],
    f"managed_workers:\n- {{{WORKER}, port: high}}": [
        "2:36: a: port: input should be a valid integer (it is 'high')"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 70000}}": [
        "2:36: a: port: input should be less than or equal to 65535 (it is 70000)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: true}}": [
        "2:36: a: port: expected a number (it is true)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, backend: tgi}}": [
        "2:45: a: backend: input should be 'vllm' (it is 'tgi')"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, xyz: 2}}": [
        "2:45: a: xyz: unknown key (did you mean y?)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, gpu_ids: -1}}": [
        f"2:45: a: gpu_ids: expected {GPUS} (it is -1)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, gpu_ids: [a]}}": [
        f"2:45: a: gpu_ids: expected {GPUS}"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, gpu_ids: [0], tensor_parallel_size: 4}}": [
        "2:45: a: gpu_ids has 1 of the 4 GPUs (tensor_parallel_size 4 needs 4)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, gpu_ids: [0, GPU-a], tensor-parallel-size: 2, "
    "pipeline_parallel_size: 2, data_parallel_size: 2}": [
        "2:45: a: gpu_ids has 2 of the 8 GPUs (tensor_parallel_size 2 times "
        "pipeline_parallel_size 2 times data_parallel_size 2 needs 8)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, port: 2}}": [
        "2:45: port stands here twice (first in line 2)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, lifecycle: {{stop: {{drian: 1}}}}}}": [
        "2:64: a: lifecycle: stop.drian: unknown key (did you mean drain?)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1}}\nlifecycle: {{stop: {{drain: -1}}}}": [
        "3:20: lifecycle: stop.drain: input should be greater than or equal to 0 (it is -1)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, env: {{A: [true]}}}}": [
        "2:51: a: env.A: input should be a valid string"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, replace: never}}": [
        "2:45: a: replace: input should be 'after' or 'before' (it is 'never')"
    ],
    "managed_workers:\n- {model_name: a, port: 1, model_path: ./no-such-model}": [
        "2:28: a: model_path ./no-such-model: no such file or directory (check the path; a model "
        "of a hub is written ORG/NAME)"
    ],
    "managed_workers:\n- {model_name: a, port: 1, model_path: ./empty}": [
        "2:28: a: model_path ./empty: no readable config.json in it (give the directory that holds "
        "the model's config.json)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1}}\n- {{{WORKER}, port: 2}}": [
        "3:4: a: two workers have this name (the worker in line 2 has it, too; give one of them "
        "another name:)"
    ],
    "server_settings: {gateway_address: '127.0.0.1:1'}\ndefaults: {model_path: ./m}\n"
    "managed_workers:\n- {name: x, model_name: a, port: 1}\n- {name: y, model_name: a, port: 2}": [
        "5:13: y: the Gateway 127.0.0.1:1 would refuse a second worker for the model name a (the "
        "worker in line 4 has it, too)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, advertise_host: 0.0.0.0}}": [
        "2:45: a: advertise_host: 0.0.0.0 means every interface: expected one that "
        "others can reach (it is '0.0.0.0')"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, advertise_port: 0}}": [
        "2:45: a: advertise_port: input should be greater than or equal to 1 (it is 0)"
    ],
    "defaults: {model_path: ./m}\nmanaged_workers:\n- {model_name: a, port: 8001}\n"
    "- {model_name: b, port: 8001}": ["4:19: b: port: 8001 is taken by a: port (see line 3)"],
    "defaults: {model_path: ./m}\nmanaged_workers:\n- {model_name: a, port: 8001}\n"
    "- {model_name: b, port: 8002, control_port: 8001}": [
        "4:31: b: control_port: 8001 is taken by a: port (see line 3)"
    ],
    "defaults: {model_path: ./m, host: 0.0.0.0}\n"
    "managed_workers:\n- {model_name: a, port: 14000}": [
        "3:19: a: port: 14000 is taken by fleet: port (see line 1)"
    ],
    "defaults: {model_path: ./m, gpu_ids: [0]}\nmanaged_workers:\n- {model_name: a, port: 1}\n"
    "- {model_name: b, port: 2}": [
        "1:29: b: GPU 0 is given to a, b, which ask for 1.84 of its memory (lower "
        "gpu_memory_utilization to 1 in all, or say share_gpus: true in each)"
    ],
    f"defaults: {{port: 1}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:12: defaults: port is each worker's own"
    ],
    f"managed_workers:\n- {{{WORKER}, port: ${{PORT}}}}": [
        "2:43: not YAML: expected ',' or '}', but got '{' (within {…} and […] quote it: "
        '"${NAME}")'
    ],
    "managed_workers:\n- model_name: a\n  model_path: ./m\n  port: ${NO_SUCH}": [
        "4:9: ${NO_SUCH}: there is no such environment variable (set it, or write "
        "${NO_SUCH:-DEFAULT})",
    ],
    "server_settings: {port: 8001}\ndefaults: {model_path: ./m}\n"
    "managed_workers:\n- {model_name: a, port: 8001}": [
        "4:19: a: port: 8001 is taken by the Gateway (see line 1)"
    ],
    "defaults: {model_path: ./m, uds: /tmp/a}\nmanaged_workers:\n- {model_name: a, port: 1}\n"
    "- {model_name: b, port: 2}": ["1:29: b: uds: /tmp/a is taken by a: uds (see line 1)"],
    f"managed_workers:\n- {{{WORKER}, port: 1, env: {{A=B: x}}}}": [
        "2:51: a: env.A=B.[key]: string should match pattern '^[A-Za-z_][A-Za-z0-9_]*$'"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, ssl_certfile: no.pem}}": [
        "2:45: a: ssl_certfile: no.pem cannot be read"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, stop: &a [*a]}}": ["2:51: it contains itself"],
    f"managed_workers:\n- {{{WORKER}, port: 1, uds: [5]}}": ["2:45: a: uds: expected a path"],
    f"managed_workers:\n- {{{WORKER}, port: 1, ssl_keyfile: [x]}}": [
        "2:45: a: ssl_keyfile: expected a path"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, control_port: 14000}}": [
        "2:45: a: control_port: 14000 is taken by fleet: port (see line 1)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, x: !!bool maybe}}": [
        "2:48: 'maybe' is not true or false"
    ],
    f"managed_workers:\n- &a {{{WORKER}, port: 1, <<: *a}}": ["2:3: it contains itself"],
    f"fleet: {{watchdog: .inf}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:9: fleet: watchdog: input should be a finite number (it is inf)"
    ],
    f"fleet: {{watchdog: 1e-9}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:9: fleet: watchdog: it has to be 0, or at least 1 s (it is '1e-9')"
    ],
    f"fleet: {{restart: {{backoff: 1e-9}}}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:19: fleet: restart.backoff: input should be greater than or equal to 0.01 (it is '1e-9')"
    ],
    f"fleet: {{restart: {{window: 0.5}}}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:19: fleet: restart.window: input should be greater than or equal to 1 (it is 0.5)"
    ],
    f"managed_workers:\n- {{{WORKER}, port: 1, heartbeat_interval: 0.001}}": [
        "2:45: a: heartbeat_interval: input should be greater than or equal to 0.01 (it is 0.001)"
    ],
    f"fleet: {{restart: {{max: 5000}}}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:19: fleet: restart.max: input should be less than or equal to 1000 (it is 5000)"
    ],
    f"fleet: {{tokn: a}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:9: fleet: tokn: unknown key (did you mean token?)"
    ],
    f"fleet: {{max_parallel_starts: 0}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}": [
        "1:9: fleet: max_parallel_starts: input should be greater than or equal to 1 (it is 0)"
    ],
}


@pytest.mark.parametrize(("text", "expected"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_file_is_told_as_a_person_would_want_it(text: str, expected: list[str]) -> None:
    Path("empty").mkdir()
    assert told(text) == expected


def test_a_key_of_the_gateways_that_looks_like_a_slip_is_a_doubt() -> None:
    """It may well be one of its own."""
    text = f"server_settings: {{prot: 1}}\nmanaged_workers:\n- {{{WORKER}, port: 1}}"
    (doubt,) = reading(text).doubts
    assert doubt.told(Path("f")) == (
        "f:1:19: warning: server_settings: unknown key prot (did you mean port?)"
    )


@pytest.mark.parametrize(
    ("worker", "place", "shown"),
    [
        ("port: 1", "3:4", "127.0.0.1"),
        ("port: 1, host: localhost", "3:45", "localhost"),
        ("port: 1, uds: /run/a", "3:45", "/run/a"),
        ("port: 1, host: 0.0.0.0, advertise_host: '::1'", "3:60", "::1"),
    ],
)
def test_a_worker_that_a_far_gateway_cannot_reach_is_a_doubt(
    worker: str, place: str, shown: str
) -> None:
    """It was advertised as 127.0.0.1, and the Gateway routed to itself."""
    text = (
        "server_settings: {gateway_address: 'http://u:word@gateway.example:4000'}\n"
        f"managed_workers:\n- {{{WORKER}, {worker}}}"
    )
    doubt, *_ = reading(text).doubts  # the file is readable by all, too
    assert doubt.told(Path("f")).startswith(f"f:{place}: warning: a: the Gateway http://***@gate")
    assert f"cannot reach {shown} (host: 0.0.0.0, or advertise_host: " in doubt.told(Path("f"))


@pytest.mark.parametrize(
    ("gateway", "worker"),
    [
        ("127.0.0.1:4000", "port: 1"),
        ("localhost:4000", "port: 1, uds: /run/a"),
        ("gateway.example:4000", "port: 1, host: 0.0.0.0"),
        ("gateway.example:4000", "port: 1, host: 10.0.0.7"),
        ("gateway.example:4000", "port: 1, advertise_host: w.example"),
    ],
)
def test_a_worker_that_its_gateway_can_reach_is_none(gateway: str, worker: str) -> None:
    text = (
        f"server_settings: {{gateway_address: '{gateway}'}}\n"
        f"managed_workers:\n- {{{WORKER}, {worker}}}"
    )
    assert reading(text).doubts == ()


def test_thirty_of_them() -> None:
    assert len(BAD) >= 30


def test_all_that_is_wrong_is_told_at_once() -> None:
    text = (
        "lifecycle: {stop: {drain: -1}}\nmanaged_workers:\n- {model_name: a, port: x}\n"
        "- {model_name: b, model_path: ./m, hsot: 1}\n"
        "- {model_name: c, model_path: ./no, port: 1}\n"
        "- {model_name: d, model_path: ./m, port: 1, xyz: 1}\n"
    )
    assert told(text) == [
        "1:20: lifecycle: stop.drain: input should be greater than or equal to 0 (it is -1)",
        "3:3: a: model_path is missing",
        "3:19: a: port: input should be a valid integer (it is 'x')",
        "4:3: b: port is missing",
        "5:19: c: model_path ./no: no such file or directory (check the path; a model of a hub is "
        "written ORG/NAME)",
        "6:36: d: port: 1 is taken by c: port (see line 5)",
        "6:45: d: xyz: unknown key (did you mean y?)",
    ]


def test_what_is_in_a_certificates_files_is_part_of_a_plan_and_no_reason_to_replace() -> None:
    files = ["cert.pem", "key.pem", "ca.pem"]
    for name in files:
        Path(name).write_text(CERTIFICATE.read_text() + name)
    keys = ", ssl_certfile: cert.pem, ssl_keyfile: key.pem, ssl_ca_certs: ca.pem"
    first = planned(keys)
    Path("cert.pem").touch()
    assert planned(keys).certificate_digest == first.certificate_digest != ""
    for name in files:
        Path(name).write_text(CERTIFICATE.read_text() + "another one")
        next_one = planned(keys)
        assert next_one.certificate_digest != first.certificate_digest
        assert next_one == first
        first = next_one
    Path("key.pem").unlink()
    assert planned("").certificate_digest == ""


@pytest.mark.parametrize(
    ("keys", "key", "part"),
    [
        ("ssl_keyfile: key.pem", "ssl_keyfile", "a key without a certificate"),
        ("ssl_certfile: encrypted.pem", "ssl_certfile", "passphrase"),
        ("ssl_certfile: key.pem, ssl_cert_reqs: 5", "ssl_cert_reqs", "expected 0"),
        ("ssl_certfile: key.pem, ssl_ciphers: none", "ssl_ciphers", "cannot be used"),
        ("ssl_certfile: m/config.json, ssl_keyfile: key.pem", "ssl_certfile", "cannot be used"),
    ],
)
def test_tls_that_a_worker_could_not_speak_is_told_of_at_its_key(
    keys: str, key: str, part: str
) -> None:
    """The supervisor speaks it first, in the worker's place."""
    Path("key.pem").write_text(CERTIFICATE.read_text())
    Path("encrypted.pem").write_text(ENCRYPTED.read_text())
    text = f"managed_workers:\n- {{{WORKER}, port: 1, {keys}}}\n"
    (found,) = told(text)
    assert part in found
    at = text.splitlines()[1].index(f"{key}:") + 1
    assert found.startswith(f"2:{at}: a: --{key.replace('_', '-')}")


def test_a_certificate_with_its_key_is_one_file() -> None:
    Path("both.pem").write_text(CERTIFICATE.read_text())
    assert planned(", ssl_certfile: both.pem").certificate == ("both.pem", None)


def test_the_headers_that_vllm_adds_are_part_of_a_plan() -> None:
    headers = AnswerHeaders(allowed_origins=("https://a",))

    def answer(questions: Sequence[Question]) -> list[Answer]:
        return [Answer((), (), headers)]

    Path("configs.yaml").write_text(
        "managed_workers:\n  - {model_name: a, model_path: ./m, port: 8001}\n"
    )
    assert read_plans(Path("configs.yaml"), {}, answer).plans[0].answer_headers == headers


def test_the_names_of_a_workers_port_are_part_of_its_plan() -> None:
    """The supervisor answers there while the worker is absent."""
    assert planned("").hosts == ()
    assert planned(", lifecycle: {http: {hosts: [models.corp]}}").hosts == ("models.corp",)


def test_no_value_of_a_secret_is_told() -> None:
    text = (
        "fleet: {token: [83729472]}\n"
        "managed_workers:\n- model_name: a\n  model_path: ./m\n  port: ${KEY}\n"
        "  env: {HF_TOKEN: [83729472]}\n  lifecycle: {stop: {drain: '${KEY}'}}\n"
        "- {model_name: {k: '${KEY}'}, model_path: ['${KEY}'], port: 3, xsecret: '${KEY}'}\n"
    )
    found = told(text, {"KEY": "x83729472"})
    assert len(found) == 6
    assert "83729472" not in "".join(found)


@pytest.mark.parametrize(
    ("held", "value"),
    [
        *(("8", 8), ("0.5", 0.5), ("true", True), ("false", False), ("text", "text")),
        *((text, text) for text in ("1_000", "0x1f", "on", "1:30", "00123", "~", "2024-05-01")),
    ],
)
def test_what_a_variable_holds_is_a_number_only_where_it_is_written_like_one(
    held: str, value: Any
) -> None:
    ((key, found),) = planned_words("revision: ${HELD}", {"HELD": held})
    assert (key, found) == ("revision", held), "its text is kept for a key that wants text"
    assert getattr(found, "value", found) == value


def planned_words(line: str, environment: Mapping[str, str]) -> list[tuple[str, Any]]:
    """A key of vLLM's as its parser is asked for it."""
    return list(question_of(line, environment).keys.items())


def question_of(line: str, environment: Mapping[str, str]) -> Question:
    asked: list[Question] = []

    def note(questions: Sequence[Question]) -> list[Answer]:
        asked.extend(questions)
        return [Answer((), ())]

    path = Path("configs.yaml")
    text = f"managed_workers:\n- model_name: a\n  model_path: ./m\n  port: 1\n  {line}\n"
    path.write_text(text, encoding="utf-8")
    read_plans(path, environment, note)
    return asked[0]


def test_vllm_is_asked_with_the_variables_that_the_worker_will_have() -> None:
    assert question_of("env: {VLLM_CPU_KVCACHE_SPACE: 1}", {}).env == {
        "VLLM_CPU_KVCACHE_SPACE": "1"
    }


@pytest.mark.parametrize("key", ["gpu_memory_utilization", "gpu-memory-utilization"])
def test_memory_that_a_variable_gives_counts(key: str) -> None:
    line = f"gpu_ids: [0], {key}: '${{U}}'}}\n"
    text = (
        "defaults: {model_path: ./m}\nmanaged_workers:\n"
        f"- {{model_name: a, port: 1, {line}- {{model_name: b, port: 2, {line}"
    )
    assert len(reading(text, {"U": "0.45"}).plans) == 2


def test_a_date_is_the_text_that_it_is_written_with() -> None:
    assert planned_words("revision: 2024-05-01", {}) == [("revision", "2024-05-01")]


@pytest.mark.parametrize("line", ["api_key: ${KEY}", "api_key: [sk-1]"])
def test_an_api_key_is_no_argument_that_everybody_can_read(line: str) -> None:
    environment = {"KEY": "sk-1"}
    assert planned_words(line, environment) == []
    text = f"managed_workers:\n- model_name: a\n  model_path: ./m\n  port: 1\n  {line}\n"
    (plan,) = reading(text, environment).plans
    assert plan.env == {"VLLM_API_KEY": "sk-1"}
    assert "sk-1" not in " ".join(plan.argv)


def test_names_of_any_script_are_names() -> None:
    text = (
        "defaults: {model_path: ./m}\nmanaged_workers:\n- {model_name: 千问, port: 1}\n"
        "- {model_name: 文心, port: 2}"
    )
    assert [plan.name for plan in reading(text).plans] == ["千问", "文心"]


def test_a_file_that_is_not_there_is_another_error() -> None:
    with pytest.raises(InputMissingError, match="No such file"):
        read_plans(Path("none.yaml"), os.environ, ask)


def test_what_the_parser_says_of_all_keys_together_is_told_where_its_flag_stands() -> None:
    def complain(questions: Sequence[Question]) -> list[Answer]:
        wrong = WrongKey(None, "argument --max-model-len: cannot be 0", None)
        return [Answer((), (wrong,)) for _ in questions]

    path = Path("configs.yaml")
    path.write_text(
        "managed_workers:\n- model_name: a\n  model_path: ./m\n  port: 1\n  max_model_len: 0\n"
    )
    with pytest.raises(BadFileError) as caught:
        read_plans(path, {}, complain)
    assert caught.value.told == [f"{path}:5:3: a: argument --max-model-len: cannot be 0"]


def test_a_value_that_a_variable_gives_is_not_told_where_the_parser_says_it() -> None:
    def complain(questions: Sequence[Question]) -> list[Answer]:
        wrong = WrongKey(None, "argument --max-model-len: invalid value: s3cret", None)
        return [Answer((), (wrong,)) for _ in questions]

    path = Path("configs.yaml")
    path.write_text(
        "managed_workers:\n- model_name: a\n  model_path: ./m\n  port: 1\n  max_model_len: ${X}\n"
    )
    with pytest.raises(BadFileError) as caught:
        read_plans(path, {"X": "s3cret"}, complain)
    assert caught.value.told == [
        f"{path}:5:3: a: max_model_len: vLLM's parser does not take its value"
    ]


def test_an_unknown_key_is_told_as_one_whatever_gives_its_value() -> None:
    text = "managed_workers:\n- model_name: a\n  model_path: ./m\n  port: 1\n  xyz: ${X}\n"
    assert told(text, {"X": "s3cret"}) == ["5:3: a: xyz: unknown key (did you mean y?)"]


# --- the schema, and the commands


def keys_in(schema: Mapping[str, Any], name: str) -> set[str]:
    found = schema["properties"][name]
    found = found.get("items", found)
    return set(schema["$defs"][found["$ref"].rpartition("/")[2]]["properties"])


def test_the_schema_has_every_key_of_the_example_that_has_everything() -> None:
    schema = file_schema()
    written = yaml.safe_load((CONFIGS / "everything.yaml").read_text(encoding="utf-8"))
    assert set(written) == set(schema["properties"])
    assert set(written["fleet"]) | {"uds", "token"} == keys_in(schema, "fleet")
    assert set(written["server_settings"]) == keys_in(schema, "server_settings")
    vllms = {"enable_prefix_caching", "speculative_config"}
    assert set(written["managed_workers"][0]) - vllms == keys_in(schema, "managed_workers")


@functools.cache
def validator() -> Any:
    """The schema, itself looked at once: that takes longer than all examples."""
    schema = file_schema()
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_fit_the_schema(name: str) -> None:
    written = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    validator().validate(written)


@pytest.mark.parametrize(
    "text",
    [
        text
        for text in BAD
        if "it is" in BAD[text][0] and ".inf" not in text and "every interface" not in BAD[text][0]
    ],
)
def test_the_schema_knows_what_is_wrong_with_a_value(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(yaml.safe_load(text))


def test_check_tells_what_is_fine_and_what_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(read_plans, "__defaults__", (ask,))
    path = Path("configs.yaml")
    path.write_text(
        "managed_workers:\n- {model_name: a, model_path: ./m, port: 1, gpu_ids: [0, 1]}"
    )
    assert command("check", str(path)) == 0
    assert capsys.readouterr().out == "a: a on 127.0.0.1:1, GPU 0, 1\n"
    path.write_text("managed_workers:\n- {model_name: a, model_path: ./m, prot: 1}")
    assert command("check", str(path)) == 2
    assert capsys.readouterr().err.splitlines() == [
        "configs.yaml:2:3: a: port is missing",
        "ichat-lifecycle: error: configs.yaml: 1 problem",
    ]
    assert command("check", "none.yaml") == 66


def test_check_without_vllm_says_what_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(questions: Sequence[Question]) -> list[Answer]:
        raise NoEngineError("vLLM is not installed")

    monkeypatch.setattr(read_plans, "__defaults__", (nobody,))
    Path("configs.yaml").write_text("managed_workers:\n- {model_name: a, model_path: ./m, port: 1}")
    assert command("check", "configs.yaml") == 0
    assert "vLLM's arguments are not checked: vLLM is not installed" in capsys.readouterr().out


def command(*argv: str) -> int:
    args = build_parser().parse_args(argv)
    return int(args.run(args, []))


def test_gpu_ids_too_deep_for_the_json_parser_are_a_clear_error() -> None:
    with pytest.raises(ValueError, match="GPU numbers or UUIDs"):
        parse_gpu_ids("[" * 100_000)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('api_key: "s3\\ncret"', "a: api_key cannot be sent"),
        ('api_key: [fine, "s3cr\u00e9t"]', "a: api_key cannot be sent"),
        ('hf_token: "s3\\tcret"', "a: hf_token cannot be sent"),
        ("env: {HF_TOKEN: s3cr\u00e9t}", "a: env: HF_TOKEN cannot be sent"),
        (
            'env: {ICHAT_LIFECYCLE_CONTROL_TOKEN: " "}',
            "a: env: ICHAT_LIFECYCLE_CONTROL_TOKEN holds",
        ),
    ],
)
def test_a_key_that_cannot_be_sent_is_wrong_and_not_shown(line: str, what: str) -> None:
    text = f"managed_workers:\n- model_name: a\n  model_path: ./m\n  port: 1\n  {line}\n"
    with pytest.raises(BadFileError) as caught:
        reading(text)
    (told,) = caught.value.told
    assert f":5:{3 if 'env' not in line else 9}: {what}" in told
    assert "cr\u00e9t" not in told
    assert "cret" not in told


def test_a_fleets_token_that_cannot_be_sent_is_wrong_and_not_shown() -> None:
    worker = "managed_workers: [{model_name: a, model_path: ./m, port: 1}]"
    with pytest.raises(BadFileError) as caught:
        reading(f'fleet: {{token: "s3\\ncret"}}\n{worker}')
    (told,) = caught.value.told
    assert ":1:9: fleet: token cannot be sent" in told
    assert "cret" not in told


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("line", ["hf_token: hf-literal", "hf_token: '${HF}'", "seed: 12345"])
def test_secrets_in_a_file_that_all_can_read_are_a_doubt(mode: int, line: str) -> None:
    path = Path("configs.yaml")
    path.write_text(f"managed_workers: [{{model_name: a, model_path: ./m, port: 1, {line}}}]")
    path.chmod(mode)
    found = [doubt.told(path) for doubt in read_plans(path, {"HF": "hf-secret"}, ask).doubts]
    assert ("there are secrets in it" in "".join(found)) == (mode == 0o644 and "hf-literal" in line)


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("hf_token: hf-secret-1", "--hf-token"),
        ("api_key: [hf-secret-1, hf-secret-2]", "--api-key"),
        ("gateway_address: 'http://me:hf-secret-1@127.0.0.1:1'", "--gateway-address http://me:"),
        ("kv_transfer_config: {token: hf-secret-1}", "--kv-transfer-config"),
    ],
)
def test_no_secret_is_a_word_that_everybody_can_read(line: str, secret: str) -> None:
    plan = planned(f", {line}")
    assert "hf-secret" not in " ".join(plan.argv) + repr(plan)
    assert secret in " ".join(plan.secret_argv)
