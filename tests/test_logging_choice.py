"""A user's wishes about vLLM's and Uvicorn's loggers hold, also after the engine is loaded."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvicorn
from test_logs import Stream, configured, logging_is_put_back

from ichat_lifecycle import worker
from ichat_lifecycle.adapters import logs
from ichat_lifecycle.adapters.logging_choice import LoggingChoice, configure, of_variables
from ichat_lifecycle.backend import Options, VLLMBackend
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.errors import ArgumentsError, InputMissingError
from ichat_lifecycle.preflight import refuse_early

__all__ = ["logging_is_put_back"]  # a fixture

FIELD = "--logging-config.pylogging_config_file"
FLAGS = {
    "disable_uvicorn_access_log": False,
    "disable_access_log_for_endpoints": None,
    "log_config_file": None,
}


@pytest.fixture(autouse=True)
def filters_are_put_back() -> Iterator[None]:
    yield
    logging.getLogger("uvicorn.access").filters.clear()


def choice_of(**flags: Any) -> LoggingChoice:
    return configure(Namespace(**{**FLAGS, **flags}), None)


def uvicorn_logs(choice: LoggingChoice) -> None:
    """Configures Uvicorn, and after that adopts, as when an engine has been loaded."""
    uvicorn.Config(lambda: None, log_config=None, access_log=choice.access_log)
    logs.adopt(choice)


def ask(path: str) -> None:
    """A line of the access log as Uvicorn writes it, if it writes any."""
    logger = logging.getLogger("uvicorn.access")
    if logger.hasHandlers():  # it looks once for each connection
        logger.info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", path, "1.1", 200)


def test_each_request_is_logged_by_default() -> None:
    stream = configured()
    uvicorn_logs(choice_of())
    ask("/health?a=b")
    assert stream.document()["logger"] == "uvicorn.access"


def test_disable_uvicorn_access_log() -> None:
    stream = configured()
    uvicorn_logs(choice_of(disable_uvicorn_access_log=True))
    ask("/health")
    logging.getLogger("uvicorn.error").info("others are logged")
    assert [d["event"] for d in stream.documents()] == ["others are logged"]


def test_disable_access_log_for_endpoints() -> None:
    stream = configured()
    uvicorn_logs(choice_of(disable_access_log_for_endpoints="/health, /metrics,"))
    for path in ("/health", "/metrics?x=1", "/healthy", "/v1/models", "/health/"):
        ask(path)
    logging.getLogger("uvicorn.access").info("another form")
    events = [d["event"] for d in stream.documents()]
    assert [e.split()[3] for e in events[:-1]] == ["/healthy", "/v1/models", "/health/"]


def test_a_later_worker_does_not_inherit_the_filter() -> None:
    stream = configured()
    choice_of(disable_access_log_for_endpoints="/health")
    uvicorn_logs(choice_of(disable_access_log_for_endpoints="/ping"))
    ask("/health")
    assert stream.document()


# --- a file of the user's


class Kept(logging.Handler):
    """A handler of the user's."""

    lines: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.lines = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def file_of(tmp_path: Path, **more: Any) -> str:
    handlers = {"kept": {"()": f"{__name__}.Kept"}}
    path = tmp_path / "logging.json"
    content = {"version": 1, "handlers": handlers, **more}
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def kept(name: str) -> Kept:
    (handler,) = logging.getLogger(name).handlers
    assert isinstance(handler, Kept)
    return handler


def test_handlers_levels_and_propagation_stay(tmp_path: Path) -> None:
    stream = configured()
    ours = {"handlers": ["kept"], "level": "WARNING", "propagate": False}
    loggers = {"vllm": ours, "uvicorn.access": {**ours, "level": "ERROR"}}
    choice = choice_of(log_config_file=file_of(tmp_path, loggers=loggers))
    for _ in range(2):  # after the parse, and after the engine's configuration
        uvicorn_logs(choice)
    logging.getLogger("vllm.core").info("too low")
    logging.getLogger("vllm.core").warning("kept")
    assert kept("vllm").lines == ["kept"]
    assert logging.getLogger("uvicorn.access").level == logging.ERROR
    assert stream.getvalue() == ""


