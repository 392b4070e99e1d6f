"""A worker for the tests of fleets: all of it is real but the engine, which is a fake.

Run as `python fleet_worker.py serve's flags`. By environment variables it does other than usual:
FLEET_LOAD_S (how long its load takes), FLEET_FAILS (an exit code that it fails its start with),
FLEET_STREAM_S (how long each of its answers takes), FLEET_CHATTER (how many lines it prints),
HOSTILE_TRICKS (see testing.hostile_worker), FLEET_CARELESS (it prints its environment, and
answers with its arguments as they are).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ichat_lifecycle.adapters import logs
from ichat_lifecycle.adapters.clock import SystemClock
from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.handed_socket import HandedBinder, Handover, check_handed
from ichat_lifecycle.adapters.heartbeat import Heartbeat, Timing
from ichat_lifecycle.adapters.parent import is_supervised
from ichat_lifecycle.adapters.refusal import Receive, Scope, Send, send_json
from ichat_lifecycle.adapters.sd_notify import Notifier
from ichat_lifecycle.adapters.senses import Senses
from ichat_lifecycle.adapters.signals import StopSignals
from ichat_lifecycle.adapters.uvicorn_server import UvicornServer
from ichat_lifecycle.adapters.watchdog import EngineWatchdog
from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.cli import build_parser, follow_supervisor
from ichat_lifecycle.config import TOKEN_VARIABLE, load_settings
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.desk import LoopDesk
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.control.view import retry_after_s, summary_document
from ichat_lifecycle.errors import AddressError, ExitCode, LifecycleError, report
from ichat_lifecycle.redact import redact
from ichat_lifecycle.secret_words import taken
from ichat_lifecycle.testing import hostile_worker
from ichat_lifecycle.testing.fakes import FakeProbe, FakeWorld
from ichat_lifecycle.testing.plan import Outcome

LIMITS = {"h11_max_incomplete_event_size": 1 << 16, "h11_max_header_count": 64}


class FailedError(LifecycleError):
    """What FLEET_FAILS asks for."""

    exit_code = ExitCode(int(os.environ.get("FLEET_FAILS", "70")))


class Arguments:
    """Fails, or not; vLLM's words are taken as they are."""

    async def validate(self, on_phase: Any) -> None:
        if "FLEET_FAILS" in os.environ:
            raise FailedError("as it was told to")


class Worker:
    def __init__(self, argv: list[str]) -> None:
        args, self.arguments_left = build_parser().parse_known_args(["serve", *argv])
        self.model = argv[argv.index("--served-model-name") + 1]
        careless = "FLEET_CARELESS" in os.environ
        left = {"left": self.arguments_left}
        self.arguments: Mapping[str, Any] = left if careless else redact(left)
        self.vllm_version = "fake"
        self.pid = os.getpid()
        self.start_id = os.urandom(4).hex()
        self._bell = Bell()
        self.world = FakeWorld(
            plan={"engine.start": Outcome(delay_s=float(os.environ.get("FLEET_LOAD_S", "0.2")))}
        )
        settings = load_settings(None, args.set or ())
        self.gate = Gate(
            lambda: self.backend.lifecycle.snapshot,
            self._own,
            lambda: retry_after_s(self.backend.lifecycle),
        )
        self.world.gate = self.gate
        self.binder = HandedBinder(args.fd, lambda: False)
        options = {"log_config": None, "access_log": False, **LIMITS}
        self.server = UvicornServer(self.gate, lambda: options, self)
        self.control = ControlPlane(
            self._control_app,
            args.control_host,
            args.control_port,
            check_handed(args.fd).port,
            lambda url: None,
            self._bell.close,
        )
        heartbeats = self._heartbeats(args)
        ports = replace(
            self.world.ports(watchdog=lambda _: EngineWatchdog(self._senses(), settings.health)),
            arguments=Arguments(),
            binder=self.binder,
            server=self.server,
            clock=SystemClock(),
            companions=(self.control, *heartbeats),
        )
        self.backend = LifecycleBackend(ports, settings)
        self.notifier = Notifier(
            lambda: self.backend.lifecycle.snapshot,
            lambda: summary_document(self.backend.lifecycle, self),
            os.environ,
        )
        handover = Handover(
            self.binder,
            self.server,
            self.backend.lifecycle,
            when_ready=args.accept_from == "ready",
        )
        self.ask_to_stop = handover.ask_to_stop
        self.backend.lifecycle.listeners.extend(
            [
                self.notifier.changed,
                handover.changed,
                self._bell.ring,
                *(beat.changed for beat in heartbeats),
            ]
        )

    def _heartbeats(self, args: argparse.Namespace) -> list[Heartbeat]:
        if args.gateway_address is None:
            return []
        identity = {
            "worker_id": args.worker_id or f"worker-{self.pid}",
            "model_name": self.model,
            "model_path": "m",
            "backend": "vllm",
            "host": "127.0.0.1",
            "port": 1,
        }
        return [
            Heartbeat(
                args.gateway_address,
                lambda: identity,
                lambda: self.backend.lifecycle.snapshot,
                lambda message: self.backend.lifecycle.fail(
                    AddressError(message, code="model_name_taken")
                ),
                Timing(
                    args.heartbeat_interval,
                    succeeds_s=10 if args.accept_from == "ready" else 0,
                    gateway_timeout_s=args.heartbeat_timeout,
                ),
            )
        ]

    def _senses(self) -> Senses:
        engine = self.world.engine
        return Senses(
            is_sleeping=engine.is_sleeping,
            progress=engine.progress,
            in_flight=lambda: self.gate.in_flight,
            ready=lambda: self.backend.lifecycle.snapshot.ready,
            token=FakeProbe(self.world).token,
            compiling=engine.compiling,
        )

    @property
    def in_flight(self) -> int:
        return self.gate.in_flight

    @property
    def download(self) -> None:
        return None

    @property
    def control_url(self) -> str | None:
        return self.control.url or None

    def _control_app(self) -> Any:
        lifecycle = self.backend.lifecycle
        return build_control_app(
            lifecycle,
            self,
            token=os.environ.get(TOKEN_VARIABLE),
            engine=LoopDesk(lifecycle, self.world.engine, lambda: self._loop),
            events=Events(lifecycle.journal, self.start_id, self._bell),
        )

    async def build(self) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)

        return app  # a function: Uvicorn takes a method for something else

    async def _own(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 404, {})

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        await asyncio.sleep(float(os.environ.get("FLEET_STREAM_S", "0")))
        await send_json(send, 200, {"model": self.model, "pid": self.pid})

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with self.notifier.beating():
            await self.backend.run()

    _loop: asyncio.AbstractEventLoop | None = None


def main() -> int:
    if hostile_worker.VARIABLE in os.environ:
        return hostile_worker.main()
    worker = Worker(taken(sys.argv[1:]))
    follow_supervisor(os.environ)
    logs.configure(sys.stderr, as_json=True, scrub=str, level="info")
    StopSignals(worker.ask_to_stop, supervised=is_supervised(os.environ)).install()
    print(json.dumps({"event": "words", "words": worker.arguments_left}), flush=True)
    print("no JSON", flush=True)
    if "FLEET_CARELESS" in os.environ:
        print(dict(os.environ), flush=True)
    for _ in range(int(os.environ.get("FLEET_CHATTER", "0"))):
        print("x" * 100, flush=True)
    try:
        asyncio.run(worker.run())
    except LifecycleError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
