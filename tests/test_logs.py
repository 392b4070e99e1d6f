"""One stream of log lines: whose they are, what is in them, and what is not."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from ichat_lifecycle.adapters import console_lines, logs
from ichat_lifecycle.adapters.logging_choice import LoggingChoice
from ichat_lifecycle.redact import Secrets

TOUCHED = ("", *logs._OURS, "engine.vllm", *logs._QUIET, *logs._FOREIGN, "elsewhere")


@pytest.fixture(autouse=True)
def logging_is_put_back() -> Iterator[None]:
    """What configure() changes is the whole process's."""
    loggers = [logging.getLogger(name) for name in TOUCHED]
    before = [(lg, lg.handlers[:], lg.level, lg.propagate) for lg in loggers]
    known = logging.getLogger().manager.loggerDict.values()
    disabled = {lg: lg.disabled for lg in known if isinstance(lg, logging.Logger)}
    yield
    for logger, was in disabled.items():
        logger.disabled = was
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
    structlog.reset_defaults()


class Stream(io.StringIO):
    """What has been logged; a terminal or not."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal

    def documents(self) -> list[dict[str, Any]]:
        """One for each line: whatever is logged, a line is a whole JSON object."""
        found = [json.loads(line) for line in self.getvalue().splitlines()]
        assert all(isinstance(document, dict) for document in found)
        return found

    def document(self) -> dict[str, Any]:
        (only,) = self.documents()
        return only


def configured(
    *, as_json: bool = True, level: str = "info", secrets: Secrets | None = None
) -> Stream:
    stream = Stream()
    scrub = (secrets or Secrets()).scrub
    logs.configure(stream, as_json=as_json, scrub=scrub, level=level)
    return stream


def test_every_line_carries_the_start_id() -> None:
    """Ours, a library's, and an engine's own; it is the id that events begin with."""
    stream = Stream()
    logs.configure(stream, as_json=True, scrub=str, level="info", start_id="5eed")
    structlog.get_logger("ichat_lifecycle").info("transition", seq=1)
    logging.getLogger("elsewhere").info("said")
    logs.log_engine_line("(EngineCore pid=12) INFO 11-22 16:00:00 [core.py:110] text")
    logs.log_engine_line('{"level": "info", "event": "forked", "start_id": "5eed"}')
    lines = stream.documents()
    assert [line["event"] for line in lines] == ["transition", "said", "text", "forked"]
    for line in lines:
        assert {"event", "level", "logger", "timestamp", "start_id"} <= line.keys()
        assert line["start_id"] == "5eed"


def test_text_for_people_does_without_it() -> None:
    stream = Stream()
    logs.configure(stream, as_json=False, scrub=str, level="info", start_id="5eed")
    structlog.get_logger("ichat_lifecycle").info("transition")
    assert "5eed" not in stream.getvalue()


# --- lines of the engine's processes

NEW = "(EngineCore pid=12) {level} 11-22 16:00:00 [core.py:110] {text}"
TRACE = '  File "/x/core.py", line 3, in run'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            NEW.format(level="INFO", text="Starting to load model"),
            {"event": "Starting to load model", "place": "core.py:110", "process": "EngineCore"},
        ),
        (NEW.format(level="WARNING", text="slow: [a] (b)"), {"level": "warning"}),
        (NEW.format(level="ERROR", text="x"), {"level": "error", "pid": 12}),
        (NEW.format(level="CRITICAL", text="x"), {"level": "critical"}),
        (
            "(Worker_TP0 pid=13) INFO 11-22 16:00:00 [a.py:1] x",
            {"process": "Worker_TP0", "pid": 13, "event": "x"},
        ),
        (
            "INFO 11-22 16:00:00 [api_server.py:1] old form",
            {"event": "old form", "place": "api_server.py:1", "level": "info"},
        ),
        ("ERROR 11-22 16:00:00 [core.py:1] ", {"event": "", "level": "error"}),
        (
            f"(EngineCore pid=12) {TRACE}",
            {"event": TRACE, "level": "info", "process": "EngineCore", "pid": 12},
        ),
        (NEW.format(level="ERROR", text=TRACE), {"event": TRACE, "level": "error"}),
        ("ValueError: no", {"event": "ValueError: no", "level": "info"}),
        ("(not a process) text", {"event": "(not a process) text"}),
        ("Loading shards:  50% 1/2 [00:01]", {"event": "Loading shards:  50% 1/2 [00:01]"}),
        (
            '{"level": "warning", "event": "from JSON", "timestamp": "then", "pid": 5, "n": 1}',
            {"event": "from JSON", "level": "warning", "pid": 5},
        ),
        ('{"level": "info", "event": "x", "logger": "vllm.core"}', {"place": "vllm.core"}),
        ('{"level": "silly", "event": "x"}', {"level": "info"}),
        ('{"no": "event"}', {"event": '{"no": "event"}', "level": "info"}),
        ('{"broken', {"event": '{"broken'}),
        ('{"level": "info", "event": "x", "msg": 1, "args": 2}', {"event": "x"}),
        (
            '{"levelname": "ERROR", "message": "failed", "name": "vllm.v1.core", "process": 12, '
            '"processName": "EngineCore", "exc_info": "Traceback\\nValueError: no"}',
            {
                "event": "failed",
                "level": "error",
                "pid": 12,
                "process": "EngineCore",
                "place": "vllm.v1.core",
                "exception": "Traceback\nValueError: no",
            },
        ),
    ],
)
def test_a_line_of_the_engine_becomes_an_event(line: str, expected: dict[str, Any]) -> None:
    """With its own level, process, pid and place, where it has them; never lost."""
    stream = configured()
    logs.log_engine_line(line)
    found = stream.document()
    assert found | expected == found
    assert found["logger"].startswith("engine.")
    assert found["timestamp"].endswith("Z") and found["timestamp"] != "then"
    if "pid" not in expected and "EngineCore" not in line:
        assert "pid" not in found


@pytest.mark.parametrize(
    "line",
    [
        "[" * 16_000,
        '{"level": "info", "event": ' + "[" * 16_000,
        '{"level": "info", "event": "x", "pid": ' + "9" * 5_000 + "}",
        '{"level": 7, "event": "x", "pid": true, "process": ["y"], "logger": {}}',
        '{"levelname": null, "message": "x", "process": -1, "exc_info": 5}',
    ],
    ids=["brackets", "deep", "a huge number", "types", "vLLM's types"],
)
def test_no_line_is_lost_whatever_a_client_has_printed(line: str) -> None:
    stream = configured()
    logs.log_engine_line(line)
    found = stream.document()
    assert found["level"] == "info"
    assert not {"pid", "process", "exception"} & found.keys()


def test_a_line_can_neither_name_a_logger_nor_set_fields() -> None:
    """Of each logger that is named one more would be kept for ever."""
    stream = configured()
    before = len(logging.root.manager.loggerDict)
    for n in range(50):
        line = {"level": "info", "event": "transition", "logger": f"x.{n}", "dest": "READY"}
        logs.log_engine_line(json.dumps(line))
    assert len(logging.root.manager.loggerDict) <= before + 1
    for found in stream.documents():
        assert found["logger"] == "engine.vllm"
        assert "dest" not in found


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_is_nothing(line: str) -> None:
    stream = configured()
    logs.log_engine_line(line)
    assert stream.getvalue() == ""


# --- one line for each event


def log_with_structlog() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        structlog.get_logger("ichat_lifecycle").exception("it failed")


def log_with_the_standard_library() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("elsewhere").exception("it %s", "failed")


@pytest.mark.parametrize("log", [log_with_structlog, log_with_the_standard_library])
def test_an_exception_is_one_object_too(log: Any) -> None:
    """Ours and other libraries' alike, traceback and level included."""
    stream = configured()
    log()
    found = stream.document()
    assert (found["event"], found["level"]) == ("it failed", "error")
    assert "ValueError: first\nsecond" in found["exception"]
    assert found["exception"].startswith("Traceback")


