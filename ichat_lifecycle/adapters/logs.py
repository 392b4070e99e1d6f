"""One stream of log lines: ours, vLLM's in this process, and those of the engine's processes.

JSON lines where nobody watches, coloured text in a terminal. The engine's processes print into a
pipe of ours (engine_output); their lines are taken apart (log_line) and logged again with their
level, process and pid.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol, TextIO

import structlog

from ichat_lifecycle.adapters.console_lines import ConsoleLines
from ichat_lifecycle.adapters.logging_choice import ACCESS, LoggingChoice
from ichat_lifecycle.log_line import parse

EventDict = MutableMapping[str, Any]

_OURS = ("ichat_lifecycle", "engine")
_FOREIGN = ("vllm", "uvicorn", "uvicorn.error", ACCESS)
# Libraries whose INFO lines say nothing to an operator.
_QUIET = ("httpx", "httpcore", "asyncio", "urllib3", "filelock")


_handler: logging.Handler | None = None  # where all records go


def own_stderr() -> TextIO:
    """A stream on a copy of stderr: while an engine starts, descriptor 2 leads elsewhere."""
    fd = os.dup(sys.stderr.fileno())
    return os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace")


class Writable(Protocol):
    """A text stream, as far as logging needs one."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


def configure(
    stream: Writable,
    *,
    as_json: bool,
    scrub: Callable[[str], str],
    level: str,
    start_id: str | None = None,
) -> None:
    """Sends structlog's and the standard library's records to `stream`.

    Args:
        start_id: tells this process' lines from another's in each JSON line; None for none.
        scrub: takes secrets out of each finished line.
        level: the lowest level to log, as in `--log-level`.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper("iso" if as_json else "%H:%M:%S", utc=as_json),
        structlog.stdlib.ExtraAdder(allow=()),
        _origin,
        _place,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    marked = [_marking(start_id)] if as_json and start_id else []
    formatter = _Formatter(
        scrub,
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *marked,
            *_renderers(as_json, colors=stream.isatty()),
        ],
        # A forked engine process writes into our pipe, whose lines are parsed and logged again.
        in_engine=structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(as_json=True, colors=False),
            ],
        ),
    )
    global _handler  # noqa: PLW0603  # as the root's own is
    _handler = handler = _Handler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Not left to the root, whose level libraries of vLLM's change.
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _marking(start_id: str) -> Callable[[Any, str, EventDict], EventDict]:
    def mark(_: Any, __: str, event: EventDict) -> EventDict:
        event["start_id"] = start_id
        return event

    return mark


def _renderers(as_json: bool, colors: bool) -> list[Any]:
    renderer = structlog.processors.JSONRenderer() if as_json else ConsoleLines(colors)
    return [structlog.processors.format_exc_info, renderer]


class _Handler(logging.StreamHandler[Writable]):
    """Drops a record that cannot be written, because the disk is full for example."""

    def handleError(self, record: logging.LogRecord) -> None:
        # Not the standard report on stderr: while an engine starts, that leads into the pipe whose
        # lines are logged here. Each failure would bring the next, until the pipe is full and its
        # reader waits for itself.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Formatter(structlog.stdlib.ProcessorFormatter):
    def __init__(
        self, scrub: Callable[[str], str], *, in_engine: logging.Formatter, **options: Any
    ) -> None:
        super().__init__(**options)
        self._scrub = scrub
        self._in_engine = in_engine

    def format(self, record: logging.LogRecord) -> str:
        if os.getpid() != _main_pid:
            return self._scrub(self._in_engine.format(record))
        return self._scrub(super().format(record))


_main_pid = os.getpid()


def _origin(_: Any, __: str, event: EventDict) -> EventDict:
    """In a forked engine process: whose line it is."""
    if os.getpid() != _main_pid:
        record = event.get("_record")
        event["process"] = getattr(record, "vllm_process_name", "EngineCore")
        event["pid"] = os.getpid()
    return event


def _place(_: Any, __: str, event: EventDict) -> EventDict:
    """Of a record of vLLM's: where in its source, as its own lines have it."""
    record = event.get("_record")
    if record is not None and record.name.partition(".")[0] == "vllm":
        event.setdefault("place", f"{record.filename}:{record.lineno}")
    return event


def adopt(choice: LoggingChoice) -> None:
    """Has vLLM's and Uvicorn's records go the common way instead of through handlers of their own.

    Where the user has configured their loggers, these stay as they are. A configuration may also
    switch off every logger that is there, and replace the root's handlers: ours go on.
    """
    names = () if choice.file else _FOREIGN
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = choice.access_log or name != ACCESS
    for name, known in logging.root.manager.loggerDict.items():
        if isinstance(known, logging.Logger) and name.startswith((*_OURS, *names)):
            known.disabled = False
    replaced = _handler is not None and _handler not in logging.getLogger().handlers
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [_handler] if replaced and _handler is not None else []
        logger.propagate = not replaced
    lines = logging.getLogger("engine.vllm")
    if choice.level < lines.getEffectiveLevel():
        lines.setLevel(choice.level)


def log_engine_line(line: str) -> None:
    """Log one line that a process of the engine printed as an event of ours.

    Always from the same logger, whatever the line says: of a logger that a client could name, one
    more would be kept for each name. Of a JSON line no other fields are taken than vLLM's own.
    """
    if not line.strip():
        return
    said = parse(line)
    level = logging.getLevelNamesMapping().get(said.level.upper(), logging.INFO)
    fields = {
        "process": said.process,
        "pid": said.pid,
        "place": said.place or said.logger,
        "exception": said.traceback,
    }
    # A branch of its own: vLLM's loggers here may have handlers that print into the very pipe that
    # this line came from.
    given = {name: value for name, value in fields.items() if value}
    structlog.stdlib.get_logger("engine.vllm").log(level, said.text, **given)
