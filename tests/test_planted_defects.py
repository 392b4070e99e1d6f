"""The proofs are worth what they find: each of these defects, planted alone, breaks an invariant.

A copy of the package gets the defect; `make fuzz` on that copy has to end with a plan.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import ichat_lifecycle
from ichat_lifecycle.testing.plan import load_plan

# Far more than any of them needs: a lucky seed needs one life, an unlucky one some thousands.
MINUTES = "5"
LIVES = re.compile(r"^seed \d+, life (\d+); the plan is in ", re.MULTILINE)


class Edit(NamedTuple):
    """What makes the defect. `sound` must stand in the file exactly once: the code has moved on."""

    file: str
    sound: str
    broken: str


DEFECTS: dict[str, list[Edit]] = {
    "the socket is kept when the engine fails to start": [
        Edit(
            "lifecycle.py",
            "    async def _end(self) -> None:\n",
            "    async def _end(self) -> None:\n"
            "        if self._cause is not None and self.state is State.BOUND:\n"
            "            held = self.resources._held\n"
            "            self.resources._held = [h for h in held if h.name != 'socket']\n",
        )
    ],
    "the ready event is set before the warm-up": [
        Edit(
            "readiness.py",
            '        life.report_phase("warm_up")\n',
            '        life.report_phase("warm_up")\n        life.recorder._ready.set()\n',
        )
    ],
    "a late recover fires in STOPPING": [
        Edit(
            "states.py",
            "        Trigger.RECOVER,\n        (State.DEGRADED,),",
            "        Trigger.RECOVER,\n        (State.DEGRADED, State.STOPPING),",
        ),
        Edit(
            "supervision.py",
            "        self._life.learn(canary_answered=True)\n"
            "        try:\n"
            "            await self._life.fire(Trigger.RECOVER)\n"
            "        finally:\n"
            "            self._life.learn(canary_answered=False)\n",
            "        if not getattr(self, '_late', None) or self._late.done():\n"
            "            self._late = asyncio.ensure_future(self._recover_late())\n"
            "        self._count(0)\n"
            "\n"
            "    async def _recover_late(self) -> None:\n"
            "        await self._ports.probe.canary()\n"
            "        self._life.learn(canary_answered=True)\n"
            "        if self._life.state is State.STOPPING:\n"
            "            self._life._machine._model.busy = False\n"
            "        if not self._life._machine.busy:\n"
            "            await self._life.fire(Trigger.RECOVER)\n",
        ),
    ],
    "a stop that arrives during start_engine is lost": [
        Edit(
            "lifecycle.py",
            "    def _latch_stop(self, cause: str, now: bool) -> None:\n",
            "    def _latch_stop(self, cause: str, now: bool) -> None:\n"
            "        if self.state is State.BOUND and self._machine.busy:\n"
            "            return\n",
        )
    ],
    "an action swallows its cancellation": [
        Edit(
            "actions.py",
            "        return await self._hooks.call(acquire(), name)\n",
            "        try:\n"
            "            return await self._hooks.call(acquire(), name)\n"
            "        except asyncio.CancelledError:\n"
            "            pass\n",
        )
    ],
    "two stops release the engine twice": [
        Edit(
            "actions.py",
            "        self._engines += 1  # whatever it reports from now on is our own doing\n",
            "        self._engines += 1\n"
            "        if self._hooks.hurry.is_set():\n"
            "            await self._ports.engine.release(now=True)\n",
        )
    ],
    "the clean-up's error masks the first cause": [
        Edit(
            "lifecycle.py",
            "        if self._cause is None:\n            self._cause = error\n",
            "        if error is not self._cause:\n            self._cause = error\n",
        )
    ],
    "the watchdog's probe is never awaited": [
        Edit(
            "adapters/watchdog.py",
            "        answers = await self._outwait(RPC, questions)\n",
            "        answers = {r: asyncio.ensure_future(q) for r, q in questions.items()}\n"
            "        await asyncio.sleep(0.1)\n"
            "        if not all(answer.done() for answer in answers.values()):\n"
            "            self._tell(answered_s=0.1)\n"
            "            return\n",
        )
    ],
    "the warm-up is never awaited": [
        Edit(
            "readiness.py",
            '            await life.bounded(self._probe.warm_up(), "warm-up")\n',
            "            asyncio.ensure_future(self._probe.warm_up())\n",
        )
    ],
    "the canary is never awaited": [
        Edit(
            "supervision.py",
            '                await self._call(self._ports.probe.canary(), "canary")\n',
            "                asyncio.ensure_future(self._ports.probe.canary())\n",
        )
    ],
}


def planted(edits: list[Edit], directory: Path) -> None:
    package = Path(ichat_lifecycle.__file__).parent
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, directory / package.name, ignore=without)
    for edit in edits:
        file = directory / package.name / edit.file
        text = file.read_text(encoding="utf-8")
        assert text.count(edit.sound) == 1, f"{edit.file} no longer has:\n{edit.sound}"
        file.write_text(text.replace(edit.sound, edit.broken), encoding="utf-8")


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    planted(DEFECTS[name], tmp_path)
    plan = tmp_path / "plan.json"
    fuzz = [*(sys.executable, "-m", "ichat_lifecycle.testing.fuzz"), "--minutes", MINUTES]
    ran = subprocess.run(
        [*fuzz, "--plan", str(plan)],
        cwd=tmp_path,  # `python -m` looks there first
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    invariant = ran.stdout.partition(":")[0]
    lives = LIVES.findall(ran.stdout)
    assert len(lives) == 1, ran.stdout + ran.stderr
    record_property("told", f"planted and found after {lives[0]} lives: {name} ({invariant})")
    load_plan(plan)
