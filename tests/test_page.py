"""The page without a browser: what is on it, that nothing gets out of its place, and its cost."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from html.parser import HTMLParser
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from stand_ins import NOON, FakeIdentity, FakeLife

from ichat_lifecycle import __version__
from ichat_lifecycle.control.app import build_control_app
from ichat_lifecycle.control.desk import LoopDesk
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.page import probes, render, timeline
from ichat_lifecycle.control.page.course import KEPT, Course, Stays
from ichat_lifecycle.control.page.model import EVENTS_SHOWN, WINDOWS, Page, page_of
from ichat_lifecycle.control.page.probes import Sample, Samples
from ichat_lifecycle.control.page.timeline import PIXELS, TICKS_AT_MOST, Span
from ichat_lifecycle.control.page.words import clock, happened, length
from ichat_lifecycle.diagram import STYLE
from ichat_lifecycle.journal import (
    AttemptOutcome,
    AttemptRecord,
    Kind,
    PhaseRecord,
    Progress,
    Reason,
    Record,
    RecoveryRecord,
    Snapshot,
    StageOutcome,
    StageRecord,
    TransitionRecord,
    VerdictRecord,
)
from ichat_lifecycle.ports import Notice, Signs, Verdict, VerdictKind
from ichat_lifecycle.states import TABLE, State, Trigger, row_for

UP = (Trigger.BIND, Trigger.START_ENGINE, Trigger.SERVE, Trigger.BECOME_READY)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}\u202e"
IDENTITY = FakeIdentity("演示", in_flight=7)


@dataclass
class MovingLife(FakeLife):
    """A life in which something happens when the test says so; its clock is 0 at NOON."""

    snapshot: Snapshot = field(default_factory=lambda: Snapshot(State.PARSED, NOON, 0.0))
    restarts_left: int = 2

    @property
    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.now_s)

    def after(self, seconds: float, trigger: Trigger, **changes: Any) -> None:
        """A transition, so long after what was last."""
        self.now_s += seconds
        old = self.snapshot
        row = row_for(old.state, trigger)
        assert row is not None
        record = TransitionRecord(
            old.seq + 1, trigger, old.state, row.dest, self.now, self.now_s, 0.25, None
        )
        self.journal.add(Kind.TRANSITION, record)
        snapshot = {"state": row.dest, "since": self.now, "since_mono_s": self.now_s}
        self.change(**{**snapshot, "seq": record.seq, **changes})

    def change(self, **changes: Any) -> None:
        values = {name: getattr(self.snapshot, name) for name in Snapshot.__dataclass_fields__}
        self.snapshot = Snapshot(**{**values, **changes})

    def up(self, **changes: Any) -> None:
        """To READY, in 4 s."""
        self.journal.add(Kind.PHASE, PhaseRecord(self.now, "starting", None, 0.0))
        for trigger in UP:
            self.after(1, trigger)
        self.change(**changes)

    def flap(self, times: int, seconds: float = 1) -> None:
        """Between READY and DEGRADED."""
        for trigger in islice(cycle([Trigger.DEGRADE, Trigger.RECOVER]), times):
            self.after(seconds, trigger)


def page(
    life: MovingLife,
    window: str = "all",
    loop: LoopHealth | None = None,
    samples: list[Sample] | None = None,
    identity: FakeIdentity | None = None,
) -> Page:
    return page_of(
        life,
        identity or IDENTITY,
        loop or LoopHealth(),
        samples or [],
        Course(life.journal),
        window,
    )


def alive(**changes: Any) -> MovingLife:
    life = MovingLife()
    life.up(**changes)
    return life


def judged(kind: VerdictKind, at_s: float, **signs: Any) -> VerdictRecord:
    at = NOON + timedelta(seconds=at_s)
    return VerdictRecord(at, at, State.READY, Verdict(kind, Signs(**signs)))


# Words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.0003, "0.3 ms"),
        (0.25, "250 ms"),
        (4.21, "4.2 s"),
        (42.9, "42 s"),
        (192, "3 min 12 s"),
        (180, "3 min"),
        (7260, "2 h 1 min"),
        (7200, "2 h"),
        (187_200, "2 d 4 h"),
    ],
)
def test_a_length_is_told_in_the_units_that_matter(seconds: float, text: str) -> None:
    assert length(seconds) == text


def test_a_time_of_another_day_says_which() -> None:
    assert clock(NOON, NOON) == "12:00:00"
    assert clock(NOON - timedelta(days=1), NOON) == "01-01 12:00:00"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            TransitionRecord(1, Trigger.STOP, State.READY, State.STOPPING, NOON, 1, 0.5, "SIGTERM"),
            "READY → STOPPING by stop, 500 ms: SIGTERM",
        ),
        (
            AttemptRecord(
                NOON, Trigger.SERVE, State.ENGINE_UP, AttemptOutcome.FAILED, 2.0, "no app"
            ),
            "serve from ENGINE_UP failed after 2.0 s: no app",
        ),
        (judged(VerdictKind.HUNG, 0, silent_s=12), "hung: no answer, silent for 12 s"),
        (
            PhaseRecord(NOON, "loading_weights", 0.5, 3.0),
            "loading weights 50 %, 3.0 s after the beginning",
        ),
        (
            StageRecord(NOON, "drain", StageOutcome.TIMED_OUT, 12.0, 3),
            "drain timed out in 12 s, 3 requests ended",
        ),
        (RecoveryRecord(NOON, "backoff", 2, 1.5), "backoff 1.5 s, 2 restarts left"),
    ],
)
def test_each_kind_of_record_is_told_in_a_line(record: Record, text: str) -> None:
    assert happened(record) == text


# Header, reason, start, stop ----------------------------------------------------------------------


def test_the_header_says_who_and_where_the_worker_is() -> None:
    life = alive(restarts=1)
    life.now_s += 61
    head = page(life).head
    assert (head.state, head.tone, head.model) == (State.READY, "good", "演示")
    assert (head.since.text, head.lasts) == ("12:00:04", "1 min 1 s")
    facts = {fact.name: f"{fact.value} {fact.unit}".strip() for fact in head.facts}
    assert facts == {
        "in flight": "7 requests",
        "restarts": "1 2 of 3 left within 1 h",
        "loop lag": "0 s",
        "pid": "42",
        "vLLM": "0.32.0",
        "ichat_lifecycle": __version__,
    }


@pytest.mark.parametrize("state", State)
def test_each_state_has_words_and_a_sign_and_not_only_a_colour(state: State) -> None:
    head = page(MovingLife(Snapshot(state, NOON, 0.0))).head
    assert head.meaning
    assert head.sign


def test_a_blocked_loop_is_no_good_whatever_the_state() -> None:
    shown = page(alive(), loop=LoopHealth(4.0, True, "middleware.py:3"))
    assert shown.head.tone == "warn"
    assert any("blocked" in note for note in shown.head.notes)
    assert shown.trouble is not None
    assert shown.trouble.root_cause == "middleware.py:3"


def test_what_is_said_beside_the_state() -> None:
    asleep = Verdict(VerdictKind.ASLEEP, Signs(answered_s=0.001))
    notes = page(alive(stop_asked=True, last_verdict=asleep)).head.notes
    assert notes == ("A stop was asked for.", "The engine sleeps.")
    assert page(alive()).head.notes == ()


def test_a_warning_is_a_note_with_its_cause_and_hint() -> None:
    notice = Notice("chat_template_broken", "no chats", "line 1: <b>", "mend it")
    life = alive(warnings=(notice, Notice("other", "beware")))
    first, second = page(life).head.notes
    assert first == "Warning: no chats; cause: line 1: <b>; mend it"
    assert second == "Warning: beware"


def test_the_reason_is_there_in_full() -> None:
    hint = "look at " + "the log " * 200
    life = alive()
    reason = Reason("engine_died", "it ended", "signal 9", hint, "memory")
    life.after(1, Trigger.DEGRADE, reason=reason, evidence="/e/1")
    trouble = page(life).trouble
    assert trouble is not None
    assert (trouble.code, trouble.message) == ("engine_died (memory)", "it ended")
    assert (trouble.root_cause, trouble.hint, trouble.evidence) == ("signal 9", hint, "/e/1")


def test_evidence_outlasts_the_trouble() -> None:
    trouble = page(alive(evidence="/e/1")).trouble
    assert trouble is not None
    assert (trouble.code, trouble.evidence) == ("", "/e/1")
    assert page(alive()).trouble is None


def test_a_start_shows_its_phases_and_what_is_expected() -> None:
    phases = (("importing", 0.0), ("loading_weights", 2.0))
    progress = Progress("loading_weights", 0.25, 0.0, None, 20.0, 3, phases)
    start = page(MovingLife(Snapshot(State.BOUND, NOON, 0.0, progress=progress), now_s=10.0)).start
    assert start.running
    assert (start.elapsed, start.expected, start.rest) == (
        "10 s",
        "20 s, the median of 3 earlier starts with these arguments",
        "about 10 s left",
    )
    assert start.expected_at == 100
    first, second = start.phases
    assert (first.name, first.took, first.left, first.width, first.now) == (
        "importing",
        "2.0 s",
        0,
        10,
        False,
    )
    assert (second.name, second.left, second.width, second.now) == ("loading weights", 10, 40, True)
    assert (first.fraction, second.fraction, second.part) == (None, 0.25, "25 %")


def test_a_start_that_is_late_says_so_and_keeps_its_scale() -> None:
    progress = Progress("loading_weights", None, 0.0, None, 5.0, 1, (("loading_weights", 0.0),))
    start = page(MovingLife(Snapshot(State.BOUND, NOON, 0.0, progress=progress), now_s=20.0)).start
    assert start.rest == "15 s longer than expected"
    assert (start.expected_at, start.phases[0].width) == (25, 100)


def test_a_start_that_has_ended_is_not_expected_any_more() -> None:
    progress = Progress("ready", None, 0.0, 4.0, 5.0, 1, (("importing", 0.0),))
    start = page(alive(progress=progress)).start
    assert (start.running, start.rest, start.elapsed) == (False, None, "4.0 s")
    assert not start.phases[0].now


def test_a_stop_shows_its_stages_and_its_bound() -> None:
    life = alive()
    life.journal.add(Kind.STAGE, StageRecord(life.now, "drain", StageOutcome.DONE, 1.0, 1))
    life.after(60, Trigger.STOP)
    life.now_s += life.settings.stop_bound / 2
    cut = StageRecord(life.now, "cut", StageOutcome.FAILED, 1.0, 2, "boom")
    life.journal.add(Kind.STAGE, cut)
    stop = page(life).stop
    assert stop is not None
    assert (stop.part, stop.bound) == (50, length(life.settings.stop_bound))
    assert [(s.name, s.well, s.told) for s in stop.stages] == [
        ("cut", False, "2 requests ended, boom")
    ], "the drain of an earlier restart is no part of it"
    assert page(alive()).stop is None


@pytest.mark.parametrize(
    ("state", "can"),
    [
        (State.BOUND, {"stop", "stop-now"}),
        (State.READY, {"stop", "stop-now", "restart", "sleep", "wake"}),
        (State.DEGRADED, {"stop", "stop-now", "restart", "sleep", "wake"}),
        (State.STOPPING, {"stop-now"}),
        (State.STOPPED, set()),
    ],
)
def test_the_commands_that_make_sense(state: State, can: set[str]) -> None:
    assert set(page(MovingLife(Snapshot(state, NOON, 0.0))).can) == can


# Course and time line -----------------------------------------------------------------------------


def bars(shown: Page) -> dict[str, list[tuple[float, float, int]]]:
    return {r.state: [(b.left, b.width, b.times) for b in r.bars] for r in shown.line.rows}


def test_the_time_line_has_each_state_where_and_as_long_as_it_was() -> None:
    life = alive()
    life.now_s += 16  # 20 in all
    assert bars(page(life)) == {
        "PARSED": [(0, 5, 1)],
        "BOUND": [(5, 5, 1)],
        "ENGINE_UP": [(10, 5, 1)],
        "SERVING": [(15, 5, 1)],
        "READY": [(20, 80, 1)],
        "DEGRADED": [],
        "STOPPING": [],
        "STOPPED": [],
    }
    totals = {row.state.value: row.total for row in page(life).line.rows}
    assert (totals["BOUND"], totals["READY"], totals["STOPPED"]) == ("1.0 s", "16 s", "")


def test_the_time_line_begins_with_the_first_phase() -> None:
    life = MovingLife(now_s=5.0)
    life.journal.add(Kind.PHASE, PhaseRecord(life.now, "starting", None, 0.0))
    life.after(15, Trigger.BIND)
    assert page(life).line.shown == "15 s"


def test_without_a_phase_it_begins_with_the_first_trigger() -> None:
    life = MovingLife()
    life.after(100, Trigger.BIND)
    course = Course(life.journal)
    course.catch_up()
    assert course.begin_s == 99.75


def test_without_a_transition_it_begins_with_the_snapshot() -> None:
    life = MovingLife(Snapshot(State.PARSED, NOON, 100.0), now_s=130.0)
    assert page(life).line.shown == "30 s"
    assert bars(page(life))["PARSED"] == [(0, 100, 1)]


def test_what_has_been_dropped_is_not_guessed() -> None:
    life = alive()
    life.flap(KEPT)
    course = Course(life.journal)
    course.catch_up()
    assert course.begin_s == life.journal.transitions[0].mono_s


@pytest.mark.parametrize(("window", "shown"), [("60", "1 min"), ("3600", "1 h"), ("all", "2 h")])
def test_the_time_line_can_be_zoomed(window: str, shown: str) -> None:
    life = alive()
    life.now_s = 7200
    assert page(life, window).line.shown == shown
    assert bars(page(life, window))["READY"][-1][0] == pytest.approx(0, abs=0.1)


def test_an_unknown_window_is_the_usual_one() -> None:
    life = alive()
    life.now_s = 7200
    assert page(life, "x' onload=").line.window == "600"


def test_no_window_is_longer_than_the_life() -> None:
    life = alive()
    life.now_s = 30
    assert page(life, "3600").line.shown == "30 s"
    life = MovingLife(now_s=0.0)
    assert page(life).line.shown == "10 s", "and none so short that it has no length"


def test_a_short_stay_is_seen_also_at_the_end() -> None:
    life = alive()
    life.after(100_000, Trigger.DEGRADE)
    shown = bars(page(life))
    assert shown["DEGRADED"] == [(100 - 100 / PIXELS, 100 / PIXELS, 1)]
    assert shown["BOUND"][0][1] == 100 / PIXELS


def test_what_is_narrower_than_a_pixel_is_drawn_together_and_counted() -> None:
    life = alive()
    life.after(10_000, Trigger.DEGRADE)
    life.after(1, Trigger.RECOVER)
    life.flap(4)
    life.now_s += 10_000
    shown = bars(page(life))
    assert [times for _, _, times in shown["DEGRADED"]] == [3]
    assert [times for _, _, times in shown["READY"]] == [4]
    told = [bar.told for row in page(life).line.rows for bar in row.bars]
    assert any(text.startswith("DEGRADED 3 times, ") for text in told)


def slow_pieces(stays: Stays, begin_s: float, end_s: float, pixel_s: float) -> Iterator[Any]:
    """The same, one stay after the other."""
    inside = [
        [max(begin_s, begin), min(end_s, end), 1]
        for begin, end in zip(stays.begins, stays.ends, strict=True)
        if end > begin_s and begin < end_s
    ]
    while inside:
        first = inside.pop(0)
        while inside and inside[0][0] - first[1] < pixel_s:
            following = inside.pop(0)
            first = [first[0], following[1], first[2] + 1]
        yield tuple(first)


@pytest.mark.parametrize("pixel_s", [0.5, 3.0, 17.0, 1000.0])
@pytest.mark.parametrize("begin_s", [0.0, 50.5, 700.0])
def test_the_search_finds_what_going_through_all_finds(pixel_s: float, begin_s: float) -> None:
    stays, at_s = Stays(), 0.0
    for number in range(300):
        stay_s, gap_s = number * 7 % 5 + 0.25, number * number % 23
        stays.add(at_s, at_s + stay_s)
        at_s += stay_s + gap_s
    end_s = at_s * 0.9
    found = [(p.begin_s, p.end_s, p.times) for p in stays.pieces(begin_s, end_s, pixel_s)]
    assert found == list(slow_pieces(stays, begin_s, end_s, pixel_s))
    each = slow_pieces(stays, begin_s, end_s, 0.0)
    assert stays.total_s(begin_s, end_s) == pytest.approx(sum(b - a for a, b, _ in each))


def test_the_oldest_stays_go_and_the_sums_stay_right() -> None:
    stays = Stays()
    for number in range(2 * KEPT + 1):
        stays.add(number * 2, number * 2 + 1)
    assert len(stays.begins) == len(stays.ends) == len(stays.totals) - 1 == KEPT + 1
    assert stays.total_s(stays.begins[0] + 0.5, stays.ends[-1] - 0.25) == KEPT + 0.25


def test_a_course_takes_each_transition_once() -> None:
    life = alive()
    course = Course(life.journal)
    for _ in range(2):
        course.catch_up()
    assert course.taken == {(row.trigger, row.sources[0]): 1 for row in TABLE[:4]}
    life.flap(2)
    course.catch_up()
    assert course.taken[Trigger.DEGRADE, State.READY] == 1
    assert (course.state, course.entered_s) == (State.READY, 6)


@pytest.mark.parametrize("length_s", [10, 59, 60, 600, 3600, 86_399, 86_400, 1_000_000, 3e7])
def test_ticks_are_round_few_and_in_order(length_s: float) -> None:
    found = timeline.ticks(Span(0.0, length_s, NOON + timedelta(seconds=7.3)))
    assert 1 <= len(found) <= TICKS_AT_MOST
    places = [tick.left for tick in found]
    assert places == sorted(places)
    gaps = {round(b - a, 1) for a, b in pairwise(places)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 0.2


def test_a_tick_stands_at_its_time() -> None:
    ticks = timeline.ticks(Span(1000.0, 1600.0, NOON + timedelta(seconds=30)))
    assert [(tick.left, tick.label) for tick in ticks] == [
        (15.0, "11:52"),
        (35.0, "11:54"),
        (55.0, "11:56"),
        (75.0, "11:58"),
    ]


# Probes -------------------------------------------------------------------------------------------


def test_each_verdict_is_a_sample_though_the_journal_keeps_one_record() -> None:
    life = MovingLife()
    samples = Samples(life.journal)
    for number in range(5):
        verdict = Verdict(VerdictKind.IDLE, Signs(answered_s=0.001 * number))
        life.journal.judged(verdict, State.READY, NOON + timedelta(seconds=number))
        samples.note(life.snapshot)
        samples.note(life.snapshot)
    assert len(life.journal.verdicts) == 1
    assert [(s.at.second, s.latency_s) for s in samples.newest()] == [
        (number, 0.001 * number) for number in range(5)
    ]


def marks(*records: VerdictRecord) -> list[tuple[str, float]]:
    span = Span(0.0, 100.0, NOON + timedelta(seconds=100))
    found = probes.marks([Sample.of(r) for r in records], span, 10.0)
    return [(mark.kind, mark.left) for mark in found]


def test_verdicts_are_marked_by_what_they_mean() -> None:
    assert marks(
        judged(VerdictKind.IDLE, 10, answered_s=0.001),
        judged(VerdictKind.BUSY, 20, silent_s=3.0),
        judged(VerdictKind.HUNG, 30, silent_s=10.0),
        judged(VerdictKind.LOOP_BLOCKED, 40, loop_lag_s=2.0),
    ) == [("answer", 10), ("silent", 20), ("miss", 30), ("miss", 40)]


def test_only_the_window_is_drawn_and_at_one_place_the_worst() -> None:
    assert marks(
        judged(VerdictKind.HUNG, -1),
        judged(VerdictKind.HUNG, 50.0, silent_s=1.0),
        judged(VerdictKind.IDLE, 50.01, answered_s=5.0),
        judged(VerdictKind.IDLE, 100, answered_s=0.001),
    ) == [("miss", 50), ("answer", 100)]


def test_the_scale_is_logarithmic() -> None:
    lines = {line.label: line.top for line in probes.scale(10.0)}
    assert list(lines) == ["1 ms", "10 ms", "100 ms", "1 s", "10 s"]
    assert (lines["1 ms"], lines["10 s"]) == (80, 0)
    assert probes.limit(1.0, 10.0).top == lines["1 s"]


def test_the_newest_verdicts_and_events_come_first() -> None:
    life = alive()
    for number in range(EVENTS_SHOWN + 3):
        life.journal.add(Kind.RECOVERY, RecoveryRecord(life.now, "backoff", number, 1.0))
        life.journal.add(Kind.VERDICT, judged(VerdictKind.HUNG, number))
    shown = page(life)
    assert len(shown.events) == EVENTS_SHOWN
    assert shown.events[0].what == f"backoff 1.0 s, {EVENTS_SHOWN + 2} restarts left"
    assert {event.kind for event in shown.events} == {"recovery"}, "verdicts have their own list"
    assert shown.verdicts[0].time.text == f"12:00:{EVENTS_SHOWN + 2}"
    assert shown.verdicts[0].bad


# HTML ---------------------------------------------------------------------------------------------


class Bench:
    """The app with a page, and requests to it without a network."""

    def __init__(self, life: MovingLife | None = None, **options: Any) -> None:
        self.life = life or alive()
        self.identity = IDENTITY
        self.samples = Samples(self.life.journal)
        nobody: Any = None
        values: dict[str, Any] = {
            "token": "right-token",
            "engine": LoopDesk(nobody, nobody, lambda: None),
            "events": Events(self.life.journal, "5eed", Bell()),
            "samples": self.samples,
        }
        self.app = build_control_app(self.life, self.identity, **{**values, **options})

    def ask(self, path: str = "/", method: str = "GET") -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
                return await client.request(method, path)

        return asyncio.run(ask())


class Elements(HTMLParser):
    """All elements of a document with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(response: httpx.Response) -> list[tuple[str, dict[str, str | None]]]:
    return Elements(response.text).found


