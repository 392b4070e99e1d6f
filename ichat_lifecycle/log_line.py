"""The one parser of a line that a process of vLLM's printed.

Three forms are known, all of which may carry `VLLM_LOGGING_PREFIX`:

- text, with or without the process: `(EngineCore pid=12) INFO 11-22 16:00:00 [core.py:110] text`;
- vLLM's JSON (`--logging-config.formatter json`);
- our own JSON, of an EngineCore that was forked with our logging in place.

Whatever else is printed is text without a level. A line is data: a client can have any text
printed, so that nothing in it may be more than shown. Nothing here raises.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ichat_lifecycle.printable import plain

PREFIX_VARIABLE = "VLLM_LOGGING_PREFIX"
PID_MAX = 2**22  # the kernel's own limit
NAME_LIMIT, PLACE_LIMIT = 64, 200  # characters

_PROCESS = re.compile(r"\((?P<process>[A-Za-z][\w. =-]{0,63}) pid=(?P<pid>\d{1,7})\) ?")
_LEVEL = re.compile(
    r"(?P<level>[A-Z]{3,12}) \d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)? \[(?P<place>[^\]\n]{0,200})\] ?"
)
_DIGITS = re.compile(r"[0-9]{1,7}")
# What ticks in a line that says the same again: times of day, durations, rates.
_TICKING = re.compile(
    r"\d+(?::\d\d)+(?:[.,]\d+)?|\d+(?:\.\d+)? ?(?:ms|sec(?:ond)?s?|s|min(?:ute)?s?|h(?:ours?)?)\b"
    r"|\d+(?:\.\d+)? ?(?:[kMGT]i?)?(?:it|B|token)s?/s|\d+(?:\.\d+)?s/it"
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """The parts of a line: its text, and the process that it names.

    Attributes:
        text: without the prefix; the message of a JSON line.
        level: in lower case; "" where the line carries none.
        process: its name, such as "Worker_TP0"; "" where the line carries none.
        pid: as the line has it, which proves nothing; None where the line carries none.
        place: file and line of the source; "" where the line carries none.
        logger: the logger of a JSON line; "" elsewhere.
        traceback: of a JSON line; "" elsewhere, where its lines are lines of their own.
    """

    text: str
    level: str = ""
    process: str = ""
    pid: int | None = None
    place: str = ""
    logger: str = ""
    traceback: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """The text and the traceback, line by line."""
        return (*self.text.splitlines(), *self.traceback.splitlines())

    @property
    def news(self) -> str:
        """The text without what ticks in it: equal for two lines that say the same."""
        return _TICKING.sub("0", self.text)


def parse(line: str) -> LogLine:
    """Take a line apart. A form that is not known is all text."""
    prefix = _prefix()
    rest = line.removeprefix(prefix)
    process, pid = "", None
    if found := _PROCESS.match(rest):
        process, pid = found["process"], _pid(found["pid"])
        rest = rest[found.end() :].removeprefix(prefix)
    if found := _LEVEL.match(rest):
        text = rest[found.end() :]
        return LogLine(text, found["level"].lower(), process, pid, found["place"])
    if rest.startswith("{") and (inner := _from_json(rest)) is not None:
        return inner
    return LogLine(rest if process else line, process=process, pid=pid)


def _prefix() -> str:
    """The user's own, as it arrives: of several lines the last one, and without colors."""
    return plain(os.environ.get(PREFIX_VARIABLE, "").rpartition("\n")[2])


def _from_json(text: str) -> LogLine | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    if isinstance(fields.get("message"), str) and "levelname" in fields:
        return _from_vllm(fields)
    if isinstance(fields.get("event"), str) and "level" in fields:
        return _from_ours(fields)
    return None


def _from_vllm(fields: Mapping[str, Any]) -> LogLine:
    traceback = "\n".join(filter(None, (_text(fields, "exc_info"), _text(fields, "stack_info"))))
    return LogLine(
        plain(fields["message"]),
        _text(fields, "levelname", NAME_LIMIT).lower(),
        _text(fields, "processName", NAME_LIMIT),
        _pid(fields.get("process")),
        logger=_text(fields, "name", PLACE_LIMIT),
        traceback=traceback,
    )


def _from_ours(fields: Mapping[str, Any]) -> LogLine:
    return LogLine(
        plain(fields["event"]),
        _text(fields, "level", NAME_LIMIT).lower(),
        _text(fields, "process", NAME_LIMIT),
        _pid(fields.get("pid")),
        logger=_text(fields, "logger", PLACE_LIMIT),
        traceback=_text(fields, "exception"),
    )


def _text(fields: Mapping[str, Any], name: str, limit: int | None = None) -> str:
    value = fields.get(name)
    # Again, because JSON can write a control character as \u001b, which looks harmless until here.
    return plain(value[:limit]) if isinstance(value, str) else ""


def _pid(value: Any) -> int | None:
    if isinstance(value, str):
        value = int(value) if _DIGITS.fullmatch(value) else None
    return value if type(value) is int and 0 < value <= PID_MAX else None
