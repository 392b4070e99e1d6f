"""The proofs as somebody uses them who writes a backend: as the README shows, and on a bad one."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.testing import prove
from ichat_lifecycle.testing.life import Life

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_ten_lines_prove_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(from my_package.*?)```", README.read_text(), re.DOTALL)
    module = ModuleType("my_package")
    module.MyBackend = type("MyBackend", (LifecycleBackend,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_package", module)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert "test_every_ordering_of_four_events_at_every_await" in namespace
    namespace["test_drawn_lives"]()


class SwallowsCancellation(LifecycleBackend):
    """What people write who want a quiet end."""

    async def run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await super().run()


class LeavesATask(LifecycleBackend):
    async def run(self) -> None:
        self.forgotten = asyncio.create_task(asyncio.sleep(3600), name="forgotten")
        await super().run()


class ReadyTooEarly(LifecycleBackend):
    async def run(self) -> None:
        self.server_ready.set()
        await super().run()


@pytest.mark.parametrize(
    ("backend", "invariant"),
    [
        (SwallowsCancellation, "cancellation_reaches_the_caller"),
        (LeavesATask, "nothing_is_left"),
        (ReadyTooEarly, "ready_exactly_when_ready"),
    ],
)
def test_a_bad_backend_is_found_by_drawing_and_by_exploring(
    backend: type[LifecycleBackend], invariant: str
) -> None:
    with pytest.raises(prove.Broken, match=f"^{invariant}: "):
        prove.drawn_lives(backend)
    with pytest.raises(prove.Broken, match=f"^{invariant}: "):
        prove.bursts(backend)


def test_what_is_found_is_shrunk_to_the_event_that_it_takes() -> None:
    seen: list[Life] = []
    with pytest.raises(prove.Broken) as broken:
        prove.drawn_lives(SwallowsCancellation, see=seen.append)
    plan = broken.value.life.plan
    assert [event.do for event in plan.events] == ["cancel"]
    assert plan.calls == {}
    assert len(seen) > 1


def test_lives_are_as_many_as_asked_for_and_of_every_kind() -> None:
    seen: list[Life] = []
    assert prove.drawn_lives(LifecycleBackend, 1500, "default", seen.append) >= 1500
    errors = {type(life.error).__name__ for life in seen}
    assert {"NoneType", "CancelledError", "EngineDiedError", "StopDeadlineError"} <= errors
    assert any(life.lifecycle.snapshot.restarts for life in seen)
    assert any(life.clients and life.clients.exchanges for life in seen)
