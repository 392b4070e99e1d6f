"""A stop that may take longer than whoever asks for it waits is warned about, with the numbers."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.config import Settings
from ichat_lifecycle.worker import _compare_with_grace


@pytest.mark.parametrize(
    ("grace_s", "drain_s", "warned"), [(30, 12, False), (30, 13, True), (29.4, 12, True)]
)
def test_a_bound_above_the_grace_period_is_warned_about(
    grace_s: float, drain_s: float, warned: bool
) -> None:
    settings = Settings.model_validate({"stop": {"drain": drain_s}})
    with capture_logs() as logs:
        _compare_with_grace(settings, grace_s)
    assert [entry["event"] for entry in logs] == ["grace_period_too_short"] * warned
    if warned:
        (entry,) = logs
        assert entry["log_level"] == "warning"
        assert entry["stop_bound_s"] == settings.stop_bound
        assert entry["longest_stop_s"] == settings.stop_bound + 3
        assert f"{settings.stop_bound + 3:g} s" in entry["hint"]


def test_the_default_is_kubernetes_own() -> None:
    args, _ = build_parser().parse_known_args(["serve"])
    assert args.grace_period == 30.0
    assert Settings().stop_bound + 3 <= args.grace_period
