"""Which child printed a line, and how much of each is kept."""

from __future__ import annotations

import pytest

from ichat_lifecycle.adapters.engine_lines import (
    CHILDREN_KEPT,
    EngineLines,
    child_of,
    sort_by_child,
)


@pytest.mark.parametrize(
    ("line", "child"),
    [
        ("(EngineCore pid=12) INFO 11-22 16:00:00 [core.py:110] Initializing", "EngineCore"),
        ("(EngineCore_DP0 pid=12) INFO 11-22 16:00:00 [core.py:110] x", "EngineCore_DP0"),
        ("(Worker_PP0_TP1_EP1 pid=13) ERROR 11-22 16:00:00 [x.py:1] y", "Worker_PP0_TP1_EP1"),
        ("(VllmWorker-0 pid=13) WARNING 11-22 16:00:00 [x.py:1] y", "VllmWorker-0"),
        ("node-3 (Worker pid=13) INFO 11-22 16:00:00 [x.py:1] y", "engine"),
        ("(Worker pid=13) ", "Worker"),
        ("INFO 11-22 16:00:00 [core.py:708] an old vLLM's", "engine"),
        ("Traceback (most recent call last):", "engine"),
        ("text (that) says (Worker pid=13) INFO", "engine"),
        ("(../../etc pid=13) INFO", "engine"),
        ("(Worker pid=x) INFO", "engine"),
        ("", "engine"),
    ],
)
def test_whose_line_it_is(line: str, child: str) -> None:
    """By vLLM's own prefix, never by what stands in the text; the name can name a file."""
    assert child_of(line) == child


def test_lines_are_sorted_by_child_and_stay_in_order() -> None:
    lines = ["(A pid=1) 1", "(B pid=2) 1", "none", "(A pid=1) 2", "(A pid=3) 3"]
    assert sort_by_child(lines) == {
        "A": ("(A pid=1) 1", "(A pid=1) 2", "(A pid=3) 3"),
        "B": ("(B pid=2) 1",),
        "engine": ("none",),
    }
    assert sort_by_child([]) == {}


def test_each_child_keeps_its_newest() -> None:
    lines = ["(Quiet pid=1) 0", *(f"(Chatty pid=2) {n}" for n in range(100))]
    found = sort_by_child(lines, kept=2)
    assert found == {
        "Quiet": ("(Quiet pid=1) 0",),
        "Chatty": ("(Chatty pid=2) 98", "(Chatty pid=2) 99"),
    }


def test_all_of_them_come_in_the_order_in_which_they_were_printed() -> None:
    kept = EngineLines(2)
    for line in ("(B pid=2) 1", "(A pid=1) 1", "none", "(B pid=2) 2", "(B pid=2) 3"):
        kept.append(line)
    assert kept.all == ("(A pid=1) 1", "none", "(B pid=2) 2", "(B pid=2) 3")


def test_made_up_children_do_not_fill_the_memory() -> None:
    """Anything that prints can claim a name."""
    found = sort_by_child(f"(C{n} pid={n}) x" for n in range(CHILDREN_KEPT * 3))
    assert len(found) == CHILDREN_KEPT
    assert len(found["engine"]) == CHILDREN_KEPT * 2 + 1


def test_a_users_own_prefix_hides_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_PREFIX", "node-3 ")
    assert child_of("node-3 (Worker pid=13) INFO 11-22 16:00:00 [x.py:1] y") == "Worker"
    assert child_of("(Worker pid=13) node-3 INFO 11-22 16:00:00 [x.py:1] y") == "Worker"


def test_the_newest_lines_by_when_they_came() -> None:
    kept = EngineLines(2)
    for at_s, line in enumerate(("(A pid=1) 1", "(B pid=2) 1", "none", "(A pid=1) 2")):
        kept.append(line, float(at_s))
    assert kept.since(2.0) == ("none", "(A pid=1) 2")
    assert kept.since(9.0) == ()
    assert kept.since(0.0) == kept.all
