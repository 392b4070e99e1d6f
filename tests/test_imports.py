"""Who may import whom; and what importing us costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ichat_lifecycle

PACKAGE = Path(ichat_lifecycle.__file__).parent
NAME = PACKAGE.name
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
# Functions whose string arguments name modules.
IMPORTERS = {"import_module", "__import__", "find_spec", "_import"}
HEAVY = ("fastapi", "starlette", "uvicorn", "structlog", "jinja2", "torch", "transformers", "vllm")
HEAVY_FOR_A_PARSER = ("httpx", "rich", "psutil")


def imported(source: str, package: str) -> Iterator[str]:
    """Full names of all modules that a source imports, at any depth and by any means."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in IMPORTERS:
                yield from (
                    argument.value
                    for argument in node.args
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                )


@cache
def imports_of(name: str) -> set[str]:
    package = ".".join([NAME, *Path(name).parent.parts])
    return set(imported(FILES[name].read_text(encoding="utf-8"), package))


def importers_of(*roots: str) -> set[str]:
    """Files that import one of these top-level packages."""
    return {n for n in FILES if any(m.partition(".")[0] in roots for m in imports_of(n))}


def vllm_strings(name: str) -> set[str]:
    """String constants that are the dotted name of a module of vLLM's."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    strings = {c for c in constants if isinstance(c, str)}
    return {s for s in strings if s.startswith("vllm.") and s.replace(".", "").isidentifier()}


def may(name: str, *places: str) -> bool:
    return any(Path(name).match(place) for place in places)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("def f():\n    from a import b", {"a.b"}),
        ("from . import x\nfrom .y import z\nfrom ..w import v", {"p.q.x", "p.q.y.z", "p.w.v"}),
        ("import importlib\nimportlib.import_module('a.b')", {"importlib", "a.b"}),
        ("find_spec('a'); __import__('b'); print('c')", {"a", "b"}),
    ],
)
def test_the_search_finds_every_kind_of_import(source: str, expected: set[str]) -> None:
    """The rules below are worth what this search is worth."""
    assert set(imported(source, "p.q")) == expected


@pytest.mark.parametrize("name", ["states.py", "errors.py", "ports.py", "printable.py"])
def test_the_foundations_import_nothing_of_ours(name: str) -> None:
    """Except the filter for what is shown, below errors, whose texts come from anywhere."""
    ours = {m for m in imports_of(name) if m.partition(".")[0] == NAME}
    assert {m for m in ours if not m.startswith(f"{NAME}.printable.")} == set()


def test_only_the_machine_imports_transitions() -> None:
    assert importers_of("transitions") == {"machine.py"}


def test_only_the_vllm_adapters_import_vllm() -> None:
    """Neither at the top, nor in a function, nor by a string, nor by a name kept as data."""
    offenders = {n for n in importers_of("vllm") if not may(n, "adapters/vllm_*.py")}
    assert offenders == set()
    named = {n: s for n in FILES if (s := vllm_strings(n)) and not may(n, "adapters/vllm_*.py")}
    assert named == {}
    assert "adapters/vllm_layout.py" in importers_of("vllm"), "the search finds what is there"


def test_only_adapters_and_control_import_the_web() -> None:
    web = importers_of("uvicorn", "fastapi", "starlette")
    places = ("adapters/*.py", "control/*.py", "control/page/routes.py")
    assert {n for n in web if not may(n, *places)} == set()
    assert "adapters/uvicorn_server.py" in web


def test_only_two_import_the_template_engine() -> None:
    """The page's renderer, and the check of a chat template."""
    two = {"control/page/render.py", "adapters/chat_template.py"}
    assert importers_of("jinja2", "markupsafe") == two


@pytest.mark.parametrize("layer", ["states", "errors", "guards", "ports", "config", "journal"])
def test_the_core_imports_no_layer_above_it(layer: str) -> None:
    """Data and protocols know neither the machine nor any adapter."""
    above = ("machine", "actions", "lifecycle", "backend", "worker", "cli", "adapters", "control")
    ours = {m.split(".")[1] for m in imports_of(f"{layer}.py") if m.startswith(f"{NAME}.")}
    assert ours & set(above) == set()


def test_the_lifecycle_reaches_the_world_through_ports_only() -> None:
    core = ("lifecycle", "readiness", "supervision", "actions", "machine", "resources")
    for name in (f"{module}.py" for module in core):
        adapters = {m for m in imports_of(name) if m.startswith((f"{NAME}.ad", f"{NAME}.control"))}
        assert adapters == set(), name


def test_a_client_knows_of_a_worker_only_what_it_says() -> None:
    """It talks to workers of other versions, too: by documents, the table and errors alone."""
    client = [name for name in FILES if name.startswith("client/")]
    ours = {m for name in client for m in imports_of(name) if m.startswith(f"{NAME}.")}
    assert {m.split(".")[1] for m in ours} == {
        "beacon",
        "certificates",
        "client",
        "credentials",
        "diagram",
        "errors",
        "nesting",
        "printable",
        "redact",
        "short_heads",
        "slept",
        "states",
    }
    roots = {m.partition(".")[0] for name in client for m in imports_of(name)}
    assert roots & {*HEAVY, "transitions", "pydantic"} == set()
    assert {"httpx", "rich"} <= roots, "the search finds what is there"


@pytest.mark.parametrize(
    "statement",
    [
        "import ichat_lifecycle",
        "import ichat_lifecycle.cli; ichat_lifecycle.cli.build_parser()",
        "import ichat_lifecycle.__main__",
    ],
)
def test_importing_us_is_light(statement: str) -> None:
    """An engine's processes import our main module again: a heavy import would come twice."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert "ichat_lifecycle.states" in loaded
    assert loaded & {*HEAVY, *HEAVY_FOR_A_PARSER} == set()
