"""The files in configs/ and the README's tables say what the code does."""

from __future__ import annotations

import argparse
import asyncio
import configparser
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from fastapi.routing import APIRoute
from stand_ins import FakeLife
from tools import of_the_system

from ichat_lifecycle import docs
from ichat_lifecycle.adapters.last_resort import MARGIN_S, TELLING_S
from ichat_lifecycle.adapters.sd_notify import EXTEND_BY_S, EXTEND_EVERY_S
from ichat_lifecycle.arguments import ALIASES, GPU_IDS
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.config import TOKEN_VARIABLE, Settings, load_settings
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.desk import LoopDesk
from ichat_lifecycle.control.events import Events
from ichat_lifecycle.control.page.probes import Samples
from ichat_lifecycle.errors import PERMANENT, ExitCode
from ichat_lifecycle.journal import Journal
from ichat_lifecycle.preflight import scan
from ichat_lifecycle.states import State

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STATES = (ROOT / "states.md").read_text(encoding="utf-8")
LIFECYCLE_YAML = ROOT / "configs/lifecycle.yaml"

DEFAULTS: dict[str, dict[str, Any]] = Settings().model_dump(mode="json")


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell without its backticks."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    # A pipe within a cell would be written \|, and there is none.
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def serve_flags() -> dict[str, argparse.Action]:
    """Our own flags of `serve` with what argparse knows of them."""
    commands = next(a for a in build_parser()._actions if isinstance(a.choices, dict))
    serve = cast(dict[str, argparse.ArgumentParser], commands.choices)["serve"]
    return {a.option_strings[-1]: a for a in serve._actions if a.dest != "help"}


# configs/lifecycle.yaml ---------------------------------------------------------------------------


def test_the_example_settings_load_and_are_the_defaults() -> None:
    assert load_settings(LIFECYCLE_YAML) == Settings()


def test_the_example_settings_have_every_key_in_the_codes_order() -> None:
    written = yaml.safe_load(LIFECYCLE_YAML.read_text(encoding="utf-8"))
    assert [(s, list(keys)) for s, keys in written.items()] == [
        (s, list(keys)) for s, keys in DEFAULTS.items()
    ]


def test_each_example_setting_says_what_it_is_and_times_their_unit() -> None:
    section, seen = "", 0
    for line in LIFECYCLE_YAML.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\w+):$", line):
            section = found[1]
        elif found := re.match(r"  (\w+):[^#]+# (.+)$", line):
            key, comment = found.groups()
            assert comment.startswith("seconds; ") == is_time(section, key), line
            seen += 1
    assert seen == sum(map(len, DEFAULTS.values()))


def is_time(section: str, key: str) -> bool:
    declared: Any = Settings.model_fields[section].annotation
    return declared.model_fields[key].annotation is float


def test_the_examples_of_warm_up_requests_are_ones() -> None:
    text = LIFECYCLE_YAML.read_text(encoding="utf-8").split("# extra:\n")[1]
    block = text.split("\n\n")[0]
    lines = [line.removeprefix("  #") for line in block.splitlines()]
    extra = yaml.safe_load("\n".join(lines))
    settings = Settings.model_validate({"warm_up": {"extra": extra}})
    assert [r.name for r in settings.warm_up.extra] == ["chat", "JSON schema", "log probabilities"]
    assert [r.required for r in settings.warm_up.extra] == [True, True, False]


def test_the_example_settings_name_the_bound_on_a_stop() -> None:
    assert f"{Settings().stop_bound:g} s" in LIFECYCLE_YAML.read_text(encoding="utf-8")


# configs/kubernetes-worker.yaml -------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    pod = yaml.safe_load((ROOT / "configs/kubernetes-worker.yaml").read_text(encoding="utf-8"))
    return cast(dict[str, Any], pod["spec"])


@pytest.fixture
def container(spec: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], spec["containers"][0])


def test_the_pods_grace_period_is_longer_than_the_longest_stop(spec: dict[str, Any]) -> None:
    after_s = MARGIN_S + TELLING_S
    before_s = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    left_s = spec["terminationGracePeriodSeconds"] - before_s
    assert left_s > Settings().stop_bound + after_s
    sentence = f"plus {after_s:g} s: {left_s:g} for"
    assert sentence in flat(README)
    assert f"{Settings().stop_bound:g} s" in flat(README)


def test_the_pods_arguments_are_ours_or_vllms(container: dict[str, Any]) -> None:
    args, rest = build_parser().parse_known_args([*container["command"][1:], *container["args"]])
    assert args.command == "serve"
    assert args.control_host == "0.0.0.0"  # the kubelet is not on the loopback interface
    known = (*ALIASES, "--host", "--port", "--served-model-name")
    assert {flag.partition("=")[0] for flag in rest} <= set(known)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["control"] == args.control_port
    assert f"--port={ports['api']}" in rest
    assert container["env"][0]["name"] == TOKEN_VARIABLE
    # Else the shipped Pod would be warned of probes that it does not have.
    assert load_settings(None, args.set).http.model_fields_set == {"health", "models"}


