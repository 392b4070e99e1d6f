"""Which worker a command is about."""

from __future__ import annotations

from ichat_lifecycle.client.address import base_url
from ichat_lifecycle.client.errors import SeveralWorkersError
from ichat_lifecycle.client.find import Found, Worker, find_workers


async def choose_url(url: str | None) -> str:
    """`url` as a base URL; without one, that of the only worker of this machine.

    Raises:
        ArgumentsError: it is no URL, or there are several workers.
        UnreachableError: there is none.
    """
    return base_url(url) if url is not None else the_only(await find_workers()).url


def the_only(found: Found) -> Worker:
    """The one worker that was found.

    Raises:
        SeveralWorkersError: there are more.
        UnreachableError: there is none.
    """
    if not found.workers:
        raise found.nothing()
    if len(found.workers) > 1:
        each = ", ".join(f"{w.url} ({w.status.model}, {w.status.state})" for w in found.workers)
        raise SeveralWorkersError(
            f"{len(found.workers)} workers run on this machine: {each}",
            hint="give the URL of one of them",
        )
    return found.workers[0]
