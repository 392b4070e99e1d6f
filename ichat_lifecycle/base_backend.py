"""What an iChat worker needs of any backend, and a backend that lives by its state machine."""

from __future__ import annotations

import abc
import argparse
import asyncio

from ichat_lifecycle.config import Settings
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Ports


class BaseBackend(abc.ABC):
    """What an iChat worker needs of any backend.

    Attributes:
        server_ready: set exactly while the backend can be routed to.
    """

    server_ready: asyncio.Event

    @abc.abstractmethod
    def get_backend_args(self) -> argparse.Namespace:
        """The backend's own arguments, parsed and validated."""

    @abc.abstractmethod
    async def run(self) -> None:
        """Lives until stopped, cancelled or failed; then everything is released."""

    @abc.abstractmethod
    def cleanup(self) -> None:
        """Asks for the end; safe at any time, any number of times."""

    def is_server_ready(self) -> bool:
        """Whether the backend can be routed to now."""
        return self.server_ready.is_set()

    async def wait_for_server_ready(self) -> None:
        """Returns once the backend can be routed to."""
        await self.server_ready.wait()


class LifecycleBackend(BaseBackend):
    """A backend for any engine: its ports say how, its lifecycle says when.

    Args:
        ports: the world: socket, engine, server, probes; see ports.py.
        settings: deadlines, intervals, budgets; the defaults where None.
        ready_event: set exactly while the state is READY; a new one where None.
    """

    def __init__(
        self,
        ports: Ports,
        settings: Settings | None = None,
        ready_event: asyncio.Event | None = None,
    ) -> None:
        self.server_ready = ready_event or asyncio.Event()
        self.lifecycle = Lifecycle(ports, settings or Settings(), self.server_ready)

    def get_backend_args(self) -> argparse.Namespace:
        """None of its own, unless a backend overrides this."""
        return argparse.Namespace()

    async def run(self) -> None:
        """Drives bind, start_engine, serve, become_ready; supervises; releases everything.

        Returns after a stop that was asked for. Cancelling it stops gracefully.

        Raises:
            LifecycleError: the first cause of the end.
            asyncio.CancelledError: it was cancelled; the stop is complete by then.
        """
        await self.lifecycle.run()

    def cleanup(self) -> None:
        """Asks for a graceful stop; safe at any time, from any thread, any number of times."""
        self.lifecycle.ask_to_stop("cleanup()")

    async def wait_for_server_ready(self) -> None:
        """Returns once the state is READY.

        Raises:
            LifecycleError: the life ended before it ever was.
        """
        ready = asyncio.create_task(self.server_ready.wait())
        ended = asyncio.create_task(self.lifecycle.ended())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            ended.cancel()
        if not self.server_ready.is_set():
            reason = self.lifecycle.snapshot.reason
            raise LifecycleError(
                "the backend ended before it was ready",
                root_cause=reason.message if reason else None,
            )
