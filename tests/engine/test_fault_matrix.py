"""The fault matrix: each fault is driven once, and each of its claims has to hold.

`make faults` prints the same as a table, beside `vllm serve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.engine_faults import EXIT_75
from faults.lab import Lab
from faults.matrix import ROWS, Row
from faults.measure import slowness

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# A minute each, and near to another variant: only `make faults` drives them.
LEFT_OUT = {(3, EXIT_75)}
# Starts that cannot succeed, or have to with little: their limits are minutes.
UNTIMED = (16, 17, 20)
CASES = [
    pytest.param(
        row,
        variant,
        id=f"{row.number} {row.fault} {variant}".strip(),
        marks=[pytest.mark.untimed] if row.number in UNTIMED else [],
    )
    for row in ROWS
    for variant in row.variants
    if (row.number, variant) not in LEFT_OUT
]


@pytest.fixture(scope="module")
def lab(model: str) -> Iterator[Lab]:
    made = Lab(model, saturate_s=15)
    yield made
    made.close()


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_a_fault_does_what_it_may(lab: Lab, row: Row, variant: str, tmp_path: Path) -> None:
    slow = slowness()
    measured = row.ours(lab, variant, tmp_path)
    print(measured.shown())
    assert measured.claims
    # The limits are those of a quiet machine; `make faults` does not stretch them.
    assert measured.failed(max(slow, slowness())) == []
