"""A worker's line in the supervisor's log: data, whatever it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ichat_lifecycle.fleet.lines import bad_line, json_line
from ichat_lifecycle.strict_json import parse


def shown(line: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json_line("a", line))
    assert next(iter(document)) == "worker"
    return document


def test_a_line_gets_its_workers_name() -> None:
    assert shown('{"event": "x", "n": 1}') == {"worker": "a", "event": "x", "n": 1}
    assert shown("text") == {"worker": "a", "event": "text", "logger": "worker"}


def test_a_worker_speaks_for_itself_only() -> None:
    line = '{"worker": "b", "logger": "ichat_lifecycle.fleet", "event": "worker_killed"}'
    assert shown(line) == {"worker": "a", "logger": "worker", "event": "worker_killed"}
    again = '{"event": "x", "worker": "b", "worker": "c"}'
    assert shown(again) == {"worker": "a", "event": "x"}


@pytest.mark.parametrize(
    "line",
    [
        "[" * 15_000,
        '{"a":' * 3_000,
        '{"event": "x", "a": ' + "[" * 7_000 + "]" * 7_000 + "}",
        '{"event": NaN}',
        '{"event": 1e999}',
        '{"event": ' + "9" * 5_000 + "}",
        "{}",
        "null",
    ],
)
def test_what_json_cannot_carry_is_text(line: str) -> None:
    assert shown(line) == {"worker": "a", "event": line, "logger": "worker"}
    assert bad_line("a", line) == ""


def test_no_control_character_hides_in_json() -> None:
    event = "a\\u009b2Jb\\nworker: error: forged"
    line = f'{{"level": "error", "event": "{event}", "x": "\\u001b]0;t\\u0007"}}'
    for text in (json_line("a", line), bad_line("a", line)):
        assert not set(text) & {"\x9b", "\x1b", "\x07", "\n"}
    assert bad_line("a", line) == "a: error: a\ufffd2Jb worker: error: forged x="


@given(st.text())
@example('{"level": ["error"], "event": {}}')
def test_no_line_raises(line: str) -> None:
    json.loads(json_line("a", line))
    bad_line("a", line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_what_is_parsed_can_be_written_again(value: Any) -> None:
    try:
        parsed = parse(json.dumps(value))
    except ValueError:
        return
    assert json.loads(json.dumps(parsed, allow_nan=False)) == parsed


@given(st.binary())
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    try:
        json.dumps(parse(data), allow_nan=False)
    except ValueError:
        return


def test_bytes_that_were_no_text_keep_no_line_from_being_shown() -> None:
    """Python writes a path with them so, and an honest worker logs it."""
    line = '{"event": "gone: /x\\udcff", "level": "error"}'
    assert shown(line) == {"worker": "a", "event": "gone: /x\ufffd", "level": "error"}
    assert bad_line("a", line).startswith("a: error: gone: /x")
