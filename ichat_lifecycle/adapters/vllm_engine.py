"""vLLM's engine client behind the `Engine` port: built off the loop, ended for certain.

`build_async_engine_client` builds AsyncLLM synchronously and would block the loop until the model
is loaded; the same public steps are taken here in a thread (AsyncLLM starts its tasks lazily on the
loop of its first use).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import structlog

from ichat_lifecycle import causes
from ichat_lifecycle.adapters import (
    download_watch,
    engine_fork,
    load_progress,
    vllm_caches,
    vllm_routes,
)
from ichat_lifecycle.adapters.births import Births
from ichat_lifecycle.adapters.engine_guard import EngineGuard, blocked
from ichat_lifecycle.adapters.engine_output import EngineOutput
from ichat_lifecycle.adapters.engine_processes import children_now, kill_all, with_descendants
from ichat_lifecycle.adapters.engine_remains import (
    EngineTasks,
    end_zeromq,
    refuse_questions,
    return_memory,
)
from ichat_lifecycle.adapters.engine_workers import DeathWatch, workers_of
from ichat_lifecycle.adapters.kept_metrics import KeptMetrics
from ichat_lifecycle.adapters.load_phases import (
    CONFIGURING,
    DOWNLOADING,
    STARTING_ENGINE,
    LoadPhases,
)
from ichat_lifecycle.adapters.threads import Threaded, in_thread
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.adapters.vllm_ranks import QUEUES, EngineRanks, asked, metrics
from ichat_lifecycle.bounds import watched
from ichat_lifecycle.errors import EngineNotUp, TransitionRefused
from ichat_lifecycle.gpus import GpuId
from ichat_lifecycle.ports import Fault, FaultReport, PhaseReport

log = structlog.get_logger("ichat_lifecycle.engine")

_POLL_S = 0.02
# READY ends only after them, and nobody may be routed to a dead engine for the sake of a number.
_EXIT_CODE_TRIES, _EXIT_CODE_POLL_S = 12, 0.005
# The names of those of its processes without any of which it is no engine. The second one wakes
# the data-parallel ranks: without it requests wait for ever.
_CORE, _COORDINATOR = "EngineCore", "VLLM_DP_Coordinator"
_SWEEP_AFTER_S = 0.5  # what has not ended by then is an orphan already: its EngineCore is gone


class _Aborted(Exception):
    """The load was given up between two of its steps."""


class VllmEngine:
    """One engine at a time; `start` may be called again after `release`.

    Args:
        arguments: gives vLLM's validated namespace, a new copy for each engine.
        layout: gives vLLM's functions.
        gpu_ids: gives the devices to show to the engine, or None for all.
        sink: gets each line that the engine's processes print, from a thread; stderr by default.
        on_configured: called, from a thread, once vLLM has made its configuration, which also
            configures its loggers anew.
        stall_timeout_s: seconds without progress that end a load.
    """

    def __init__(
        self,
        arguments: Callable[[], argparse.Namespace],
        layout: Callable[[], Layout],
        gpu_ids: Callable[[], tuple[GpuId, ...] | None],
        sink: Callable[[str], None] | None = None,
        on_configured: Callable[[], None] = lambda: None,
        stall_timeout_s: float = 300.0,
    ) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._on_configured = on_configured
        self._arguments = arguments
        self._layout = layout
        self._gpu_ids = gpu_ids
        self._sink = sink
        self._loading: Threaded[Any] | None = None
        self._abort = threading.Event()
        self._output: EngineOutput | None = None
        self._births: Births | None = None
        self._guard: EngineGuard | None = None
        self._phase = ""
        self._children: dict[int, Any] = {}
        self._sentinels: list[int] = []
        self._workers: DeathWatch | None = None
        self._died = False
        self._discarded = False
        self._on_phase: PhaseReport = lambda phase, fraction: None
        self.download: download_watch.Download | None = None
        self.namespace = argparse.Namespace()  # of this engine and its app alone
        self._metrics = KeptMetrics()
        self._tasks: EngineTasks | None = None
        self._former = False  # there was an engine before
        self.client: Any = None
        self.ranks = EngineRanks(None)
        self.tasks: tuple[str, ...] = ()
        self.loras: Callable[[], list[str]] = list

    @property
    def alive(self) -> bool:
        return self.client is not None and not self._died and not self.client.errored

    # --- start

    async def start(self, on_fault: FaultReport, on_phase: PhaseReport) -> None:
        """Loads the model.

        Raises:
            LifecycleError: with the engine's own first cause, an exit code and a hint.
        """
        self._abort.clear()
        self._died = self._discarded = False
        self._on_phase = on_phase
        self._tasks = EngineTasks()
        self._free_former()
        news, sampler = load_progress.News(), load_progress.Sampler()
        watch = load_progress.watch(self._stall_timeout_s, lambda: self._phase, news, sampler)
        self._births = births = Births(self._prints_here)
        loop = asyncio.get_running_loop()
        loop.add_reader(births.read_fd, births.read)
        downloads = asyncio.create_task(self._watch_download(), name="download-watch")
        try:
            await watched(self._start(on_fault, news), watch)
        finally:
            downloads.cancel()
            await asyncio.wait({downloads})
            self.download = None
            loop.remove_reader(births.read_fd)
            # A load that was given up may still fork in its thread: `release` waits for that.
            if not self._loading_runs:
                births.close()

    def _prints_here(self, pid: int) -> bool:
        return self._output is not None and self._output.is_of(pid)

    def _free_former(self) -> None:
        """Free the engine before this one, which is garbage by now.

        By itself nothing would: vLLM froze its heap when it began to serve, and a start loads with
        the collector off and freezes what there is afterwards, garbage too. Not at the release,
        as that is part of each stop, which takes as long as it must.
        """
        if self._former:
            self._former = False
            vllm_caches.forget()
            gc.unfreeze()
            gc.collect()
            return_memory()

    @property
    def _loading_runs(self) -> bool:
        return self._loading is not None and self._loading.running

    async def _start(self, on_fault: FaultReport, news: load_progress.News) -> None:
        phases = LoadPhases()
        self._output = output = EngineOutput(
            self._sink, partial(self._read_line, news, phases), partial(self._read_phase, phases)
        )
        before = children_now()
        self._loading = Threaded(partial(self._load, output), "engine-load")
        try:
            self.client = await self._loading.result()
        except _Aborted:
            raise asyncio.CancelledError from None
        except Exception as error:
            await asyncio.sleep(0)
            raise causes.start_error(error, await _settled(output)) from error
        self.ranks = EngineRanks(self.client)
        self._children = {p: c for p, c in children_now().items() if p not in before}
        self._watch(on_fault)
        await self.client.reset_mm_cache()
        self.tasks = tuple(await self.client.get_supported_tasks())

    def _load(self, output: EngineOutput) -> Any:
        _start_resource_tracker()
        self._guard = guard = EngineGuard(output.read_fd)
        self.namespace = self._arguments()
        with output.redirected(), guard.marking(), self._metrics.building():
            return self._build_client(self._layout(), self.namespace)

    def _build_client(self, layout: Layout, namespace: argparse.Namespace) -> Any:
        self._checkpoint(CONFIGURING)
        self._show_devices(layout)
        usage = layout.usage_context.OPENAI_API_SERVER
        engine_args = layout.engine_args.from_cli_args(namespace)
        if layout.propagate_flash_late_interaction is not None:
            layout.propagate_flash_late_interaction(namespace, engine_args)
        config = engine_args.create_engine_config(usage_context=usage)
        self._on_configured()
        self._checkpoint(STARTING_ENGINE)
        with self._start_method(layout):
            return layout.engine_client.from_vllm_config(
                vllm_config=config,
                usage_context=usage,
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
            )

    @contextlib.contextmanager
    def _start_method(self, layout: Layout) -> Iterator[None]:
        chosen = engine_fork.CHOSEN_BY_USER is not None
        if not chosen and layout.platform.is_cpu():
            births_fd = self._births.write_fd if self._births else -1
            with engine_fork.start_method("fork", workers="spawn", births_fd=births_fd):
                yield
            return
        # Elsewhere as `vllm serve` does it: a fork with a GPU's driver loaded is not tried here.
        spawning = engine_fork.start_method("spawn", workers="spawn")
        # What is not forked by us shares our process group, but Ctrl-C is for us alone. vLLM itself
        # ends its processes by SIGTERM and SIGKILL.
        with blocked({signal.SIGINT}), contextlib.nullcontext() if chosen else spawning:
            yield

    def _show_devices(self, layout: Layout) -> None:
        gpu_ids = self._gpu_ids()
        if gpu_ids is None:
            return
        variable = "CUDA_VISIBLE_DEVICES"
        if not layout.platform.is_cpu():
            variable = getattr(layout.platform, "device_control_env_var", variable)
        os.environ[variable] = ",".join(map(str, gpu_ids))

    def _checkpoint(self, phase: str) -> None:
        if self._abort.is_set():
            raise _Aborted
        self._enter_phase(phase)

    async def _watch_download(self) -> None:
        arguments = self._arguments()
        directory = download_watch.repository_directory(
            arguments.model, getattr(arguments, "download_dir", None)
        )
        if directory is None:
            return
        meter, log_at_s, before = download_watch.DownloadMeter(directory), 0.0, ""
        while True:
            await asyncio.sleep(download_watch.INTERVAL_S)
            self.download = found = await in_thread(meter.look, "download-look")
            if found is None:
                # vLLM need not print anything of what it does next.
                if before and self._phase == DOWNLOADING:
                    self._enter_phase(before)
                continue
            if self._phase != DOWNLOADING:
                before = self._phase
            self._enter_phase(DOWNLOADING, found.fraction)
            if (now_s := asyncio.get_running_loop().time()) >= log_at_s:
                log_at_s = now_s + download_watch.LOG_EVERY_S
                log.info(
                    "download",
                    bytes=found.bytes,
                    total_bytes=found.total_bytes,
                    bytes_per_s=round(found.bytes_per_s),
                    eta_s=found.eta_s,
                )

    def _read_line(self, news: load_progress.News, phases: LoadPhases, line: str) -> None:
        news.line(line)
        self._read_phase(phases, line)

    def _read_phase(self, phases: LoadPhases, line: str) -> None:
        # Once clients are served, their texts can be in the lines: those begin no phase.
        if self._loading_runs and (found := phases.read(line)) is not None:
            self._enter_phase(*found)

    def _enter_phase(self, phase: str, fraction: float | None = None) -> None:
        self._phase = phase
        self._on_phase(phase, fraction)

    # --- death

    def _watch(self, on_fault: FaultReport) -> None:
        """Death is event-driven: a process's sentinel becomes readable when it ends."""
        loop = asyncio.get_running_loop()
        cores = {p: c for p, c in self._children.items() if c.name.startswith(_CORE)}
        for pid, process in self._children.items():
            if not process.name.startswith((_CORE, _COORDINATOR)):
                continue
            loop.add_reader(process.sentinel, self._on_death, pid, process, on_fault)
            self._sentinels.append(process.sentinel)
        self._workers = DeathWatch(partial(self._on_worker_death, cores, on_fault))
        self._workers.watch(workers_of({pid: core.name for pid, core in cores.items()}))

    def _on_worker_death(
        self, cores: Mapping[int, Any], on_fault: FaultReport, pid: int, name: str
    ) -> None:
        for core_pid, core in cores.items():
            if not core.is_alive():  # it took its workers with it: its own end says more
                self._on_death(core_pid, core, on_fault)
                return
        self._unwatch()
        self._died = True
        self._tell(f"{name} (pid {pid}), the engine's worker process, ended", None, on_fault)

    def _on_death(self, pid: int, process: Any, on_fault: FaultReport) -> None:
        self._unwatch()
        self._died = True
        self._tell_death(pid, process, on_fault, _EXIT_CODE_TRIES)

    def _tell_death(self, pid: int, process: Any, on_fault: FaultReport, tries: int) -> None:
        code = process.exitcode
        if code is None and tries:
            # vLLM's own monitor, in a thread, is just reaping it: the code is there in a moment.
            again = (pid, process, on_fault, tries - 1)
            asyncio.get_running_loop().call_later(_EXIT_CODE_POLL_S, self._tell_death, *again)
            return
        self._tell(f"{process.name} (pid {pid}) ended{_how(code)}", code, on_fault)

    def _tell(self, message: str, code: int | None, on_fault: FaultReport) -> None:
        output = self._output
        recent = output.lines_of_the_last(causes.WINDOW_S) if output else ()
        death = causes.death(code, recent)
        on_fault(
            Fault(
                "engine_died",
                message,
                death.root_cause,
                death.hint,
                death.category,
            )
        )

    def report_error(self, on_fault: FaultReport) -> None:
        """vLLM's API found its engine dead before the process's end was noticed."""
        if not self._died:
            self._died = True
            self._tell("vLLM reports that its engine is dead", None, on_fault)

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        for sentinel in self._sentinels:
            loop.remove_reader(sentinel)
        self._sentinels.clear()
        if self._workers is not None:
            self._workers.stop()
            self._workers = None

    # --- release

    async def release(self, *, now: bool) -> None:
        """Ends the engine and all its processes; whatever had been started by then."""
        self._unwatch()
        self._abort.set()
        if self._loading is not None:
            await self._end_load(self._loading)
        if self._births is not None:
            self._births.close()
        await self._adopt_late_client()
        client, self.client = self.client, None
        self.ranks = EngineRanks(None)
        tasks, self._tasks = self._tasks, None
        try:
            if tasks is not None:
                await tasks.end()  # else the output handler logs our own shutdown as an error
            if client is not None:
                refuse_questions(client)
                # Nothing runs any more: vLLM's own default, 0, ends its processes at once.
                await in_thread(partial(client.shutdown, timeout=0), "engine-shutdown")
        finally:
            self.kill()
            # Side by side: one deadline is for both, and a large process takes long to end.
            await asyncio.gather(self._gone(), end_zeromq(client))
            del client
            self._loading = None
            self._children = {}
            self._former = True
            if tasks is not None:
                tasks.close()

    async def _end_load(self, loading: Threaded[Any]) -> None:
        """A load ends only when its processes do, after which vLLM's constructor raises."""
        while loading.running:
            self.kill()
            await asyncio.sleep(_POLL_S)

    async def _adopt_late_client(self) -> None:
        """The load may have succeeded just as it was given up: that engine is ours to end."""
        if self.client is None and self._loading is not None:
            with contextlib.suppress(BaseException):
                self.client = await asyncio.wait_for(self._loading.result(), 0.2)

    def kill(self) -> None:
        """SIGKILL to every process of the engine."""
        if self._births is not None:
            self._births.kill()
        children = dict(self._children)
        if self._loading_runs:
            children |= {p: c for p, c in children_now().items() if c.name.startswith("EngineCore")}
        kill_all(children.values())

    async def _gone(self) -> None:
        """Waits until no process of the engine is left; the caller bounds it.

        The pipe's end is the proof, not the process table: in a container without an init process a
        grandchild stays in that as a zombie for ever.
        """
        if self._output is None:
            return
        self._output.close()
        while any(process.is_alive() for process in self._children.values()):
            await asyncio.sleep(_POLL_S)
        await self._output_at_end(self._output)
        self._output = self._births = None
        guard, self._guard = self._guard, None
        if guard is not None:
            await in_thread(guard.end, "engine-guard-end")

    async def _output_at_end(self, output: EngineOutput) -> None:
        sweep_at = asyncio.get_running_loop().time() + _SWEEP_AFTER_S
        while not output.at_end:
            if self._guard is not None and asyncio.get_running_loop().time() >= sweep_at:
                self._guard.sweep()
            await asyncio.sleep(_POLL_S)

    # --- what the lifecycle and operators ask

    def processes(self) -> tuple[int, ...]:
        """The pids of EngineCore and all that it has started.

        The pid of a child that has been reaped may be another process's by now.
        """
        living = [pid for pid, child in self._children.items() if child.is_alive()]
        return tuple(sorted({p.pid for pid in living for p in with_descendants(pid)}))

    def lines_by_child(self) -> Mapping[str, Sequence[str]]:
        """The newest lines that each process of the engine has printed."""
        return self._output.lines_by_child if self._output else {}

    def progress(self, rank: int = 0) -> Any:
        """vLLM's own counters and gauges of a rank that move while it works."""
        return self.ranks.progress(rank)

    @property
    def tokenizer(self) -> bool:
        """Whether the engine has one: `--skip-tokenizer-init` and `--tokens-only` leave it out."""
        config = getattr(self.client, "model_config", None)
        return not getattr(config, "skip_tokenizer_init", False)

    @property
    def served_tasks(self) -> tuple[str, ...]:
        """Those whose API answers: of several for pooling vLLM serves the one that was chosen."""
        choose = getattr(getattr(self.client, "model_config", None), "get_pooling_task", None)
        chosen = None
        if choose is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # not of this model: vLLM says so
                chosen = choose(self.tasks)
        return self.tasks if chosen is None else (str(chosen),)

    async def is_sleeping(self, rank: int = 0) -> bool:
        """Whether it sleeps; one that is awake without its weights counts as asleep."""
        return await self.ranks.is_sleeping(rank) or self._discarded

    def administrated(self, path: str, query: str) -> None:
        """An administrative request to vLLM's own routes has succeeded."""
        if (has_weights := vllm_routes.has_weights_after(path, query)) is not None:
            self._discarded = not has_weights

    async def sleep(self, level: int) -> None:
        before = self._discarded
        self._discarded |= level >= vllm_routes.DISCARDS_WEIGHTS
        try:
            await asked(self.client.sleep(level=level))
        except Exception:  # refused, without sleep mode for example: nothing was taken
            self._discarded = before
            raise

    async def wake_up(self) -> None:
        """Wake the engine; after a sleep that discarded the weights they are loaded again.

        Raises:
            TransitionRefused: the engine reports that it is still asleep.
        """
        if self._discarded:
            # vLLM's own order: memory for the weights, the weights, memory for the KV cache. Until
            # the last the engine counts as asleep, so that a failure on the way leaves it so.
            await asked(self.client.wake_up(tags=["weights"]))
            await asked(self.client.collective_rpc("reload_weights"))
            awake = await asked(self.client.wake_up(tags=["kv_cache"]))
        else:
            awake = await asked(self.client.wake_up(tags=None))
        if awake is False:  # older versions return nothing
            raise TransitionRefused("wake: the engine reports that it is still asleep")
        self._discarded = False

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache.

        Raises:
            TransitionRefused: the engine did not do it, as running requests hold blocks of it.
        """
        if await asked(self.client.reset_prefix_cache()) is False:
            raise TransitionRefused(
                "reset_prefix_cache: the engine has not emptied its prefix cache: running requests "
                "hold blocks of it",
                hint="ask again when nothing is in flight",
            )

    async def describe(self) -> Mapping[str, Any]:
        """What vLLM knows of itself; one RPC, which the caller bounds.

        Raises:
            EngineNotUp: there is no engine, or it is being replaced.
        """
        client = self.client
        if client is None:
            raise EngineNotUp("there is no engine")
        try:
            sleeping = bool(await asked(client.is_sleeping()))
        except Exception as error:
            if client is self.client and self.alive:
                raise
            raise EngineNotUp("the engine went away before it answered") from error
        config = client.vllm_config
        cache = config.cache_config
        blocks = getattr(cache, "num_gpu_blocks", None)
        running, waiting = _requests()
        return {
            "model": config.model_config.model,
            "max_model_len": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "tasks": list(self.tasks),
            "kv_cache": {
                "blocks": blocks,
                "block_size_tokens": cache.block_size,
                "size_tokens": blocks * cache.block_size if blocks else None,
            },
            "requests": {"running": running, "waiting": waiting},
            "sleeping": sleeping,
            "lora_adapters": self.loras(),
            "processes": list(self.processes()),
        }


def _how(code: int | None) -> str:
    if code is None:
        return ""
    return f" by signal {-code}" if code < 0 else f" with exit code {code}"


def _start_resource_tracker() -> None:
    """Before the pipe is there: the tracker would inherit it and keep it open for our whole life.

    Processes that are ended by force leave their shared memory to the tracker, which removes it
    and warns; that is its job here, not news. SIGINT and SIGTERM do not end it; a terminal that is
    closed must not either.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    try:
        with blocked({signal.SIGHUP}):
            resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


async def _settled(output: EngineOutput, timeout_s: float = 1.0) -> tuple[str, ...]:
    """The lines once the dead processes' last ones have been read, or after a second."""
    output.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while not output.at_end:
                await asyncio.sleep(_POLL_S)
    return output.lines


def _requests() -> tuple[int | None, int | None]:
    """Running and waiting requests as vLLM's own gauges have them; None without statistics."""
    found = metrics(QUEUES)
    running, waiting = map(found.get, QUEUES)
    return (
        int(running) if running is not None else None,
        int(waiting) if waiting is not None else None,
    )