@pytest.mark.parametrize("value", [object(), {1, 2}, b"\xff", float("nan"), "a\nb", "\u2028\x00"])
def test_any_value_fits_into_a_line(value: Any) -> None:
    stream = configured()
    structlog.get_logger("ichat_lifecycle").info("event\nwith lines", value=value)
    assert stream.getvalue().count("\n") == 1
    assert stream.document()["event"] == "event\nwith lines"


def test_secrets_are_scrubbed_wherever_they_stand() -> None:
    """In events, fields and tracebacks, of ours, of libraries and of engine processes."""
    secrets = Secrets()
    stream = configured(secrets=secrets)
    secrets.add('hunter"2')  # after configure(): arguments are parsed later
    log = structlog.get_logger("ichat_lifecycle")
    log.info('key hunter"2', nested={"list": ['hunter"2']})
    logging.getLogger("elsewhere").info("with %s", 'hunter"2')
    logs.log_engine_line('INFO 11-22 16:00:00 [a.py:1] api_key=hunter"2')
    try:
        raise ValueError('hunter"2')
    except ValueError:
        log.exception("failed")
    assert len(stream.documents()) == 4
    assert "hunter" not in stream.getvalue()
    assert stream.getvalue().count("***") >= 5


# --- levels


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_lowest_level_counts_for_all_sources(level: str, heard: list[str]) -> None:
    stream = configured(level=level)
    sources = [structlog.get_logger("ichat_lifecycle"), logging.getLogger("elsewhere")]
    for name in ("debug", "info", "warning", "error"):
        for source in sources:
            getattr(source, name)("x")
        logs.log_engine_line(f"{name.upper()} 11-22 16:00:00 [a.py:1] x")
    assert [d["level"] for d in stream.documents()] == [name for name in heard for _ in range(3)]