def test_the_page_is_not_on_the_main_port_nor_without_samples() -> None:
    for bench in (Bench(read_only=True), Bench(samples=None)):
        for path in ("/", "/page/view"):
            assert bench.ask(path).status_code == 404
    assert Bench().ask("/").status_code == 200


@pytest.mark.parametrize("path", ["/", "/page/view"])
def test_the_page_has_a_strict_policy_and_is_never_cached(path: str) -> None:
    headers = Bench().ask(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["content-type"] == "text/html; charset=utf-8"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    life = alive(reason=Reason("x", "y", "z", "h"), evidence="/e")
    life.journal.add(Kind.VERDICT, judged(VerdictKind.HUNG, 3))
    life.after(1, Trigger.STOP)
    found = elements(Bench(life).ask())
    assert len(found) > 100
    for tag, attributes in found:
        assert tag not in ("style", "iframe", "object", "embed", "form", "base")
        if tag == "script":
            assert attributes["src"]
        for name, value in attributes.items():
            assert name != "style" and not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("/", "?")) and not value.startswith("//"), value


def test_the_scripts_use_nothing_that_the_policy_forbids() -> None:
    for name, file in render.StaticFiles.load().files.items():
        text = file.content.decode()
        assert not re.search(r"\beval\(|new Function\(|setAttribute\(.style", text), name
        if name == "page.css":
            assert not re.search(r"url\((?!#)|@import", text)