def test_loggers_that_the_file_leaves_out_come_our_way(tmp_path: Path) -> None:
    stream = configured()
    file = file_of(
        tmp_path, loggers={"vllm": {"handlers": ["kept"]}}, disable_existing_loggers=False
    )
    uvicorn_logs(choice_of(log_config_file=file))
    logging.getLogger("uvicorn.error").warning("ours")
    assert stream.document()["event"] == "ours"


@pytest.mark.parametrize("disables", [True, False])
def test_our_own_lines_go_on_where_the_root_is_replaced(tmp_path: Path, disables: bool) -> None:
    """In our form, where they always go: the user's handler would print a dictionary."""
    stream = configured()
    log = structlog.get_logger("ichat_lifecycle")
    log.info("before")
    file = file_of(tmp_path, root={"handlers": ["kept"]}, disable_existing_loggers=disables)
    logs.adopt(choice_of(log_config_file=file))
    log.info("after", a=1)
    logs.log_engine_line("(EngineCore pid=7) INFO 11-22 16:00:00 [core.py:1] of the engine")
    events = [d["event"] for d in stream.documents()]
    assert events == ["before", "after", "of the engine"]
    logging.getLogger("elsewhere.new").warning("theirs")
    assert kept("").lines == ["theirs"]


def test_nothing_of_that_outlasts_the_file(tmp_path: Path) -> None:
    configured()
    logs.adopt(choice_of(log_config_file=file_of(tmp_path, root={"handlers": ["kept"]})))
    stream = configured()
    logs.adopt(LoggingChoice())
    structlog.get_logger("ichat_lifecycle").info("once")
    assert stream.document()["event"] == "once"


@pytest.mark.parametrize("handler", [{"class": "no.such.Class"}, {"()": "os.nothing"}, {}])
def test_a_file_that_cannot_be_applied_is_a_bad_argument(
    tmp_path: Path, handler: dict[str, str]
) -> None:
    path = tmp_path / "logging.json"
    content = {"version": 1, "handlers": {"a": handler}, "root": {"handlers": ["a"]}}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArgumentsError, match="the logging configuration cannot be applied"):
        choice_of(log_config_file=str(path))


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("--log-config-file PATH", "--log-config-file"),
        ("--log_config_file=PATH", "--log-config-file"),
        ("--logging-config.pylogging_config_file PATH", FIELD),
        ("--logging-config.pylogging_config_file=PATH", FIELD),
        ("", "VLLM_LOGGING_CONFIG_PATH"),
    ],
)
@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_file_that_is_not_one_is_refused_early(
    tmp_path: Path, words: str, source: str, text: str | None
) -> None:
    path = tmp_path / "logging.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    argv = ["m", *words.replace("PATH", str(path)).split()]
    environment = {} if words else {"VLLM_LOGGING_CONFIG_PATH": str(path)}
    kind = InputMissingError if text is None else ArgumentsError
    with pytest.raises(kind) as caught:
        refuse_early(Namespace(), argv, environment)
    assert caught.value.message.startswith(f"{source} {path}: ")


def test_a_file_and_no_configuration_at_all_are_in_conflict(tmp_path: Path) -> None:
    environment = {"VLLM_LOGGING_CONFIG_PATH": file_of(tmp_path), "VLLM_CONFIGURE_LOGGING": "0"}
    with pytest.raises(ArgumentsError, match="VLLM_CONFIGURE_LOGGING=0 are in conflict"):
        refuse_early(Namespace(), ["m"], environment)


# --- levels


@pytest.mark.parametrize(
    ("variable", "logged"),
    [(None, ["one"]), ("WARNING", ["one"]), ("DEBUG", ["fine", "one"]), ("debug", ["fine", "one"])],
)
def test_a_lower_level_of_vllms_is_the_engines_too(variable: str | None, logged: list[str]) -> None:
    """What the engine's processes print is not asked for and then dropped."""
    stream = configured(level="info")
    environment = {} if variable is None else {"VLLM_LOGGING_LEVEL": variable}
    logs.adopt(of_variables(environment))
    for level, text in (("DEBUG", "fine"), ("INFO", "one")):
        logs.log_engine_line(f"(EngineCore pid=7) {level} 11-22 16:00:00 [core.py:1] {text}")
    assert [d["event"] for d in stream.documents()] == logged


