"""Waiting with a limit that holds even for what ignores its cancellation."""

from __future__ import annotations

import asyncio
from typing import Any


async def race(
    task: asyncio.Future[Any], timeout_s: float | None, interrupt: asyncio.Event | None = None
) -> bool:
    """Waits until the task ends, time is up, or `interrupt` is set; says whether the task ended.

    Unlike `asyncio.timeout` it neither cancels the task nor waits for what it does about that; both
    are the caller's. Raises only CancelledError, when the caller is cancelled.
    """
    waiter = asyncio.ensure_future(interrupt.wait()) if interrupt is not None else None
    try:
        await asyncio.wait(
            {task, waiter} if waiter is not None else {task},
            timeout=timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
    finally:
        if waiter is not None:
            waiter.cancel()
    return task.done()


def error_of(task: asyncio.Future[Any]) -> BaseException | None:
    """What an ended task failed with; a cancellation counts as a failure."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()