def test_all_that_comes_from_a_worker_is_escaped() -> None:
    life = alive(reason=Reason(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE), evidence=HOSTILE)
    life.snapshot = Snapshot(
        State.DEGRADED,
        NOON,
        4.0,
        seq=4,
        reason=life.snapshot.reason,
        evidence=HOSTILE,
        progress=Progress(HOSTILE, 0.5, 0.0, None, None, 0, ((HOSTILE, 0.0),)),
    )
    life.journal.add(Kind.PHASE, PhaseRecord(NOON, HOSTILE, None, 0.0))
    life.journal.add(Kind.STAGE, StageRecord(NOON, HOSTILE, StageOutcome.FAILED, 1, 1, HOSTILE))
    record = judged(VerdictKind.HUNG, 3, error=HOSTILE, compiling=HOSTILE)
    life.journal.add(Kind.VERDICT, record)
    bench = Bench(life)
    bench.samples.note(life.snapshot)
    bench.identity = FakeIdentity(HOSTILE, HOSTILE, {HOSTILE: [HOSTILE]})
    bench.app = build_control_app(life, bench.identity, samples=bench.samples)
    response = bench.ask()
    assert response.text.count("alert(1)") > 10
    found = elements(response)
    assert "img" not in {tag for tag, _ in found}
    assert all(attributes.get("src") for tag, attributes in found if tag == "script")
    assert "{{7*7}}" in response.text, "it is no template either"
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)


