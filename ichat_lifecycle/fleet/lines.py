"""What a worker prints, as the supervisor shows it."""

from __future__ import annotations

import json
from typing import Any


def json_line(name: str, line: str) -> str:
    """A worker's line with its name; what is no JSON is wrapped into some."""
    document = _document_in(line) or {"event": line, "logger": "worker"}
    return json.dumps({"worker": name, **document}, ensure_ascii=False)


def bad_line(name: str, line: str) -> str:
    """A worker's line for people; "" where nothing is wrong. The rest is in `logs NAME`."""
    document = _document_in(line) or {}
    if document.get("level") not in ("warning", "error", "critical"):
        return ""
    hidden = ("event", "level", "logger", "timestamp", "start_id", "exception", "stack")
    fields = " ".join(f"{k}={v}" for k, v in document.items() if k not in hidden and v is not None)
    return f"{name}: {document['level']}: {document.get('event')} {fields}".rstrip()


def _document_in(line: str) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