def test_a_library_that_changes_the_root_does_not_silence_us() -> None:
    """As some of vLLM's do at import."""
    stream = configured()
    logging.getLogger().setLevel(logging.ERROR)
    structlog.get_logger("ichat_lifecycle.probe").info("ours")
    logs.log_engine_line("theirs")
    logging.getLogger("elsewhere").info("silenced")
    assert [d["event"] for d in stream.documents()] == ["ours", "theirs"]


@pytest.mark.parametrize("name", logs._QUIET)
def test_chatty_libraries_are_heard_from_warning_on(name: str) -> None:
    stream = configured(level="debug")
    logging.getLogger(name).info("HTTP Request: GET")
    logging.getLogger(name).warning("trouble")
    assert [d["event"] for d in stream.documents()] == ["trouble"]


def test_adopted_loggers_go_the_common_way() -> None:
    """vLLM configures handlers of its own: each line would come twice, and not as JSON."""
    stream = configured()
    own = io.StringIO()
    logger = logging.getLogger("vllm")
    logger.addHandler(logging.StreamHandler(own))
    logger.propagate = False
    logs.adopt(LoggingChoice())
    logger.warning("once")
    assert (stream.document()["event"], own.getvalue()) == ("once", "")


def test_configuring_again_replaces() -> None:
    """No line comes twice."""
    first, second = configured(), configured()
    structlog.get_logger("ichat_lifecycle").info("x")
    assert first.getvalue() == ""
    assert second.document()["event"] == "x"


# --- for people


def in_console(line: str) -> list[str]:
    stream = configured(as_json=False)
    logs.log_engine_line(line)
    return stream.getvalue().splitlines()


