"""The worker: arguments in, exit code out. A backend, signals, logs and a terminal, put together.

Importing this takes a second; `cli` checks first what can be checked without it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn, TextIO

import structlog

from ichat_lifecycle import environment
from ichat_lifecycle.adapters import logs, standard_streams, termination_log
from ichat_lifecycle.adapters.clock import process_age_s
from ichat_lifecycle.adapters.host_rules import Host, warn_of_oom, warn_of_probes
from ichat_lifecycle.adapters.last_resort import MARGIN_S, TELLING_S, LastResort
from ichat_lifecycle.adapters.line_writer import LineWriter
from ichat_lifecycle.adapters.parent import is_supervised
from ichat_lifecycle.adapters.printed import printed_by
from ichat_lifecycle.adapters.reaper import reap_as_init
from ichat_lifecycle.adapters.signals import StopSignals
from ichat_lifecycle.adapters.terminal import LiveView
from ichat_lifecycle.adapters.threads import within
from ichat_lifecycle.backend import Options, VLLMBackend
from ichat_lifecycle.config import TOKEN_VARIABLE, Settings
from ichat_lifecycle.errors import ExitCode, exit_code_of, report
from ichat_lifecycle.journal import Snapshot
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.milestones import Milestones
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.start_history import StartHistory, key_of
from ichat_lifecycle.states import State

log = structlog.get_logger("ichat_lifecycle")

LAST_WORDS_S = 0.3  # for each that may find no reader; the log itself has line_writer.CLOSE_S


def serve(
    framework: argparse.Namespace,
    backend_argv: list[str],
    settings: Settings,
    known_flags: tuple[str, ...] = (),
    notes: Sequence[environment.Note] = (),
) -> int:
    """Runs one worker to its end.

    Args:
        framework: our own flags, as `cli` parsed them.
        backend_argv: everything else: vLLM's flags and iChat's standard ones.
        known_flags: our own flags, to suggest where one is mistyped.
        notes: warnings that have waited for the log.

    Returns:
        the exit code; see errors.ExitCode.
    """
    stream = logs.own_stderr()
    standard_streams.never_block()
    secrets = Secrets()
    secrets.collect_environment(os.environ)
    secrets.collect(vars(framework), backend_argv)
    try:
        backend = VLLMBackend(
            framework,
            backend_argv,
            options=_options(framework, settings, known_flags, secrets),
        )
        settings = backend.options.settings  # with what vLLM's flags say of them
        with _logging(framework, backend, stream):
            environment.log_all(notes)
            _compare_with_grace(settings, framework.grace_period)
            _look_at_host(settings, framework.control_host)
            _run(backend, backend_argv, settings, stream)
    except Exception as error:
        termination_log.write(error, scrub=secrets.scrub)
        # The last line: nobody logs any more.
        within(LAST_WORDS_S, partial(report, error, stream, secrets.scrub))
        return int(exit_code_of(error))
    return int(ExitCode.OK)


def _options(
    given: argparse.Namespace,
    settings: Settings,
    known_flags: tuple[str, ...],
    secrets: Secrets,
) -> Options:
    return Options(
        settings=settings,
        control_host=given.control_host,
        control_port=given.control_port,
        control_token=given.control_token or os.environ.get(TOKEN_VARIABLE),
        gateway=given.gateway_address,
        worker_id=given.worker_id,
        heartbeat_interval_s=given.heartbeat_interval,
        heartbeat_timeout_s=given.heartbeat_timeout,
        advertise_host=given.advertise_host,
        advertise_port=given.advertise_port,
        defer_parsing=True,
        engine_sink=logs.log_engine_line,
        adopt_loggers=logs.adopt,
        known_flags=known_flags,
        secrets=secrets,
        fd=given.fd,
        accept_when_ready=given.accept_from == "ready",
        announce=lambda url: log.info("control_plane", url=url),
    )


@contextlib.contextmanager
def _logging(given: argparse.Namespace, backend: VLLMBackend, stream: TextIO) -> Iterator[None]:
    """JSON lines, or text; in a terminal with the live view below it."""
    as_json = given.lifecycle_log_format == "json" or (
        given.lifecycle_log_format == "auto" and not stream.isatty()
    )
    lifecycle = backend.lifecycle
    with contextlib.ExitStack() as stack:
        target: logs.Writable = stream
        if not as_json and stream.isatty():
            view = LiveView(stream, lambda: lifecycle.snapshot, lifecycle.monotonic)
            lifecycle.listeners.append(view.changed)
            target = view.__enter__()
            stack.callback(within, LAST_WORDS_S, lambda: view.__exit__(None, None, None))
        lines = LineWriter(target, _report_dropped)
        backend.options.lines_dropped = lambda: lines.dropped
        stack.enter_context(printed_by(lines, _report_dropped, backend.secrets.scrub))
        logs.configure(
            lines,
            as_json=as_json,
            scrub=backend.secrets.scrub,
            level=given.lifecycle_log_level,
            start_id=backend.start_id,
        )
        logging.captureWarnings(True)  # Python's own, of vLLM's deprecated flags for example
        try:
            yield
        finally:
            logging.captureWarnings(False)
            lines.close()
            # Not none: without any, Python prints warnings of threads that are left to stderr.
            logging.getLogger().handlers[:] = [logging.NullHandler()]


def _report_dropped(count: int) -> None:
    log.warning("lines_dropped", count=count)


def _run(backend: VLLMBackend, backend_argv: list[str], settings: Settings, stream: TextIO) -> None:
    last_resort = LastResort(settings.stop_bound + MARGIN_S, backend.engine.kill, stream)
    backend.lifecycle.stop_hooks.append(last_resort.arm)
    backend.lifecycle.listeners.append(lambda now: _arm_when_stopping(now, last_resort))
    StopSignals(backend.ask_to_stop, supervised=is_supervised(os.environ)).install()
    _renew_on_hang_up(backend.renew_certificate, stream)
    reap_as_init()
    _keep_start_times(backend.lifecycle, key_of(backend.model_path, backend_argv))
    backend.lifecycle.recorder.head_start_s = process_age_s()
    milestones = Milestones(backend.lifecycle.journal, lambda: _where(backend))
    backend.lifecycle.listeners.append(milestones.changed)
    failed: BaseException | None = None
    try:
        asyncio.run(backend.run())
    except BaseException as error:
        failed = error
        raise
    finally:
        last_resort.disarm()
        milestones.end(failed)


def _where(backend: VLLMBackend) -> dict[str, str | None]:
    url = backend.control_url
    page = f"{url}/" if url else None
    return {"model": backend.model, "api": backend.api_url, "page": page}


def _renew_on_hang_up(renew: Callable[[], None], stream: TextIO) -> None:
    """Make SIGHUP a renewal, except in a terminal: there it reports that this is closed."""
    if not stream.isatty():
        signal.signal(signal.SIGHUP, lambda number, frame: renew())


def _look_at_host(settings: Settings, control_host: str) -> None:
    host = Host()
    warn_of_probes(host, settings, control_host)
    if not is_supervised(host.environ):  # its supervisor is in the same cgroup, and has warned
        warn_of_oom(host)


def _compare_with_grace(settings: Settings, grace_s: float) -> None:
    """A process that is killed in the middle of its stop leaves behind what it would release."""
    longest_s = settings.stop_bound + MARGIN_S + TELLING_S
    if longest_s > grace_s:
        log.warning(
            "grace_period_too_short",
            grace_period_s=grace_s,
            longest_stop_s=longest_s,
            stop_bound_s=settings.stop_bound,
            hint=f"give it {longest_s:g} s (--grace-period, terminationGracePeriodSeconds), "
            "or shorten the stop, with --set stop.drain=SECONDS for example",
        )


def _arm_when_stopping(snapshot: Snapshot, last_resort: LastResort) -> None:
    """A stop that nobody asked for has the same bound."""
    if snapshot.state is State.STOPPING:
        last_resort.arm()


def _keep_start_times(lifecycle: Lifecycle, key: str) -> None:
    """Expects what earlier starts like this one took, and records it."""
    history = StartHistory()
    if (expected := history.expected(key)) is not None:
        lifecycle.recorder.expect(expected.seconds, expected.starts)

    def record(snapshot: Snapshot) -> None:
        ended = snapshot.progress.ended_mono_s
        if snapshot.ready and not snapshot.restarts and ended is not None:
            lifecycle.listeners.remove(record)
            history.record(key, ended - snapshot.progress.began_mono_s)

    lifecycle.listeners.append(record)


def end_process(code: int) -> NoReturn:
    """Ends the process at once.

    Everything of ours is released by now. The interpreter's own end would wait for a thread that is
    stuck in an import, and takes seconds to take torch apart.
    """
    for stream in (sys.stdout, sys.stderr):
        within(LAST_WORDS_S, stream.flush)
    os._exit(code)
