"""What a control plane asks for, without a life behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ichat_lifecycle.config import Settings
from ichat_lifecycle.journal import Journal, Snapshot
from ichat_lifecycle.states import State

NOON = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)


@dataclass
class FakeLife:
    """Stays as it is made; its clock is 0 at NOON."""

    snapshot: Snapshot = field(default_factory=lambda: Snapshot(State.READY, NOON, 0.0))
    now_s: float = 0.0
    journal: Journal = field(default_factory=Journal)
    settings: Settings = field(default_factory=Settings)
    restarts_left: int = 3

    def monotonic(self) -> float:
        return self.now_s


@dataclass
class FakeIdentity:
    model: str = "demo"
    vllm_version: str | None = "0.32.0"
    arguments: dict[str, Any] = field(default_factory=dict)
    pid: int = 42
    start_id: str = "5eed"
    control_url: str | None = "http://127.0.0.1:18000"
    download: Mapping[str, Any] | None = None
    in_flight: int = 0
