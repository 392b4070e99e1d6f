"""The iChat interface: `VLLMBackend`, which puts real ports behind a lifecycle.

An iChat worker makes one, awaits `run()` in a task, and cancels that task to stop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from ichat_lifecycle.adapters.advertise import Advertised
from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.clock import SystemClock
from ichat_lifecycle.adapters.compile_watch import CompileWatch
from ichat_lifecycle.adapters.evidence import EngineEvidence, EvidenceFiles
from ichat_lifecycle.adapters.gate import Gate
from ichat_lifecycle.adapters.handed_socket import HandedBinder, Handover, check_handed
from ichat_lifecycle.adapters.heartbeat import Heartbeat, Timing
from ichat_lifecycle.adapters.inner_app import below_middleware
from ichat_lifecycle.adapters.logging_choice import LoggingChoice
from ichat_lifecycle.adapters.otlp import Traces
from ichat_lifecycle.adapters.probe import SelfProbe, Target
from ichat_lifecycle.adapters.refusal import Receive, Scope, Send
from ichat_lifecycle.adapters.sd_notify import Notifier
from ichat_lifecycle.adapters.senses import Senses
from ichat_lifecycle.adapters.signals import Stoppable
from ichat_lifecycle.adapters.sockets import SocketBinder
from ichat_lifecycle.adapters.tls import Tls
from ichat_lifecycle.adapters.uvicorn_server import UvicornServer
from ichat_lifecycle.adapters.vllm_app import (
    VllmAppBuilder,
    api_keys,
    ssl_refresher,
    uvicorn_options,
)
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments
from ichat_lifecycle.adapters.vllm_engine import VllmEngine
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.adapters.watchdog import EngineWatchdog
from ichat_lifecycle.arguments import ParsedArguments
from ichat_lifecycle.base_backend import LifecycleBackend
from ichat_lifecycle.config import Settings
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.desk import LoopDesk
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.loop_watch import LoopWatch
from ichat_lifecycle.control.metrics import Metrics
from ichat_lifecycle.control.page.probes import Samples
from ichat_lifecycle.control.server import ControlPlane
from ichat_lifecycle.control.view import retry_after_s, summary_document
from ichat_lifecycle.credentials import CONTROL_TOKEN_FLAG, WEAK_HINT, header_value, is_weak
from ichat_lifecycle.errors import AddressError, ArgumentsError, LifecycleError
from ichat_lifecycle.ports import Address, Companion, Ports
from ichat_lifecycle.preflight import scan
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.shutdown_timeout import FLAG, overruled, with_shutdown_timeout
from ichat_lifecycle.vllm_flags import WITHOUT_EFFECT

log = structlog.get_logger("ichat_lifecycle")

# What the last trace may take of the time that a stop has; see last_resort.MARGIN_S.
TRACES_TIMEOUT_S = 0.5


@dataclass(slots=True)
class Options:
    """What a worker may choose besides vLLM's arguments.

    Attributes:
        control_port: None for main port + 10000.
        gateway: the Gateway's address; None for no heartbeat.
        worker_id: who the worker is to the Gateway; by default its host and main port, which are
            the same after it was killed and started again.
        heartbeat_interval_s: seconds between two beats.
        heartbeat_timeout_s: seconds after which the Gateway takes a silent worker for dead.
        advertise_host, advertise_port: what the Gateway is given as this worker's address; by
            default where it listens, or the interface that leads to the Gateway.
        defer_parsing: parse in `run()`, off the loop, so that the control plane answers meanwhile.
        log_config: Uvicorn's log configuration where vLLM is not asked for one; None for none.
        engine_sink: gets each line that the engine's processes print, from a thread; by default
            they go to stderr as they are.
        adopt_loggers: called, from a thread, each time that vLLM has configured its loggers, with
            the user's configuration of them. None leaves them as vLLM has made them.
        known_flags: flags of the embedding program, to suggest where one is mistyped.
        evidence_directory: where bundles of evidence go; by default `ichat-lifecycle/evidence` in
            the user's state directory.
        lines_dropped: how many lines of the log have found no reader, for the metrics.
        fd: an inherited socket that listens already, to serve on instead of host and port.
        secrets: what is scrubbed out of all that leaves this process; more is added to it.
        accept_when_ready: accept its connections from READY on instead of from BOUND on, because
            somebody else serves them until then.
    """

    settings: Settings = field(default_factory=Settings)
    control_host: str = "127.0.0.1"
    control_port: int | None = None
    control_token: str | None = None
    gateway: str | None = None
    worker_id: str | None = None
    heartbeat_interval_s: float = 10.0
    heartbeat_timeout_s: float = 30.0
    advertise_host: str | None = None
    advertise_port: int | None = None
    defer_parsing: bool = False
    log_config: Any = None
    engine_sink: Callable[[str], None] | None = None
    adopt_loggers: Callable[[LoggingChoice], None] | None = None
    announce: Callable[[str], None] = lambda url: None
    known_flags: tuple[str, ...] = ()
    evidence_directory: Path | None = None
    lines_dropped: Callable[[], int] = lambda: 0
    secrets: Secrets = field(default_factory=Secrets)
    fd: int | None = None
    accept_when_ready: bool = False


class VLLMBackend(LifecycleBackend):
    """vLLM's OpenAI-compatible server in this process, with an explicit life.

    Args:
        framework_args: iChat's own arguments; `host`, `port`, `served_model_name`, `model_path` and
            `gpu_ids` are merged into vLLM's where they are there.
        backend_argv: vLLM's arguments, with iChat's standard ones mapped to them.
        backend_ready_event: set exactly while the state is READY; a new one by default.
        options: the rest.

    Raises:
        ArgumentsError: an argument is unknown, wrong or in conflict (unless parsing is deferred).
        StartError: vLLM is missing or not supported, or this is a re-imported main module.
    """

    def __init__(
        self,
        framework_args: argparse.Namespace,
        backend_argv: list[str],
        backend_ready_event: asyncio.Event | None = None,
        *,
        options: Options | None = None,
    ) -> None:
        _refuse_in_engine_process()
        self.options = options or Options()
        if token := self.options.control_token:
            self.options = replace(
                self.options, control_token=header_value(CONTROL_TOKEN_FLAG, token)
            )
            if is_weak(token):
                log.warning("weak_token", name=CONTROL_TOKEN_FLAG, hint=WEAK_HINT)
        self._scan = scan(framework_args, backend_argv)
        given = self._scan.shutdown_timeout
        settings = with_shutdown_timeout(self.options.settings, given)
        self.options = replace(self.options, settings=settings)
        if self.options.fd is not None:
            at = check_handed(self.options.fd)
            self._scan = replace(self._scan, host=at.host, port=at.port, uds=at.uds)
        self._arguments = VllmArguments(
            framework_args, backend_argv, self._adopt_loggers, self.options.known_flags
        )
        if not self.options.defer_parsing:
            self._arguments.validate_now()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_watch = LoopWatch()
        self.start_id = secrets.token_hex(6)
        self._control_bell, self._main_bell = Bell(), Bell()
        self.secrets = self.options.secrets
        self.secrets.collect_environment(os.environ)
        self.secrets.add(self.options.control_token)
        self.secrets.collect(backend_argv, self.options.gateway)
        self._compose(backend_ready_event)

    # --- composition

    def _compose(self, ready_event: asyncio.Event | None) -> None:
        options = self.options
        self.engine = VllmEngine(
            self._arguments.for_engine,
            self._layout,
            lambda: self._parsed().gpu_ids,
            options.engine_sink,
            lambda: self._adopt_loggers(self._arguments.logging),
            options.settings.start.stall_timeout,
        )
        self.binder = (
            SocketBinder(self._address)
            if options.fd is None
            else HandedBinder(options.fd, lambda: self._address().tls)
        )
        heartbeat = self._heartbeat()
        self._notifier = Notifier(
            lambda: self.lifecycle.snapshot,
            lambda: summary_document(self.lifecycle, self),
            os.environ,
        )
        companions = (heartbeat,) if heartbeat else ()
        super().__init__(self._ports(companions), options.settings, ready_event)
        self._metrics = Metrics(
            self.lifecycle,
            self,
            self._loop_watch.health,
            lambda: self.options.lines_dropped(),  # noqa: PLW0108  # it is set later
        )
        self._traces = Traces(
            self.lifecycle.journal,
            self._traces_endpoint,
            lambda: {"model": self.model},
            scrub=self.secrets.scrub,
        )
        self._samples = Samples(self.lifecycle.journal)
        counters = (self._metrics.count, self._samples.note, self._traces.changed)
        bells = (self._control_bell.ring, self._main_bell.ring)  # last: all has been counted
        self.lifecycle.listeners.extend([*counters, *bells])
        if heartbeat:
            self.lifecycle.listeners.append(heartbeat.changed)
        if self._notifier.wanted:
            self.lifecycle.listeners.append(self._notifier.changed)
        self.ask_to_stop: Stoppable = self.lifecycle.ask_to_stop
        if isinstance(self.binder, HandedBinder):
            handover = Handover(
                self.binder, self.server, self.lifecycle, when_ready=options.accept_when_ready
            )
            self.lifecycle.listeners.append(handover.changed)
            self.ask_to_stop = handover.ask_to_stop

    def _ports(self, companions: tuple[Companion, ...]) -> Ports:
        settings = self.options.settings
        # The gate needs the lifecycle's snapshot, the lifecycle needs the server: hence lambdas.
        self.gate = Gate(
            lambda: self.lifecycle.snapshot,
            self._answer_own_route,
            lambda: retry_after_s(self.lifecycle),
            settings.http,
            lambda: builder.background_tasks(),  # noqa: PLW0108  # it is made later
        )
        self.gate.on_admin = self.engine.administrated
        builder = VllmAppBuilder(
            self.engine,
            self._layout,
            lambda fault: self.lifecycle.post_fault(fault),  # noqa: PLW0108  # it is made later
        )
        self.control = ControlPlane(
            self._control_app,
            self.options.control_host,
            self.options.control_port,
            None if self._scan.uds else self._scan.port,
            self.options.announce,
            self._control_bell.close,
            settings.http.hosts,
        )
        self.server = UvicornServer(
            self.gate,
            self._uvicorn_options,
            builder,
            self._ssl_refresher,
            self._main_bell.close,
            settings.http,
        )
        probe = SelfProbe(self._target, settings.warm_up)
        senses = Senses(
            is_sleeping=self.engine.is_sleeping,
            progress=self.engine.progress,
            in_flight=lambda: self.gate.in_flight,
            ready=lambda: self.lifecycle.snapshot.ready,
            token=probe.token,
            compiling=CompileWatch(self.engine.processes).compiling,
            ranks=lambda: self.engine.ranks.numbers,
            works=lambda rank: self.engine.ranks.works(rank, self.gate.in_flight),
            admin_request=self._admin_request,
        )
        return Ports(
            arguments=self._arguments,
            binder=self.binder,
            engine=self.engine,
            server=self.server,
            probe=probe,
            watchdog=EngineWatchdog(senses, settings.health),
            clock=SystemClock(),
            companions=(self.control, *companions),
            evidence=EngineEvidence(
                EvidenceFiles(
                    self.options.evidence_directory,
                    self.secrets.scrub,
                    # The files are closed before the lifecycle's own deadline.
                    settings.health.evidence_timeout * 0.9,
                ),
                self.engine.processes,
                self.engine.lines_by_child,
            ),
            scrub=self.secrets.scrub,
        )

    def _heartbeat(self) -> Heartbeat | None:
        if self.options.gateway is None:
            return None
        options = self.options
        advertised = Advertised(
            self.options.gateway, self._listening, options.advertise_host, options.advertise_port
        )
        return Heartbeat(
            self.options.gateway,
            lambda: self._identity_for_gateway(advertised),
            lambda: self.lifecycle.snapshot,
            self._on_rejected,
            Timing(
                options.heartbeat_interval_s,
                succeeds_s=options.settings.stop_bound if options.accept_when_ready else 0.0,
                gateway_timeout_s=options.heartbeat_timeout_s,
            ),
            advertised.look,
        )

    def _on_rejected(self, message: str) -> None:
        error = AddressError(
            message,
            code="model_name_taken",
            hint="stop the other one, or give this one another --served-model-name; give "
            "--heartbeat-timeout where the Gateway takes longer to forget a dead worker",
        )
        self.lifecycle.fail(error)

    def _control_app(self) -> Any:
        desk = LoopDesk(self.lifecycle, self.engine, lambda: self._loop)
        return build_control_app(
            self.lifecycle,
            self,
            token=self.options.control_token,
            engine=desk,
            loop=self._loop_watch.health,
            events=Events(self.lifecycle.journal, self.start_id, self._control_bell),
            metrics=self._metrics.text,
            samples=self._samples,
            scrub=self.secrets.scrub,
        )

    async def _answer_own_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._read_only_app()(scope, receive, send)

    def _read_only_app(self) -> Any:
        # Made on first use: FastAPI's import is not for the time before the port answers.
        if self._own_app is None:
            desk = LoopDesk(self.lifecycle, self.engine, lambda: self._loop)
            self._own_app = build_control_app(
                self.lifecycle,
                self,
                engine=desk,
                read_only=True,
                loop=self._loop_watch.health,
                events=Events(self.lifecycle.journal, self.start_id, self._main_bell),
                scrub=self.secrets.scrub,
            )
        return self._own_app

    _own_app: Any = None

    # --- what the ports ask

    def _parsed(self) -> ParsedArguments:
        assert self._arguments.parsed is not None, "arguments are validated before BOUND"
        return self._arguments.parsed

    def _layout(self) -> Layout:
        assert self._arguments.layout is not None, "arguments are validated before BOUND"
        return self._arguments.layout

    def _address(self) -> Address:
        args = self._parsed().vllm
        return Address(args.host or "", args.port, args.uds, Tls.of(vars(args).get).spoken)

    def _uvicorn_options(self) -> Mapping[str, Any]:
        args, layout = self._parsed().vllm, self._layout()
        self.secrets.collect(args)  # those of a --config file stand in no argv
        self.gate.require_keys(api_keys(layout, args))
        self.gate.root_path = args.root_path or ""
        bound = self.binder.bound
        headers = AnswerHeaders.of(vars(args))
        host = None if bound is None or bound.uds else bound.host
        self.gate.require_hosts(host, headers.allowed_origins)
        self.gate.add_headers(headers)
        # With a file of the user's, or adopted, Uvicorn's loggers are configured already.
        configured = self._arguments.logging.file or self.options.adopt_loggers
        asked = None if configured else layout.uvicorn_log_config(args)
        log_config = self.options.log_config if asked is None else asked
        return uvicorn_options(layout, args, log_config, self._arguments.logging)

    def _adopt_loggers(self, choice: LoggingChoice) -> None:
        if self.options.adopt_loggers is not None:
            self.options.adopt_loggers(choice)

    def _admin_request(self, before_s: float) -> str:
        """What an administrator has asked of the engine, and is under way; "" for nothing."""
        return self.gate.admin_request(before_s) or self.lifecycle.commanded(before_s)

    def _traces_endpoint(self) -> str | None:
        parsed = self._arguments.parsed
        return parsed.vllm.otlp_traces_endpoint if parsed else None

    def _ssl_refresher(self, config: Any) -> Any:
        return ssl_refresher(self._layout(), self._parsed().vllm, config)

    def _target(self) -> Target:
        app = self.gate.app
        return Target(
            app=below_middleware(app) if app is not None else None,
            state=self.gate.app_state,
            address=self.binder.inside or self._address(),
            model=self.model,
            tasks=self.engine.served_tasks,
            tokenizer=self.engine.tokenizer,
            ranks=self.engine.ranks.numbers,
            check_workers=self.engine.ranks.check_workers,
        )

    def _listening(self) -> tuple[str, int, str | None]:
        port = self.binder.bound.port if self.binder.bound else self._scan.port
        return self._scan.host or "", port, self._scan.uds

    def _worker_id(self) -> str:
        # No two workers of a host have these in common, but for a port that is any free one.
        own = self._scan.uds or self._scan.port or os.getpid()
        return self.options.worker_id or f"{socket.gethostname()}-{own}"

    def _identity_for_gateway(self, advertised: Advertised) -> Mapping[str, Any]:
        host, port = advertised.where
        return {
            "worker_id": self._worker_id(),
            "model_name": self.model,
            "model_path": self.secrets.redact(self.model_path),
            "backend": "vllm",
            "host": host,
            "port": port,
        }

    # --- what the control plane shows (control.view.Identity)

    @property
    def model(self) -> str:
        """The name that requests use."""
        parsed = self._arguments.parsed
        if parsed is None:
            return self._scan.served_model_name or self._scan.model or ""
        names = parsed.vllm.served_model_name
        return str(names[0] if names else parsed.vllm.model)

    @property
    def model_path(self) -> str:
        """The model as it was given; "" until parsed where only vLLM's parser can tell."""
        parsed = self._arguments.parsed
        return str(parsed.vllm.model) if parsed else self._scan.model or ""

    @property
    def vllm_version(self) -> str | None:
        """vLLM's version; None until it is imported."""
        layout = self._arguments.layout
        return layout.version if layout else None

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's arguments that differ from its defaults, secrets redacted."""
        parsed = self._arguments.parsed
        return dict(self.secrets.redact(parsed.changed)) if parsed else {}

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def control_url(self) -> str | None:
        return self.control.url or None

    @property
    def api_url(self) -> str | None:
        """The base URL for clients on this machine; None while the main port is not bound."""
        bound = self.binder.bound
        if bound is None or bound.uds:
            return bound.url if bound else None
        return f"{bound.url}/v1"

    @property
    def download(self) -> Mapping[str, Any] | None:
        """The download of the model from a hub, while one is under way."""
        found = self.engine.download
        return found.as_dict() if found else None

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet answered in full."""
        return self.gate.in_flight

    # --- BaseBackend

    def get_backend_args(self) -> argparse.Namespace:
        """vLLM's namespace, parsed and validated.

        Raises:
            ArgumentsError: parsing was deferred and has not happened yet.
        """
        if self._arguments.parsed is None:
            raise ArgumentsError("the arguments are not parsed yet; run() does it")
        return self._arguments.parsed.vllm

    def renew_certificate(self) -> None:
        """Serve new connections with what is in the files of `--ssl-certfile` and
        `--ssl-keyfile` now; from any thread, also in a signal's handler. Without TLS nothing
        happens. Files that cannot be used are logged, and the certificate before stays."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(self.server.renew_certificate)

    async def run(self) -> None:
        """Drives bind, start_engine, serve, become_ready; supervises; releases everything.

        Returns after a stop that was asked for. Cancelling it stops gracefully.

        Raises:
            LifecycleError: the first cause of the end.
            asyncio.CancelledError: it was cancelled; the stop is complete by then.
        """
        self._loop = asyncio.get_running_loop()
        self._warn_of_what_has_no_effect()
        try:
            with self._loop_watch.watching(), self._notifier.beating():
                await super().run()
        finally:
            await self._traces.flush(self.lifecycle.snapshot, TRACES_TIMEOUT_S)
            self._loop = None

    def _warn_of_what_has_no_effect(self) -> None:
        given, settings = self._scan.shutdown_timeout, self.options.settings
        if overruled(settings, given):
            reason = f"stop.drain is set too, to {settings.stop.drain:g} s, and wins"
            log.warning("without_effect", name=f"{FLAG} {given}", reason=reason)
        for name, reason in WITHOUT_EFFECT.items():
            if os.environ.get(name, "").strip() not in ("", "0"):
                log.warning("without_effect", name=name, reason=reason)


def _refuse_in_engine_process() -> None:
    """The engine's processes import the main module again, by `spawn`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise LifecycleError(
            f"{sys.argv[0]} starts a backend when it is imported, as the engine's processes do; "
            "put its start under: if __name__ == '__main__':",
            code="main_not_guarded",
        )
