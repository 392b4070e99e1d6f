"""vLLM's own FastAPI app, and Uvicorn's options as `vllm serve` sets them."""

from __future__ import annotations

import argparse
import asyncio
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ichat_lifecycle.adapters.kept_metrics import KeptMetrics
from ichat_lifecycle.adapters.logging_choice import LoggingChoice
from ichat_lifecycle.adapters.refusal import App
from ichat_lifecycle.adapters.threads import considerate, in_thread
from ichat_lifecycle.adapters.vllm_engine import VllmEngine
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.ports import FaultReport

# As vllm.entrypoints...constants has them; the module's place differs between versions.
H11_MAX_INCOMPLETE_EVENT_SIZE = 4 * 2**20  # bytes
H11_MAX_HEADER_COUNT = 256
DEFAULT_LOG_LEVEL = "info"  # of --uvicorn-log-level


class _ExitLatch:
    """Stands where vLLM's error handlers expect Uvicorn's server: they set `should_exit` on it
    when the engine is dead. For us that is news for the lifecycle, not the end of the server."""

    def __init__(self, on_exit: Callable[[], None]) -> None:
        self._on_exit = on_exit

    @property
    def should_exit(self) -> bool:
        return False

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._on_exit()


class VllmAppBuilder:
    """Builds vLLM's app on the engine that is up."""

    def __init__(
        self,
        engine: VllmEngine,
        layout: Callable[[], Layout],
        on_fault: FaultReport,
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._on_fault = on_fault
        self._metrics = KeptMetrics()
        # Weakly: through it the app keeps its engine, which has to go when that is replaced.
        self._responses: Callable[[], Any] = lambda: None

    def background_tasks(self) -> tuple[asyncio.Task[Any], ...]:
        """Requests to /v1/responses with `background` that are not done.

        They were answered at once, and go on as tasks that vLLM keeps by the response's id.
        """
        tasks = getattr(self._responses(), "background_tasks", None)
        return tuple(task for task in (tasks or {}).values() if not task.done())

    async def build(self) -> App:
        """Registers vLLM's routes off the loop (their imports take a second), then its state."""
        with self._metrics.building():
            app = await self._build()
            # As Starlette does it at the first request: middleware registers its metrics in there.
            app.middleware_stack = app.build_middleware_stack()
        result: App = app
        return result

    async def _build(self) -> Any:
        layout, client = self._layout(), self._engine.client
        namespace = self._engine.namespace
        build = partial(
            layout.build_app,
            namespace,
            supported_tasks=self._engine.tasks,
            model_config=client.model_config,
        )
        with considerate():
            app = await in_thread(build, "build-app")
        await layout.init_app_state(client, app.state, namespace, self._engine.tasks)
        app.state.server = _ExitLatch(lambda: self._engine.report_error(self._on_fault))
        models = getattr(app.state, "openai_serving_models", None)
        self._engine.loras = lambda: sorted(getattr(models, "lora_requests", None) or {})
        responses = getattr(app.state, "openai_serving_responses", None)
        self._responses = weakref.ref(responses) if responses is not None else lambda: None
        return app


def uvicorn_options(
    layout: Layout, args: argparse.Namespace, log_config: Any, logging: LoggingChoice
) -> Mapping[str, Any]:
    """Uvicorn's options as vLLM's `build_and_serve` sets them.

    Args:
        log_config: a dictConfig for Uvicorn to apply; None where its loggers are configured.
        logging: levels in a file of the user's stay, unless the flag says otherwise.
    """
    by_file = logging.file is not None and args.uvicorn_log_level == DEFAULT_LOG_LEVEL
    return {
        "host": args.host,
        "port": args.port,
        "log_level": None if by_file else args.uvicorn_log_level,
        "log_config": log_config,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": layout.envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "timeout_graceful_shutdown": 1,  # seconds; the drain is over by then
        "ssl_keyfile": args.ssl_keyfile,
        "ssl_certfile": args.ssl_certfile,
        "ssl_ca_certs": args.ssl_ca_certs,
        "ssl_cert_reqs": args.ssl_cert_reqs,
        "ssl_ciphers": args.ssl_ciphers,
        "h11_max_incomplete_event_size": args.h11_max_incomplete_event_size
        or H11_MAX_INCOMPLETE_EVENT_SIZE,
        "h11_max_header_count": args.h11_max_header_count or H11_MAX_HEADER_COUNT,
    }


def api_keys(layout: Layout, args: argparse.Namespace) -> tuple[str, ...]:
    """The keys that vLLM's own middleware would accept."""
    return tuple(key for key in (args.api_key or [layout.envs.VLLM_API_KEY]) if key)


def ssl_refresher(layout: Layout, args: argparse.Namespace, config: Any) -> Any | None:
    """vLLM's watcher of the certificate files, where `--enable-ssl-refresh` asks for it."""
    if not args.enable_ssl_refresh or config.ssl is None:
        return None
    return layout.ssl_refresher(
        ssl_context=config.ssl,
        key_path=config.ssl_keyfile or config.ssl_certfile,  # else it watches neither
        cert_path=config.ssl_certfile,
        ca_path=config.ssl_ca_certs,
    )
