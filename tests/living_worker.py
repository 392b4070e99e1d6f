"""A worker that lives in a thread, in real time: the real lifecycle, watchdog and control plane.

Where vLLM would be there are fakes. What takes minutes in vLLM takes as long as the test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from waiting import until

from ichat_lifecycle.adapters.clock import SystemClock
from ichat_lifecycle.adapters.senses import Senses
from ichat_lifecycle.adapters.watchdog import EngineWatchdog
from ichat_lifecycle.config import Settings
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.desk import LoopDesk
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.page.probes import Samples
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.errors import StopDeadlineError
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Watchdog
from ichat_lifecycle.testing.fakes import FakeProbe, FakeWorld
from ichat_lifecycle.testing.plan import Outcome

T = TypeVar("T")

DEADLINE_S = 60.0
TOKEN = "right-token"
QUICK = Settings.model_validate(
    {
        "start": {"engine_timeout": 600},
        "health": {
            "interval": 0.1,
            "timeout": 0.5,
            "recovery_interval": 0.1,
            "give_up_after": 1000,
            "token_interval": 0,
            "evidence_timeout": 600,
        },
        "stop": {"drain": 120, "watchdog": 30, "engine": 30, "companion": 30},
    }
)


@dataclass(frozen=True, slots=True)
class Held(Outcome):
    """A call that lasts until the test lets it go on."""

    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(
        self,
        call: str = "call",
        usual_s: float = 0.0,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> None:
        await self.go_on.wait()


class Worker:
    """One life, also the control plane's. Use it as a context; at its end it is stopped.

    Args:
        port: of the control plane; 0 for any free one.
        held: names of calls (see testing/plan.py) that last until `let` is called.
    """

    vllm_version = "0.32.0"
    pid = 4242
    start_id = "5eed"
    control_url: str | None = None
    download: Mapping[str, Any] | None = None

    def __init__(
        self,
        *held: str,
        port: int = 0,
        token: str | None = TOKEN,
        model: str = "demo",
        settings: Settings = QUICK,
        arguments: Mapping[str, Any] | None = None,
        expected_s: float | None = None,
    ) -> None:
        self.model = model
        self.arguments = arguments or {"model": "/models/demo", "max_model_len": 512}
        self.url = ""
        # What has to be closed before the worker ends.
        self.leaving = contextlib.ExitStack()
        self.held = {name: Held() for name in held}
        self.world = FakeWorld(plan=self.held)
        self._token = token
        self._bell = Bell()
        self.plane = ControlPlane(
            self._app, "127.0.0.1", port, None, lambda url: None, self._bell.close
        )
        ports = self.world.ports(watchdog=lambda _: self._watchdog(settings))
        ports = replace(ports, clock=SystemClock(), companions=(self.plane,))
        self.lifecycle = Lifecycle(ports, settings)
        self._samples = Samples(self.lifecycle.journal)
        self.lifecycle.listeners.extend([self._samples.note, self._bell.ring])
        if expected_s is not None:
            self.lifecycle.recorder.expect(expected_s, 3)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._live, name="living-worker", daemon=True)

    @property
    def in_flight(self) -> int:
        return self.world.in_flight

    def _watchdog(self, settings: Settings) -> Watchdog:
        world = self.world
        senses = Senses(
            is_sleeping=world.engine.is_sleeping,
            progress=world.engine.progress,
            in_flight=lambda: world.in_flight,
            ready=lambda: self.lifecycle.snapshot.ready,
            token=FakeProbe(world).token,
            compiling=world.engine.compiling,
        )
        return EngineWatchdog(senses, settings.health)

    def _app(self) -> Any:
        return build_control_app(
            self.lifecycle,
            self,
            token=self._token,
            engine=LoopDesk(self.lifecycle, self.world.engine, lambda: self._loop),
            events=Events(self.lifecycle.journal, secrets.token_hex(4), self._bell),
            samples=self._samples,
        )

    # --- its thread

    def _live(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        # The control plane's thread has 0.9 s to end: not what is tested here, on a busy machine.
        with contextlib.suppress(StopDeadlineError):
            await self.lifecycle.run()

    def __enter__(self) -> Worker:
        self._thread.start()
        until(lambda: self.plane.url != "", "the control plane answers")
        self.url = self.plane.url
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving.close()
        self.let(*self.held)
        self.lifecycle.ask_to_stop("the end of the test")
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the worker has not ended"

    # --- what tests do

    def do(self, what: Callable[[], T]) -> T:
        """Runs it on the worker's own loop."""

        async def run() -> T:
            return what()

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(DEADLINE_S)

    def let(self, *names: str) -> None:
        """Held calls go on."""

        def go_on() -> None:
            for name in names:
                self.held[name].go_on.set()

        if self._thread.is_alive():
            self.do(go_on)

    def phase(self, name: str, fraction: float | None = None) -> None:
        """The start has come so far."""
        recorder, now_s = self.lifecycle.recorder, self.lifecycle.monotonic()
        self.do(lambda: recorder.phase(name, fraction, now_s))
