"""The user's configuration of vLLM's and Uvicorn's loggers, which stays in force.

This package configures all loggers that the user has not configured.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging.config import dictConfig
from pathlib import Path
from typing import Any

from ichat_lifecycle.errors import ArgumentsError, InputMissingError
from ichat_lifecycle.input_file import read_input

ACCESS = "uvicorn.access"
FILE_FIELD = "--logging-config.pylogging_config_file"
FILE_FLAG, FILE_VARIABLE = "--log-config-file", "VLLM_LOGGING_CONFIG_PATH"
FILE_LIMIT = 2**20  # bytes
SWITCH_VARIABLE, LEVEL_VARIABLE = "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_LEVEL"


@dataclass(frozen=True, slots=True)
class LoggingChoice:
    """How vLLM's and Uvicorn's records are logged.

    Attributes:
        file: the file with the user's own dictConfig, which is in force; None where there is none.
        access_log: one line for each request.
        quiet_paths: no such line for these.
        level: vLLM's lowest level.
    """

    file: str | None = None
    access_log: bool = True
    quiet_paths: frozenset[str] = frozenset()
    level: int = logging.INFO


def of_variables(environment: Mapping[str, str]) -> LoggingChoice:
    """What is in force once vLLM is imported, and its flags are not parsed yet."""
    level = logging.getLevelNamesMapping().get(environment.get(LEVEL_VARIABLE, "").upper())
    return LoggingChoice(environment.get(FILE_VARIABLE) or None, level=level or logging.INFO)


def configure(
    args: argparse.Namespace, from_args: Callable[[argparse.Namespace], Any] | None
) -> LoggingChoice:
    """Configures vLLM's loggers by its flags, as `vllm serve` does before anything else.

    Args:
        from_args: vLLM's own function for that; None for a vLLM without one, whose flag is for
            Uvicorn alone, and whose own loggers the variables have configured on import.

    Raises:
        ArgumentsError: the file is not a dictConfig that can be applied.
    """
    try:
        if from_args is not None:
            config = from_args(args)
            file, level = config.pylogging_config_file, config.log_level
        else:
            file, level = getattr(args, "log_config_file", None), "INFO"
            if file:
                dictConfig(json.loads(Path(file).read_text(encoding="utf-8")))
    except Exception as error:  # whatever the classes that a file names raise
        raise ArgumentsError(
            f"the logging configuration cannot be applied: {_words(error)}",
            root_cause=repr(error.__cause__) if error.__cause__ else None,
            hint=f"correct the file of {FILE_FLAG} or {FILE_VARIABLE}",
        ) from error
    listed = str(getattr(args, "disable_access_log_for_endpoints", None) or "").split(",")
    choice = LoggingChoice(
        file or None,
        not args.disable_uvicorn_access_log,
        frozenset(path.strip() for path in listed if path.strip()),
        logging.getLevelNamesMapping().get(str(level), logging.INFO),
    )
    _silence(choice.quiet_paths)
    return choice


def _words(error: Exception) -> str:
    """vLLM gives some of its errors a format and what belongs into that."""
    if len(error.args) > 1 and str(error.args[0]).count("%s") == len(error.args) - 1:
        return str(error.args[0]) % error.args[1:]
    return str(error)


class _QuietPaths(logging.Filter):
    """Drops the access log's lines about some paths."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.args, tuple):
            return True
        # Of Uvicorn's: client, method, path with its query, version, status.
        _, _, path, *_ = (*record.args, "", "", "")
        return str(path).partition("?")[0] not in self._paths


def _silence(paths: frozenset[str]) -> None:
    """On the logger itself: it outlasts whatever is done to handlers."""
    logger = logging.getLogger(ACCESS)
    for one in [f for f in logger.filters if isinstance(f, _QuietPaths)]:
        logger.removeFilter(one)
    if paths:
        logger.addFilter(_QuietPaths(paths))


def check_file(path: str, source: str, environment: Mapping[str, str]) -> None:
    """Looks at a file with a dictConfig before vLLM reads it.

    Raises:
        InputMissingError: it cannot be read.
        ArgumentsError: it is not a JSON object, or logging is switched off by a variable.
    """
    if environment.get(SWITCH_VARIABLE, "").strip() == "0":
        raise ArgumentsError(
            f"{source} {path} and {SWITCH_VARIABLE}=0 are in conflict",
            code="arguments_conflict",
            hint="unset one of them",
        )
    try:
        content = json.loads(read_input(path, FILE_LIMIT))
    except InputMissingError as error:
        raise InputMissingError(f"{source} {error.message}", hint=error.hint) from error
    except (ValueError, RecursionError) as error:
        raise ArgumentsError(f"{source} {path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentsError(f"{source} {path}: expected a JSON object, a dictConfig of Python's")
