"""The model that all engine tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ichat_lifecycle.demo_model import make_demo_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("models") / "demo"
    make_demo_model(directory)
    return str(directory)