def test_the_pods_probes_ask_the_control_plane_by_their_meaning(container: dict[str, Any]) -> None:
    asked = {
        probe: container[probe]["httpGet"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert {get["port"] for get in asked.values()} == {"control"}
    assert [get["path"] for get in asked.values()] == ["/startupz", "/readyz", "/livez"]
    assert {f"GET {get['path']}" for get in asked.values()} <= routes()


def test_the_pods_start_may_take_as_long_as_the_worker_allows(container: dict[str, Any]) -> None:
    """Else Kubernetes kills a slow start before the worker can say what was slow."""
    probe = container["startupProbe"]
    start = Settings().start
    longest_s = (
        start.arguments_timeout
        + 4 * start.bind_timeout  # control plane, heartbeat, bind, become_ready
        + start.engine_timeout
        + start.serve_timeout
        + start.ready_timeout
    )
    assert probe["periodSeconds"] * probe["failureThreshold"] > longest_s


# systemd ------------------------------------------------------------------------------------------


@pytest.fixture
def service() -> dict[str, str]:
    unit = configparser.ConfigParser(delimiters="=", interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # its own documented way
    unit.read(ROOT / "configs/ichat-lifecycle-worker.service")
    return dict(unit["Service"])


def test_the_units_stop_may_take_as_long_as_the_worker_needs(service: dict[str, str]) -> None:
    longest_s = Settings().stop_bound + MARGIN_S + TELLING_S
    assert longest_s < float(service["TimeoutStopSec"]) < longest_s + 5


def test_the_units_limits_leave_time_to_ask_for_more(service: dict[str, str]) -> None:
    assert float(service["TimeoutStartSec"]) > 2 * EXTEND_EVERY_S
    assert EXTEND_BY_S > 2 * EXTEND_EVERY_S


def test_the_unit_starts_again_what_is_worth_it(service: dict[str, str]) -> None:
    codes = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert codes == PERMANENT


def test_the_units_command_is_one_of_ours(service: dict[str, str]) -> None:
    program, *words = service["ExecStart"].split()
    assert Path(program).name == "ichat-lifecycle"
    args, rest = build_parser().parse_known_args(words)
    assert args.command == "serve"
    assert scan(args, rest).model == "/models/demo"


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = (ROOT / "configs/ichat-lifecycle-worker.service").read_text(encoding="utf-8")
    unit = tmp_path / "ichat-lifecycle-worker.service"
    # It looks whether the program is there.
    unit.write_text(text.replace("/opt/ichat/.venv/bin/ichat-lifecycle", sys.executable))
    program = of_the_system("systemd-analyze", "systemd")
    done = subprocess.run([program, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# The README ---------------------------------------------------------------------------------------


def flat(text: str) -> str:
    """The text as one line: where a paragraph wraps does not matter."""
    return " ".join(text.split())


def routes() -> set[str]:
    """Each route of the control plane, as METHOD PATH."""
    nobody = cast(Any, None)
    desk = LoopDesk(nobody, nobody, asyncio.get_event_loop)
    app = build_control_app(
        FakeLife(),
        nobody,
        engine=desk,
        events=Events(nobody, "", nobody),
        metrics=bytes,
        samples=Samples(Journal()),
    )
    found = [route for route in app.routes if isinstance(route, APIRoute)]
    return {f"{method} {r.path}" for r in found for method in r.methods or () if method != "HEAD"}


def test_the_readme_has_every_flag_of_ours_with_its_default_and_no_other() -> None:
    table = {flag: cells for flag, cells in rows(README).items() if flag.startswith("--")}
    flags = serve_flags()
    assert set(table) == {*flags, *ALIASES, GPU_IDS}
    for flag, action in flags.items():
        default = table[flag][0]
        if action.default is not None:
            assert default == f"`{action.default}`", flag
        else:
            assert "`" not in default, flag
        for choice in action.choices or ():
            assert f"`{choice}`" in " ".join(table[flag]), flag


def test_the_readme_says_what_ichats_flags_stand_for() -> None:
    table = rows(README)
    for flag, attribute in ALIASES.items():
        assert table[flag] == [f"`--{attribute.replace('_', '-')}`"]


def test_the_readme_names_where_the_token_may_come_from() -> None:
    assert TOKEN_VARIABLE in rows(README)["--control-token"][1]


def test_the_readme_has_every_exit_code_and_no_other() -> None:
    codes = {code for code in rows(README) if code.isdecimal()}
    assert codes == {str(int(code)) for code in ExitCode}


def test_the_readme_has_every_route_of_the_control_plane_and_no_other() -> None:
    table = {first for first in rows(README) if first.startswith(("GET /", "POST /"))}
    assert table == routes()


def test_the_readmes_settings_exist_and_have_these_defaults() -> None:
    dotted = {
        name: cells[0] for name, cells in rows(README).items() if re.match(r"\w+\.\w+$", name)
    }
    assert len(dotted) >= 5
    for name, default in dotted.items():
        section, _, key = name.partition(".")
        written = yaml.safe_load(default.removesuffix(" s").strip("`"))
        assert written == DEFAULTS[section][key], name


@pytest.mark.parametrize("text", [README, STATES], ids=["README.md", "states.md"])
def test_every_setting_that_is_named_exists(text: str) -> None:
    named = re.findall(rf"`({'|'.join(DEFAULTS)})\.(\w+)", text)
    assert named
    unknown = [f"{s}.{key}" for s, key in named if key not in DEFAULTS[s] and key != "md"]
    assert unknown == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    for name in ("README.md", "states.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
        assert missing == [], name


# states.md ----------------------------------------------------------------------------------------


def test_states_md_has_not_drifted() -> None:
    assert docs.check(ROOT / "states.md") is None


def test_states_md_has_a_section_on_every_state() -> None:
    sections = re.findall(r"^### (\w+)$", STATES, re.MULTILINE)
    assert sections == [state.value for state in State]
