"""What a client makes of documents: whatever they hold, and of what is none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from client_story import Story, hung
from stand_ins import NOON

from ichat_lifecycle.client.address import base_url, fleet_url
from ichat_lifecycle.client.documents import (
    MalformedError,
    Phase,
    as_text,
    parse_entry,
    parse_gap,
    parse_history,
    parse_status,
)
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.states import State, Trigger


def test_a_document_is_read_whole() -> None:
    story = Story(in_flight=3).loading(2, expected_s=30.0).after(2.5)
    document = story.document()
    status = parse_status(document)
    assert (status.state, status.ready, status.for_s, status.seq) == (State.BOUND, False, 2.6, 1)
    assert (status.model, status.pid, status.in_flight) == ("demo", 4242, 3)
    assert (status.start_id, status.control_url) == ("5eed", "http://127.0.0.1:18000")
    assert (status.vllm_version, status.stop_bound_s) == ("0.32.0", story.settings.stop_bound)
    assert status.progress.phase == "configuring"
    assert status.progress.expected_s == 30.0
    assert status.progress.phases[1:] == (Phase("importing", 0.2), Phase("configuring", 10.1))
    assert status.now == NOON + timedelta(seconds=12.6), "the worker's clock, not ours"
    assert status.raw is document


def test_the_reason_is_read_whole() -> None:
    status = parse_status(hung(Story()).document())
    assert status.reason is not None
    assert status.reason.code == "engine_hung"
    assert status.reason.hint.startswith("its processes are alive")
    assert status.reason.root_cause.startswith("RPC call")
    assert status.evidence.endswith("engine_hung-3f9a")


AT = "2026-01-02T12:00:00+00:00"


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (None, "no state"),
        ([], "no state"),
        ("READY", "no state"),
        ({"object": "list"}, "no state"),
        ({"state": "LOADING", "since": AT}, "'LOADING'"),
        ({"state": ["READY"], "since": AT}, "READY"),
        ({"state": "READY"}, "since when"),
        ({"state": "READY", "since": 7}, "since when"),
        ({"state": "READY", "since": "yesterday"}, "since when"),
        ({"state": "READY", "since": "2026-01-02T12:00:00"}, "since when"),  # whose noon?
    ],
)
def test_what_is_no_lifecycle_document_is_refused(document: Any, complaint: str) -> None:
    with pytest.raises(MalformedError, match=complaint):
        parse_status(document)


@pytest.mark.parametrize(
    "odd",
    [None, 7, "x", [], {}, True, float("inf"), {"phases": 3}, {"phases": [None, {"began_s": "x"}]}],
)
def test_all_that_is_not_needed_may_be_anything(odd: Any) -> None:
    """A newer worker, or an older one, may say things in another way."""
    names = ("for_s", "reason", "progress", "in_flight", "restarts", "seq", "pid", "model")
    status = parse_status({"state": "READY", "since": AT, **dict.fromkeys(names, odd)})
    assert status.state is State.READY
    assert status.progress.phases == ()


def test_a_history_is_merged_by_time() -> None:
    story = Story().loading(2).after(1)
    story.stage("drain", 0.5)
    entries = parse_history(story.history())
    assert [entry.kind for entry in entries] == ["phase", "phase", "transition", "phase", "stage"]
    assert entries[2].dest is State.BOUND
    assert entries[3].text("phase") == "configuring"


@pytest.mark.parametrize(
    "document", [None, [], {}, {"transitions": 1}, {"transitions": [1]}, {"transitions": [{}]}]
)
def test_what_is_no_history_is_refused(document: Any) -> None:
    with pytest.raises(MalformedError):
        parse_history(document)


def test_an_entry_of_a_verdict_knows_when_it_was_last_so() -> None:
    entry = Story().serving().idle(0.001, 0.002).entries()[-1]
    assert (entry.kind, entry.count("times"), entry.number("answered_s")) == ("verdict", 2, 0.002)
    assert entry.until - entry.at == timedelta(seconds=5)
    assert entry.dest is None


def test_an_entry_without_its_time_is_refused() -> None:
    odd: list[Any] = [None, [], {"at": "noon"}, {}]
    for item in odd:
        with pytest.raises(MalformedError):
            parse_entry("phase", item)


def test_a_transition_leads_somewhere() -> None:
    first = next(e for e in Story().fire(Trigger.BIND).entries() if e.kind == "transition")
    assert (first.dest, first.start_id, first.id) == (State.BOUND, "5eed", 2)
    assert first.at == datetime(2026, 1, 2, 12, tzinfo=UTC)


def test_a_gap_says_how_much_is_missing() -> None:
    assert parse_gap({"after": 3, "to": 9}).missing == 6
    odd: list[Any] = [None, [], {"after": 3}, "x"]
    for item in odd:
        with pytest.raises(MalformedError):
            parse_gap(item)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("演示 model", "演示 model"),
        ("two\nlines\tof  it", "two lines of it"),
        ("\x1b[31mred\x1b]0;title\x07", "red"),
        ("\x9b2J", "�2J"),
        ("\udcff", "�"),
        ("a\u202eb", "a�b"),  # turns the direction of writing
    ],
)
def test_no_text_commands_the_terminal(text: str, shown: str) -> None:
    assert as_text(text) == shown


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:18000", "http://127.0.0.1:18000"),
        ("http://127.0.0.1:18000/", "http://127.0.0.1:18000"),
        ("http://127.0.0.1:18000/lifecycle", "http://127.0.0.1:18000"),
        ("https://gateway/worker/1/", "https://gateway/worker/1"),
        ("10.0.0.7:18000", "http://10.0.0.7:18000"),
        (":18000", "http://127.0.0.1:18000"),
        ("18000", "http://127.0.0.1:18000"),
        ("[::1]:18000", "http://[::1]:18000"),
        ("worker", "http://worker"),
    ],
)
def test_a_url_may_be_written_shortly(text: str, url: str) -> None:
    assert base_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://x",
        "http://",
        "http://x:99999",
        "x:y",
        "http://u:p@x",
        "x?y",
        "x#y",
        "http://[",
        "http://x:",
        "99999",
        "a\nb",
    ],
)
def test_what_is_no_url_is_a_mistake(text: str) -> None:
    with pytest.raises(ArgumentsError, match="no URL of a worker"):
        base_url(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("14000", "http://127.0.0.1:14000"),
        (":14000", "http://127.0.0.1:14000"),
        ("localhost:14000", "http://127.0.0.1:14000"),
        ("HTTP://LOCALHOST:14000/", "http://127.0.0.1:14000"),
        ("[::1]:14000", "http://[::1]:14000"),
        ("https://host/prefix/fleet", "https://host/prefix"),
        ("unix:/run/../run/fleet.sock", "unix:/run/fleet.sock"),
    ],
)
def test_a_fleet_may_be_named_shortly(text: str, url: str) -> None:
    assert fleet_url(text) == url


@pytest.mark.parametrize("text", ["", ":", "unix:", "unix:a\0b", "http://u:p@x", "x:y", "a\x1bb"])
def test_what_names_no_fleet_is_a_mistake(text: str) -> None:
    with pytest.raises(ArgumentsError, match="no URL of a fleet") as caught:
        fleet_url(text)
    assert caught.value.line().isprintable()