def test_all_sources_have_one_shape() -> None:
    """Time, level, who, what, and where in the source."""
    stream = configured(as_json=False)
    structlog.get_logger("ichat_lifecycle").info("transition", dest="BOUND", cause=None)
    logging.getLogger("vllm.config").warning("from the main process")
    logs.log_engine_line(NEW.format(level="INFO", text="Starting to load model"))
    ours, main, core = (line.partition(" ")[2] for line in stream.getvalue().splitlines())
    assert ours == "info     lifecycle   transition dest=BOUND"
    assert main.startswith("warning  vllm        from the main process (test_logs.py:")
    assert core == "info     EngineCore  Starting to load model (core.py:110)"


def test_a_line_fits_a_terminal_and_can_forge_no_other() -> None:
    """What a client has had printed cannot look like a line of its own."""
    long = in_console(NEW.format(level="INFO", text="word " * 100))
    assert len(long) > 1
    assert max(map(len, long)) <= console_lines.WIDTH
    record = {"levelname": "INFO", "message": "x\n12:00:00 error lifecycle \x1b[31mforged"}
    _, second = in_console(json.dumps(record))
    assert second.startswith("    12:00:00 error")
    assert "\x1b" not in second


def test_a_traceback_shows_no_values_of_variables() -> None:
    """They can be secrets."""
    stream = configured(as_json=False)
    hidden = "hunter" + str(2)
    try:
        raise ValueError(len(hidden))
    except ValueError:
        structlog.get_logger("ichat_lifecycle").exception("failed")
    assert "ValueError: 7" in stream.getvalue()
    assert hidden not in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_text_is_coloured_only_in_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "terminal", terminal)
    stream = configured(as_json=False)
    structlog.get_logger("ichat_lifecycle").warning("careful", n=1)
    text = stream.getvalue()
    assert "careful" in text
    assert ("\x1b[" in text) is terminal


def test_our_stream_survives_a_redirected_descriptor() -> None:
    """While an engine starts, descriptor 2 leads into its pipe: our lines must not go there."""
    script = """
import os, sys
from ichat_lifecycle.adapters.logs import own_stderr
stream = own_stderr()
reader, writer = os.pipe()
os.dup2(writer, 2)
print("ours", file=stream, flush=True)
os.set_blocking(reader, False)
try:
    print("lost:", os.read(reader, 100))
except BlockingIOError:
    print("kept")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("kept\n", "ours\n")


def test_a_forked_process_says_whose_line_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """EngineCore is forked with our logging in place: its lines carry its pid."""
    stream = configured()
    log = structlog.get_logger("ichat_lifecycle")
    log.info("ours")
    monkeypatch.setattr(logs, "_main_pid", -1)
    log.info("a child's")
    ours, childs = stream.documents()
    assert "pid" not in ours
    assert childs["process"] == "EngineCore"
    assert isinstance(childs["pid"], int)


def test_loggers_that_a_dictconfig_switched_off_speak_again() -> None:
    """Up to 0.30 vLLM's configuration disables the loggers that are there already."""
    ours, theirs = logging.getLogger("ichat_lifecycle.some"), logging.getLogger("somebody.else")
    logging.config.dictConfig({"version": 1, "incremental": False})
    assert ours.disabled
    logs.adopt(LoggingChoice())
    assert not ours.disabled
    assert theirs.disabled


class FullDisk(Stream):
    """Takes nothing."""

    def write(self, text: str, /) -> int:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_dropped_without_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A report on stderr would be logged again while an engine starts, and so on without end."""
    logs.configure(FullDisk(), as_json=True, scrub=str, level="info")
    structlog.get_logger("ichat_lifecycle").info("something")
    logs.log_engine_line("INFO 11-22 16:00:00 [core.py:110] from the engine")
    assert capsys.readouterr() == ("", "")


def test_another_failure_of_logging_is_still_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(text: str) -> str:
        raise TypeError("a bug of ours")

    logs.configure(Stream(), as_json=True, scrub=broken, level="info")
    structlog.get_logger("ichat_lifecycle").info("something")
    assert "a bug of ours" in capsys.readouterr().err
