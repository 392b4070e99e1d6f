"""Scenarios on an event loop that leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

DEADLINE_S = 60


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Runs it, for DEADLINE_S at most. No task may be left."""

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def eventually(condition: Callable[[], Any]) -> None:
    """Waits until it holds, for DEADLINE_S at most."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