def test_bytes_that_are_no_text_are_no_error() -> None:
    bench = Bench(alive(evidence="/tmp/\udcff"))
    response = bench.ask()
    assert response.status_code == 200
    assert "/tmp/?" in response.text


def test_without_javascript_it_is_a_whole_snapshot() -> None:
    life = alive(reason=Reason("engine_hung", "no answer", "rc", "look here"), evidence="/e/1")
    life.journal.add(Kind.VERDICT, judged(VerdictKind.HUNG, 3, silent_s=11))
    bench = Bench(life)
    bench.identity.arguments["max_model_len"] = 512
    text = bench.ask("/?window=60").text
    for expected in (
        '<meta http-equiv="refresh"',
        "演示",
        "READY",
        "takes requests",
        "engine_hung",
        "no answer",
        "look here",
        "/e/1",
        "The worker is READY",  # the diagram's
        "silent for 11 s",
        "SERVING → READY by become_ready",
        "max_model_len",
        'href="/lifecycle/history"',
        'href="?window=3600"',
    ):
        assert expected in text, expected


def test_the_zoom_that_is_chosen_is_marked() -> None:
    for window in WINDOWS:
        found = elements(Bench().ask(f"/page/view?window={window}"))
        chosen = [a["href"] for t, a in found if t == "a" and "aria-current" in a]
        assert chosen == [f"?window={window}"]


