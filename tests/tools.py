"""Programs from outside Python that tests use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Set by .ci/run: there, nothing is left out of what a target gets.
REQUIRED = "ICHAT_LIFECYCLE_TOOLS_REQUIRED"
CACHE = Path(__file__).parent.parent / ".cache"


def promtool() -> str:
    """Prometheus' checker: the system's, or the one that `make promtool` fetches."""
    return _program("promtool", CACHE / "promtool" / "usr" / "bin" / "promtool")


def chromium() -> str:
    """The browser: the system's, or what `make chromium` installs. It has too many libraries to be
    fetched and unpacked."""
    return _program("chromium")


def of_the_system(name: str, package: str) -> str:
    """What no target installs: where it is missing its tests are skipped, in CI too."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here, and no target gets it; Debian has it in {package}")
    return found


def _program(name: str, fetched: Path | None = None) -> str:
    found = shutil.which(name) or (str(fetched) if fetched and fetched.exists() else None)
    if found is None:
        reason = f"{name} is not here; `make {name}` gets Debian's"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
