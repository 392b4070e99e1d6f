"""The one parser of what vLLM's processes print."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ichat_lifecycle.log_line import LogLine, parse
from ichat_lifecycle.printable import plain

NEW = "(EngineCore pid=12) INFO 11-22 16:00:00 [core.py:110] text"
CORE = LogLine("text", "info", "EngineCore", 12, "core.py:110")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (NEW, CORE),
        (
            "(Worker_TP0 pid=7) ERROR 11-22 16:00:00 [a.py:1] x",
            LogLine("x", "error", "Worker_TP0", 7, "a.py:1"),
        ),
        ("INFO 11-22 16:00:00 [core.py:110] text", replace(CORE, process="", pid=None)),
        ("ERROR 11-22 16:00:00 [core.py:1] ", LogLine("", "error", place="core.py:1")),
        ("(EngineCore pid=12) Traceback:", LogLine("Traceback:", process="EngineCore", pid=12)),
        ("(EngineCore pid=12) ", LogLine("", process="EngineCore", pid=12)),
        ("text (EngineCore pid=12) INFO", LogLine("text (EngineCore pid=12) INFO")),
        ("(not a process) text", LogLine("(not a process) text")),
        ("INFO says nothing", LogLine("INFO says nothing")),
        ("{no JSON", LogLine("{no JSON")),
        ("[1]", LogLine("[1]")),
        ("", LogLine("")),
    ],
)
def test_the_forms_of_a_line(line: str, expected: LogLine) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize("prefix", ["[n1] ", "(n1) ", "node-3 | ", "{json} ", "\x1b[1mn1\x1b[0m "])
def test_a_users_own_prefix(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the process in newer versions, behind it in older ones, where all lines carry it."""
    monkeypatch.setenv("VLLM_LOGGING_PREFIX", prefix)
    shown = plain(prefix)
    assert parse(shown + NEW) == CORE
    assert parse(NEW.replace("INFO", f"{shown}INFO")) == CORE
    assert parse(NEW) == CORE


def test_a_record_in_json() -> None:
    record = {"levelname": "ERROR", "name": "vllm.v1.core", "processName": "EngineCore"}
    line = json.dumps(record | {"process": 12, "message": "a\nb", "exc_info": "Traceback\nE: c"})
    found = parse(line)
    assert found == LogLine(
        "a\nb", "error", "EngineCore", 12, logger="vllm.v1.core", traceback="Traceback\nE: c"
    )
    assert found.lines == ("a", "b", "Traceback", "E: c")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;a title\x07after", "after"),
        ("\x1b]52;c;Y2xpcA==\x1b\\after", "after"),
        ("\x1b[2J\x1b[Hafter", "after"),
        ("\x9b31mred\x07", "\ufffd31mred\ufffd"),
        ("a\tb", "a\tb"),
        ("\x1bcafter", "after"),
        ("plain", "plain"),
    ],
)
def test_a_terminal_obeys_nothing_of_it(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(max_size=300))
def test_whatever_is_printed_is_a_line(text: str) -> None:
    found = parse(text)
    assert found.pid is None or found.pid > 0
    shown = plain(text)
    assert "\x1b" not in shown
    assert plain(shown) == shown


@pytest.mark.engine
@pytest.mark.untimed
@pytest.mark.parametrize("form", ["text", "json"])
def test_what_vllm_itself_formats(form: str) -> None:
    """By the classes and formats that it configures, a traceback included."""
    log = importlib.import_module("vllm.logger", "vllm")
    made: logging.Formatter
    if form == "json":
        made = importlib.import_module("pythonjsonlogger.json").JsonFormatter(log._JSON_FORMAT)
    else:
        formatters = importlib.import_module("vllm.logging_utils")
        made = formatters.NewLineFormatter(log._FORMAT, log._DATE_FORMAT, log_level="INFO")
    try:
        raise ValueError("no")
    except ValueError as error:
        caught = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("vllm.x", logging.ERROR, "core.py", 3, "failed", (), caught)
    record.vllm_process_name = record.processName = "EngineCore"
    found = [parse(line.strip("\r")) for line in made.format(record).split("\n")]
    assert {(line.level, line.process, line.pid) for line in found} == {
        ("error", "EngineCore", record.process)
    }
    texts = [text for line in found for text in line.lines]
    assert (texts[0], texts[-1]) == ("failed", "ValueError: no")


@pytest.mark.parametrize(
    "pid", ["abc", "", " 7 ", "٤", "9" * 5000, "-1", "1e3", [], None, 1.5, True]
)
def test_a_pid_in_json_that_is_no_number_is_left_out(pid: object) -> None:
    """An error here ended the thread that reads the engine's pipe, and so the engine."""
    ours = json.dumps({"event": "x", "level": "info", "pid": pid})
    vllms = json.dumps({"message": "x", "levelname": "INFO", "process": pid})

    assert parse(ours) == parse(vllms) == LogLine("x", "info")


def test_json_cannot_smuggle_what_a_terminal_obeys() -> None:
    evil = "a\x1b]0;title\x07\x1b[2Jb\ud800\x07"
    line = json.dumps({"message": evil, "levelname": "INFO", "name": evil, "exc_info": evil})
    ours = json.dumps({"event": evil, "level": "info", "process": evil})
    assert plain(line) == line  # nothing to be seen before the JSON is read

    for found in (parse(line), parse(ours)):
        for text in (found.text, found.logger, found.traceback, found.process):
            assert text == plain(text)
        assert found.text == "ab\ufffd\ufffd"