def test_the_part_that_changes_is_the_same_in_both() -> None:
    bench = Bench()
    part = bench.ask("/page/view").text
    assert part.startswith("<main ")
    assert part.strip() in bench.ask("/").text
    assert 'data-last-event="5eed-5"' in part


def test_the_page_says_whether_it_takes_commands() -> None:
    with_token, without = Bench().ask(), Bench(token=None).ask()
    buttons = [a for t, a in elements(with_token) if t == "button" and "data-command" in a]
    assert len(buttons) == 5
    assert all("disabled" in attributes for attributes in buttons), "until a token is typed in"
    assert "takes no commands" not in with_token.text
    assert "right-token" not in with_token.text
    assert "takes no commands" in without.text
    assert not [a for t, a in elements(without) if "data-command" in a or a.get("id") == "token"]
    assert "takes no commands" in Bench(engine=None).ask().text


def test_the_buttons_lead_to_routes_that_there_are() -> None:
    bench = Bench()
    posts = {
        getattr(r, "path", "") for r in bench.app.routes if "POST" in getattr(r, "methods", ())
    }
    paths = {a["data-path"] for _, a in elements(bench.ask()) if "data-path" in a}
    assert paths == posts - {"/lifecycle/engine/reset-prefix-cache"}


def test_the_links_lead_to_routes_that_there_are() -> None:
    bench = Bench(metrics=bytes)
    there = {getattr(route, "path", "") for route in bench.app.routes}
    links = {a["href"] for t, a in elements(bench.ask()) if t == "a"} - {
        f"?window={w}" for w in WINDOWS
    }
    assert {"/lifecycle", "/metrics"} <= links <= there