def test_pythons_warnings_are_lines_like_any_other() -> None:
    """vLLM warns in this way about flags that it will remove."""
    args, _ = build_parser().parse_known_args(["serve", "m", "--lifecycle-log-format", "json"])
    backend = VLLMBackend(args, ["m"], options=Options(defer_parsing=True))
    stream = Stream()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with worker._logging(args, backend, stream):
            warnings.warn("--a is deprecated", UserWarning, stacklevel=1)
    assert "--a is deprecated" in stream.document()["event"]
    assert stream.document()["level"] == "warning"


# --- the same with vLLM itself

PROGRAM = """
import json, logging, sys, warnings
from argparse import Namespace
import uvicorn
from ichat_lifecycle.adapters import logs
from ichat_lifecycle.backend import Options, VLLMBackend

warnings.simplefilter("ignore")
stream = open(sys.argv[1], "w", buffering=1)
logs.configure(stream, as_json=True, scrub=str, level="info")
backend = VLLMBackend(
    Namespace(), ["m", *sys.argv[2:]], options=Options(adopt_loggers=logs.adopt)
)
options = dict(backend._uvicorn_options())
for name in ("h11_max_incomplete_event_size", "h11_max_header_count"):
    options.pop(name)
uvicorn.Config(lambda: None, **options)
backend.engine._on_configured()  # the engine has been loaded
access = logging.getLogger("uvicorn.access")
if access.hasHandlers():
    for path in ("/health", "/v1/models"):
        access.info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", path, "1.1", 200)
logging.getLogger("vllm.some").warning("of vLLM")
logging.getLogger("vllm.some").debug("fine, of vLLM")
logging.getLogger("uvicorn.error").info("of Uvicorn")
"""


# Whether the memory is enough for an engine is not what is tested.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def events(tmp_path: Path, *argv: str, **environment: str) -> list[str]:
    """What comes our way of vLLM's and Uvicorn's records."""
    path = tmp_path / "ours.log"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *argv],
        env={**os.environ, **QUIET, **environment},
        check=True,
        capture_output=True,
        timeout=200,
    )
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ours = ("of vLLM", "of Uvicorn", "fine, of vLLM")
    return [d["event"] for d in found if d["event"] in ours or d["logger"] == "uvicorn.access"]


def access(path: str) -> str:
    return f'1.2.3.4:5 - "GET {path} HTTP/1.1" 200'


@pytest.mark.engine
@pytest.mark.parametrize(
    ("argv", "variables", "expected"),
    [
        (
            ["--disable-access-log-for-endpoints", "/health", "--log-level", "DEBUG"],
            {},
            [access("/v1/models"), "of vLLM", "fine, of vLLM", "of Uvicorn"],
        ),
        (
            ["--disable-uvicorn-access-log", "--uvicorn-log-level", "error"],
            {"VLLM_CONFIGURE_LOGGING": "0"},
            ["of vLLM"],
        ),
        (["--log-config-file", "FILE"], {}, []),
        ([], {"VLLM_LOGGING_CONFIG_PATH": "FILE"}, []),
    ],
    ids=["endpoints", "no access log", "file by flag", "file by variable"],
)
def test_with_vllms_own_configuration(
    tmp_path: Path, argv: list[str], variables: dict[str, str], expected: list[str]
) -> None:
    theirs = tmp_path / "theirs.log"
    handlers = {"file": {"class": "logging.FileHandler", "filename": str(theirs)}}
    one = {"handlers": ["file"], "propagate": False}
    loggers = {"vllm": one, "uvicorn.error": one, "uvicorn.access": {**one, "level": "ERROR"}}
    config = tmp_path / "logging.json"
    content = {"version": 1, "handlers": handlers, "loggers": loggers}
    config.write_text(json.dumps(content), encoding="utf-8")
    words = [word.replace("FILE", str(config)) for word in argv]
    found = events(
        tmp_path, *words, **{k: v.replace("FILE", str(config)) for k, v in variables.items()}
    )
    assert found == expected
    if not expected:
        lines = theirs.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.startswith("of ")] == ["of vLLM", "of Uvicorn"]
