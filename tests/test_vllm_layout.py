"""The layouts of vLLM, on packages that look like it: no vLLM is needed, none is touched."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from ichat_lifecycle.adapters.vllm_layout import (
    _IMPORT_STEPS,
    FUNCTIONS,
    METHODS,
    OPTIONAL,
    SUPPORTED_RANGE,
    Places,
    Symbol,
    installed,
    load,
)
from ichat_lifecycle.errors import ExitCode, StartError

# Which of the places of each function a layout has, newest first.
LAYOUTS: dict[str, Callable[[Places], Symbol]] = {
    "newest": lambda places: places[0],
    "middle": lambda places: places[-2] if len(places) > 2 else places[0],
    "oldest": lambda places: places[-1],
}
WITH_PARAMETERS = [name for name, places in FUNCTIONS.items() if places[0].parameters]


def function(*parameters: str) -> Callable[..., Any]:
    """A function with these parameters."""
    namespace: dict[str, Any] = {}
    exec(f"def made({', '.join(parameters)}): ...", namespace)
    made: Callable[..., Any] = namespace["made"]
    return made


class FakeVllm:
    """Modules in `sys.modules` with all that a layout asks for, and nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("torch", "transformers"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name in (*_IMPORT_STEPS, "vllm.envs"):
            self.module(name)
        self.set("vllm", "__version__", "0.31.9")
        self.set("vllm.platforms", "current_platform", "a platform")

    def lay_out(self, layout: str) -> FakeVllm:
        for places in FUNCTIONS.values():
            self.put(LAYOUTS[layout](places))
        for owner in {symbol for symbol, _ in METHODS.values()}:
            methods = {
                name: function(*parameters)
                for name, (symbol, parameters) in METHODS.items()
                if symbol == owner
            }
            self.put(owner, type(owner.name, (), methods))
        return self

    def module(self, name: str) -> types.ModuleType:
        """The module; it and its parents are made where they are missing."""
        parent, _, _ = name.rpartition(".")
        if parent:
            self.module(parent)
        if name not in sys.modules:
            made = types.ModuleType(name)
            made.__spec__ = ModuleSpec(name, None, is_package=True)
            made.__path__ = []  # nothing is found below it but what is in sys.modules
            self._monkeypatch.setitem(sys.modules, name, made)
        return sys.modules[name]

    def set(self, module: str, name: str, value: Any) -> None:
        setattr(self.module(module), name, value)

    def put(self, place: Symbol, value: Any = None) -> Any:
        made = value or function(*place.parameters)
        self.set(place.module, place.name, made)
        return made

    def lose(self, place: Symbol) -> None:
        delattr(self.module(place.module), place.name)

    def lose_module(self, name: str) -> None:
        # As Python itself marks a module that is known not to be there.
        self._monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    return FakeVllm(monkeypatch)


def refusal(code: str = "vllm_unsupported") -> str:
    """What the error says that load() ends in."""
    with pytest.raises(StartError) as caught:
        load()
    error = caught.value
    assert (error.exit_code, error.code) == (ExitCode.ENGINE_START_FAILED, code)
    assert error.hint
    if code == "vllm_unsupported":
        assert error.message.startswith("vLLM 0.31.9 is not supported: ")
        assert SUPPORTED_RANGE in error.hint
    return error.message


# --- what is found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_by_what_is_there(fake: FakeVllm, layout: str) -> None:
    """Never by the version, which a build from source chooses itself."""
    fake.lay_out(layout)
    found = load()
    assert (found.version, found.platform) == ("0.31.9", "a platform")
    assert found.envs is sys.modules["vllm.envs"]
    for name, places in FUNCTIONS.items():
        place = LAYOUTS[layout](places)
        assert getattr(found, name) is getattr(sys.modules[place.module], place.name)
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = found.no_such_function


def test_of_several_places_the_newest_is_taken(fake: FakeVllm) -> None:
    """The others are deprecated re-exports there."""
    fake.lay_out("oldest").lay_out("newest")
    newest = FUNCTIONS["build_app"][0]
    assert load().build_app is getattr(sys.modules[newest.module], newest.name)


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_older_ones_lack_is_none(fake: FakeVllm, name: str) -> None:
    fake.lay_out("oldest")
    assert getattr(load(), name) is None
    assert getattr(load(), name) is None
    made = fake.put(OPTIONAL[name][-1])
    assert getattr(load(), name) is made


def test_a_build_without_a_version_is_taken(fake: FakeVllm) -> None:
    del fake.lay_out("newest").module("vllm").__version__
    assert load().version == "unknown"


# --- what is missing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_missing_name_is_named(fake: FakeVllm, layout: str, name: str) -> None:
    """With each place where it was looked for, what is installed and what is supported."""
    places = FUNCTIONS[name]
    fake.lay_out(layout).lose(LAYOUTS[layout](places))
    said = refusal()
    assert said.endswith(" is missing")
    assert all(f"{place.module}.{place.name}" in said for place in places)


def test_a_missing_module_is_a_missing_name(fake: FakeVllm) -> None:
    place = FUNCTIONS["build_app"][0]
    fake.lay_out("newest").lose_module(place.module)
    assert f"{place.module}.build_app" in refusal()


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_a_renamed_parameter_is_named(fake: FakeVllm, name: str) -> None:
    """A call that would fail minutes later is found at the import."""
    place = FUNCTIONS[name][0]
    first, *others = place.parameters
    fake.lay_out("newest").put(place, function("renamed", *others))
    assert refusal().endswith(f": {place.name} has no parameter {first}")


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_method_is_named(fake: FakeVllm, method: str) -> None:
    owner, _ = METHODS[method]
    delattr(getattr(fake.lay_out("newest").module(owner.module), owner.name), method)
    assert refusal().endswith(f": {method} is missing")


@pytest.mark.parametrize("method", [name for name, (_, given) in METHODS.items() if given])
def test_a_methods_renamed_parameter_is_named(fake: FakeVllm, method: str) -> None:
    owner, parameters = METHODS[method]
    cls = getattr(fake.lay_out("newest").module(owner.module), owner.name)
    setattr(cls, method, function(*parameters[:-1]))
    assert refusal().endswith(f": {method} has no parameter {parameters[-1]}")


# --- no vLLM, or a broken one


@pytest.mark.parametrize("also", ["vllm", "torch", "transformers"])
def test_vllm_is_not_installed(fake: FakeVllm, also: str) -> None:
    """Without it there may be no torch either: the user is told of vLLM, and how to get it."""
    fake.lose_module(also)
    fake.lose_module("vllm")
    assert not installed()
    assert refusal("vllm_missing") == "vLLM is not installed"


@pytest.mark.parametrize("step", [step for step in _IMPORT_STEPS if step != "vllm"])
def test_a_vllm_that_cannot_be_imported(fake: FakeVllm, step: str) -> None:
    """It is installed, but one of its imports fails: what Python says of it is told."""
    fake.lay_out("newest").lose_module(step)
    assert installed()
    assert step in refusal("vllm_import_failed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("from json import no_such_name", "cannot import name 'no_such_name'"),
    ],
)
def test_a_place_that_is_there_but_broken(
    fake: FakeVllm, tmp_path: Path, text: str, said: str
) -> None:
    """That is no other layout: what is broken is told, not that the place is missing."""
    place = FUNCTIONS["build_app"][0]
    package, _, module = place.module.rpartition(".")
    fake.lay_out("oldest").module(package).__path__ = [str(tmp_path)]
    (tmp_path / f"{module}.py").write_text(text)
    importlib.invalidate_caches()
    assert said in refusal("vllm_import_failed")


# --- checkpoints


def test_a_checkpoint_comes_before_each_step(fake: FakeVllm) -> None:
    fake.lay_out("newest")
    steps: list[str] = []
    load(steps.append)
    assert tuple(steps) == (*_IMPORT_STEPS, *FUNCTIONS)


@pytest.mark.parametrize("stop_at", _IMPORT_STEPS)
def test_a_checkpoint_that_raises_ends_the_import_there(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    """A stop during the seconds of an import: its own error comes out, the step is not taken."""
    taken: list[str] = []
    really = importlib.import_module

    def noting(name: str) -> Any:
        taken.append(name)
        return really(name)

    def checkpoint(step: str) -> None:
        if step == stop_at:
            raise InterruptedError(step)

    monkeypatch.setattr(importlib, "import_module", noting)
    with pytest.raises(InterruptedError):
        load(checkpoint)
    assert tuple(taken) == _IMPORT_STEPS[: _IMPORT_STEPS.index(stop_at)]