def test_the_page_listens_to_every_kind_of_event() -> None:
    body = next(a for t, a in elements(Bench().ask()) if t == "body")
    assert set(str(body["data-kinds"]).split()) == {*Kind, "gap"}


def test_what_is_static_may_be_cached_for_ever() -> None:
    bench = Bench()
    found = elements(bench.ask())
    paths = [a["src"] for t, a in found if t == "script"]
    paths += [a["href"] for t, a in found if t == "link"]
    assert len(paths) == 4
    for path in paths:
        response = bench.ask(str(path))
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]
        assert response.headers["x-content-type-options"] == "nosniff"
    types = {str(p).rpartition(".")[2]: bench.ask(str(p)).headers["content-type"] for p in paths}
    assert types == {
        "js": "text/javascript; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "svg": "image/svg+xml",
    }


def test_another_version_and_what_is_no_file_are_not_there() -> None:
    bench = Bench()
    version = render.StaticFiles.load().version
    for path in ("0/page.css", f"{version}/VENDORED.md", f"{version}/..%2Frender.py"):
        response = bench.ask(f"/page/static/{path}")
        assert response.status_code == 404
        assert "immutable" not in response.headers.get("cache-control", "")


@pytest.mark.parametrize("path", ["/", "/page/view"])
def test_head_is_answered_like_get(path: str) -> None:
    assert Bench().ask(path, "HEAD").status_code == 200


