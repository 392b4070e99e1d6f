"""Operator and world, played by Hypothesis against the real lifecycle and an independent model."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.testing.stateful import operator_and_world

TestLifecycleBackend = operator_and_world(LifecycleBackend).TestCase
TestLifecycleBackend.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
