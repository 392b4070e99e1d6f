"""What a worker tells of itself: nothing but what is right gets in, and nothing raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import NOON, FakeIdentity, FakeLife

from ichat_lifecycle.adapters.sd_notify import DATAGRAM_LIMIT, LIFECYCLE, WORDS_LIMIT, Notifier
from ichat_lifecycle.control.view import summary_document
from ichat_lifecycle.fleet.told import NAME_LIMIT, Message, Told, message_in
from ichat_lifecycle.journal import Progress, Reason, Snapshot
from ichat_lifecycle.states import State


def told(document: Any) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document)
    return f"{LIFECYCLE}={text}".encode(errors="surrogatepass")


def honest(snapshot: Snapshot) -> bytes:
    """As a worker's own Notifier sends it."""
    sent: list[str] = []
    life = FakeLife(snapshot)
    notifier = Notifier(lambda: life.snapshot, lambda: summary_document(life, FakeIdentity()), {})
    notifier._send = lambda lines: sent.extend(f"{k}={v}" for k, v in lines.items())  # type: ignore[method-assign]
    notifier.changed(snapshot)
    return "\n".join(sent).encode(errors="replace")


def test_all_that_an_honest_worker_tells_is_understood() -> None:
    reason = Reason("engine_died", "it broke", "why", "do this", "engine")
    progress = Progress(phase="loading_weights", fraction=0.5, expected_s=12.5)
    for state in State:
        message = message_in(honest(Snapshot(state, NOON, 0.0, reason=reason, progress=progress)))
        assert message.alive
        assert message.told is not None, message.problem
        assert message.told.state is state
        assert (message.told.message, message.told.phase) == ("it broke", "loading_weights")
        assert (message.told.fraction, message.told.expected_s) == (0.5, 12.5)
        assert message.told.control_port == 18000


@pytest.mark.parametrize("text", ["x", "\U0001f600", "\x00", '"', "\ud800", "中"])
def test_an_honest_state_arrives_whatever_its_reason_is(text: str) -> None:
    """It is cut where it is sent: it fits into a datagram, and the state counts."""
    long = text * 100_000
    snapshot = Snapshot(State.DEGRADED, NOON, 0.0, reason=Reason("c", long, long, long))
    data = honest(snapshot)
    assert len(data) < DATAGRAM_LIMIT
    message = message_in(data)
    assert message.told is not None, message.problem
    assert message.told.state is State.DEGRADED
    assert len(message.told.message or "") <= WORDS_LIMIT
    assert "\x00" not in (message.told.message or "")


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{",
        "[1]",
        "null",
        "[" * 15_000,
        '{"state":' * 5_000,
        '{"state": "READY", "x": ' + "[" * 15_000 + "]" * 15_000 + "}",
        {"state": "READY", "reason": "text"},
        {"state": "READY", "reason": {"message": 5}},
        {"state": "READY", "reason": {}},
        {"state": "HAPPY"},
        {"state": ["READY"]},
        {"state": None},
        {"reason": None},
        '{"state": "READY", "fraction": NaN}',
        '{"state": "READY", "fraction": 1e999}',
        '{"state": "READY", "fraction": -1}',
        '{"state": "READY", "expected_s": Infinity}',
        {"state": "READY", "expected_s": "abc"},
        {"state": "READY", "expected_s": 1e300},
        '{"state": "READY", "expected_s": ' + "9" * 5_000 + "}",
        {"state": "READY", "phase": {}},
        {"state": "READY", "control_url": 5},
        {"state": "READY", "control_url": "http://127.0.0.1:70000"},
        {"state": "READY", "control_url": "http://127.0.0.1:0"},
        {"state": "READY", "control_url": "http://127.0.0.1"},
        {"state": "READY", "control_url": "file:///etc/passwd"},
        {"state": "READY", "control_url": "http://[::1:5"},
        {"state": "READY", "control_url": "http://a:5/" + "x" * 1000},
    ],
)
def test_nonsense_is_named_and_is_no_sign_of_life(document: Any) -> None:
    message = message_in(told(document))
    assert message == Message(problem=message.problem)
    assert 0 < len(message.problem) < 200


def test_a_problem_does_not_repeat_what_was_told() -> None:
    message = message_in(told({"state": "READY", "phase": ["sk-secret"]}))
    assert message.problem == "phase: Input should be a valid string"


def test_what_is_no_news_may_be_a_sign_of_life_and_is_no_nonsense() -> None:
    assert message_in(b"WATCHDOG=1") == Message(alive=True)
    assert message_in(b"A=1\nWATCHDOG=1\nB=2") == Message(alive=True)
    for data in (b"", b"READY=1", b"\xff\xfe", b"STATUS=x", b"WATCHDOG=trigger", b"XWATCHDOG=1"):
        assert message_in(data) == Message()
    both = message_in(b"WATCHDOG=1\n" + told("{"))
    assert (both.alive, both.told) == (True, None)
    assert both.problem


def test_another_line_end_within_a_line_begins_no_line() -> None:
    """The protocol knows one; str.splitlines knows ten."""
    for end in ("\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"):
        data = f"STATUS=x{end}".encode() + told({"state": "READY"})
        assert message_in(data).told is None


def test_a_message_that_contradicts_itself_is_nonsense() -> None:
    twice = told({"state": "READY"}) + b"\n" + told({"state": "STOPPED"})
    assert message_in(twice).told is None
    assert "more than once" in message_in(twice).problem


def test_words_are_one_line_that_is_cut() -> None:
    document = {
        "state": "READY",
        "reason": {"message": "a\nb\x1b]0;title\x07\u009bc" + "x" * 5000, "more": [1]},
        "phase": "p" * 100,
        "unknown": {"a": 1},
    }
    found = message_in(told(document)).told
    assert found is not None
    assert (found.message or "").startswith("a b\ufffdcxxx")
    assert len(found.message or "") <= WORDS_LIMIT
    assert found.phase == "p" * NAME_LIMIT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
FIELDS = ("state", "reason", "phase", "fraction", "expected_s", "control_url", "x")


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        json_values
        | st.sampled_from([*State, "http://127.0.0.1:5", 0.5])
        | st.fixed_dictionaries({"message": json_values}),
    )
)
def test_whatever_is_told_what_gets_in_can_be_shown(document: dict[str, Any]) -> None:
    message = message_in(told(document))
    if message.told is not None:
        assert message.told.state in State
        json.dumps(message.told.model_dump(mode="json"), allow_nan=False)
        assert message.told.control_port is None or 0 < message.told.control_port < 65_536


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_no_bytes_raise(before: bytes, after: bytes) -> None:
    message_in(before)
    message_in(before + b"\n" + LIFECYCLE.encode() + b"=" + after)


def test_secrets_are_taken_out_of_what_others_are_shown() -> None:
    told = Told.model_validate({"state": State.STOPPED, "reason": {"message": "no s3cret"}})
    clean = told.scrubbed(lambda text: text.replace("s3cret", "***"))
    assert (clean.message, clean.state, clean.phase) == ("no ***", State.STOPPED, None)