def test_the_pages_style_sheet_has_the_diagrams_style() -> None:
    assert STYLE.encode() in render.StaticFiles.load().files["page.css"].content
    assert "<style" not in Bench().ask().text


def test_what_is_vendored_is_what_was_published() -> None:
    static = Path(render.HERE) / "static"
    table = (static / "VENDORED.md").read_text(encoding="utf-8")
    [(name, digest)] = re.findall(r"^\| `([\w.]+)` .*`([0-9a-f]{64})` \|$", table, re.MULTILINE)
    assert hashlib.sha256((static / name).read_bytes()).hexdigest() == digest
    assert "Zero-Clause BSD" in table


# Colours ------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def palettes() -> dict[str, dict[str, str]]:
    """The colours of the light and of the dark page, by name; and when contact is lost."""
    text = (render.HERE / "static/page.css").read_text(encoding="utf-8")
    light, dark, lost, lost_dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r"(?:root|diagram) \{([^}]*)\}", text)[:4]
    )
    return {"light": light, "dark": dark, "lost": light | lost, "lost dark": dark | lost_dark}


@pytest.mark.parametrize("name", ["light", "dark", "lost", "lost dark"])
def test_all_text_has_enough_contrast(name: str) -> None:
    colours = palettes()[name]
    on_paper = [(text, ground) for text in ("ink", "soft", "link") for ground in ("card", "ground")]
    on_paper += [("ink", "bad-ground"), ("soft", "bad-ground"), ("bad", "bad-ground")]
    on_paper += [("ink", "warn-ground"), ("soft", "warn-ground"), ("warn", "card"), ("bad", "card")]
    on_paper += [("good", "card")]
    on_colour = [("on", ground) for ground in ("good", "warn", "busy", "end", "bad")]
    for text, ground in on_paper + on_colour:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_the_diagrams_text_has_enough_contrast() -> None:
    found = re.findall(r"\.diagram \{([^}]*)\}", STYLE)[:2]
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", block)) for block in found)
    light = {name: long(colour) for name, colour in light.items()}
    for colours in (light, light | {name: long(colour) for name, colour in dark.items()}):
        for ground in ("good", "warn", "busy", "end"):
            assert contrast(colours["paper"], colours[ground]) >= 4.5, ground
        assert contrast(colours["ink"], colours["paper"]) >= 7, "the names of edges are fainter"


