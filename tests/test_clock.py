"""How old this process is."""

from __future__ import annotations

import subprocess
import sys
import time

SCRIPT = "from ichat_lifecycle.adapters.clock import process_age_s; print(process_age_s())"


def test_a_process_knows_its_age() -> None:
    """Not more than it can be, and not less than the import alone took."""
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep(0.2); {SCRIPT}"],
        capture_output=True,
        text=True,
        check=True,
    )
    whole_s = time.monotonic() - before
    tick_s = 0.02  # the kernel counts in hundredths
    assert 0.2 - tick_s <= float(done.stdout) <= whole_s + tick_s
