"""docs/coming-from.md: its values are valid, its probes and flags exist, its times add up."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_ins import FakeIdentity, FakeLife
from starlette.routing import Route

from ichat_lifecycle.adapters.last_resort import MARGIN_S, TELLING_S
from ichat_lifecycle.cli import build_parser, serve_flags
from ichat_lifecycle.config import Settings, load_settings
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.server import PORT_OFFSET
from ichat_lifecycle.shutdown_timeout import with_shutdown_timeout
from ichat_lifecycle.vllm_flags import find

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
SNIPPETS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]


def every(node: Any, key: str) -> Iterator[Any]:
    """All values that a key has, at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if name == key:
            yield value
        if isinstance(value, dict | list):
            yield from every(value, key)


def arguments(snippet: Any) -> list[str]:
    """The words that reach `serve` from one snippet."""
    words = [word for key in ("args", "extraArgs") for args in every(snippet, key) for word in args]
    for variable in every(snippet, "env"):
        words += [word for one in variable for word in shlex.split(one["value"])]
    return words


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_each_probe_asks_a_route_of_the_control_plane(snippet: Any) -> None:
    app = build_control_app(FakeLife(), FakeIdentity())
    routes = {route.path for route in app.routes if isinstance(route, Route)}
    for probe in every(snippet, "httpGet"):
        assert probe["path"] in routes
        assert probe["port"] == 8000 + PORT_OFFSET
        assert any(word.startswith("--control-host=") for word in arguments(snippet))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_each_flag_is_one_that_is_taken(snippet: Any) -> None:
    words = arguments(snippet)
    assert words
    for word in words:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or flag in serve_flags() or find(flag), flag
    args, _ = build_parser().parse_known_args(["serve", *words])
    load_settings(None, args.set or ())


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_each_grace_period_is_long_enough(snippet: Any) -> None:
    args, rest = build_parser().parse_known_args(["serve", *arguments(snippet)])
    drain = next((w.partition("=")[2] for w in rest if w.startswith("--shutdown-timeout=")), None)
    if "VLLM_ADDITIONAL_ARGS" in str(snippet):
        drain = "15"  # KServe's own
    settings = with_shutdown_timeout(load_settings(None, args.set or ()), drain)
    assert settings.stop_bound + MARGIN_S + TELLING_S <= args.grace_period


def test_the_times_of_the_page_are_those_of_the_settings() -> None:
    def longest_s(drain: int | None) -> str:
        settings = with_shutdown_timeout(Settings(), drain)
        return f"{settings.stop_bound + MARGIN_S + TELLING_S:g} s"

    fixed_s = Settings().stop_bound - Settings().stop.drain
    assert f"the drain and {fixed_s + MARGIN_S + TELLING_S:g} s" in PAGE
    assert f"({fixed_s:g} s for the other stages of a stop, {MARGIN_S + TELLING_S:g} s for" in PAGE
    for name, drain in (("production-stack", None), ("KServe", 15), ("llm-d", 45)):
        (row,) = re.findall(rf"^\| {name}.*\|$", PAGE, re.M)
        assert f"| {longest_s(drain)} |" in row