def long(colour: str) -> str:
    """#abc as #aabbcc."""
    return colour if len(colour) > 4 else "#" + "".join(2 * digit for digit in colour[1:])


# Cost ---------------------------------------------------------------------------------------------


def test_the_page_is_bounded_however_much_has_happened() -> None:
    """Its cost follows what is drawn: of 10 000 transitions no more than the pixels there are."""
    life = alive()
    for trigger in islice(cycle([Trigger.DEGRADE, Trigger.RECOVER]), KEPT - 4):
        life.after(1 + life.snapshot.seq % 97, trigger)
    bench = Bench(life)
    for number in range(5000):
        record = judged(VerdictKind.HUNG, life.now_s - number, silent_s=1)
        bench.samples._samples.appendleft(Sample.of(record))
    for window in WINDOWS:
        text = bench.ask(f"/page/view?window={window}").text
        assert text.count('class="stay ') <= 2 * PIXELS
        assert text.count('class="missed"') <= probes.PLACES + 1
        assert len(text) < 100_000


def test_no_transition_is_gone_through_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    life = alive()
    life.flap(1000)
    course = Course(life.journal)
    page_of(life, IDENTITY, LoopHealth(), [], course)
    taken: list[TransitionRecord] = []
    monkeypatch.setattr(Course, "_take", lambda self, record: taken.append(record))
    life.after(1, Trigger.DEGRADE)
    page_of(life, IDENTITY, LoopHealth(), [], course)
    assert [record.seq for record in taken] == [1005]
