"""What a worker prints, as the supervisor shows it. Nothing here raises, whatever a line holds."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from ichat_lifecycle.printable import json_text, one_line
from ichat_lifecycle.strict_json import parse_object

SUPERVISOR = "ichat_lifecycle.fleet"  # the logger of our own lines
# Bytes that were no text, such as in a path: Python writes them so, and others do not read that.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_HIDDEN = ("event", "level", "logger", "timestamp", "start_id", "exception", "stack")


def json_line(name: str, line: str) -> str:
    """A worker's line with its name; what is no JSON is wrapped into some.

    A worker speaks for itself only: it can give neither another's name nor the supervisor's logger.
    """
    document = _document_in(line) or {"event": line, "logger": "worker"}
    if str(document.get("logger")).startswith(SUPERVISOR):
        document["logger"] = "worker"
    document.pop("worker", None)
    return json_text({"worker": name, **document})


def bad_line(name: str, line: str) -> str:
    """A worker's line for people; "" where nothing is wrong. The rest is in `logs NAME`."""
    document = _document_in(line) or {}
    if document.get("level") not in ("warning", "error", "critical"):
        return ""
    fields = " ".join(f"{k}={v}" for k, v in document.items() if k not in _HIDDEN and v is not None)
    return one_line(f"{name}: {document['level']}: {document.get('event')} {fields}")


def _document_in(line: str) -> dict[str, Any] | None:
    if not line.lstrip().startswith("{"):
        return None
    for text in (line, _SURROGATE.sub("\\\\ufffd", line)):
        with contextlib.suppress(ValueError):
            return parse_object(text)
    return None
