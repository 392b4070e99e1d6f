"""The model that all engine tests share; and what the proofs count is told at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ichat_lifecycle.demo_model import make_demo_model

# What takes longest begins first, so that no core is left with it alone at the end.
LONGEST = ("test_lives.py", "test_stateful.py", "test_prove.py")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("models") / "demo"
    make_demo_model(directory)
    return str(directory)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Properties, not prints: they arrive also where several processes share the tests."""
    counts: Counter[str] = Counter()
    told: list[str] = []
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name.startswith("proved: "):
                counts[name.removeprefix("proved: ")] += value
            elif name == "told":
                told.append(value)
    for name, count in sorted(counts.items()):
        terminalreporter.write_line(f"proved: {count:,} {name}")
    for line in sorted(told):
        terminalreporter.write_line(line)
