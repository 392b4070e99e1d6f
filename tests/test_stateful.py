"""Operator and world, played by Hypothesis against the real lifecycle and an independent model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.testing.stateful import operator_and_world

# Hypothesis shrinks what it finds for up to 300 s; what it found must be heard after that.
pytestmark = pytest.mark.timeout(900)

TestLifecycleBackend = operator_and_world(LifecycleBackend).TestCase
TestLifecycleBackend.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
