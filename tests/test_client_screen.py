"""The watch screen, without a terminal: what it shows in each situation, in any size."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, timedelta

import pytest
from client_story import URL, Story, hung, stopping
from rich.console import Console
from stand_ins import NOON

from ichat_lifecycle.client.documents import parse_status
from ichat_lifecycle.client.errors import GoneError
from ichat_lifecycle.client.logbook import DOCUMENTS, EVENTS, Logbook, Scene
from ichat_lifecycle.client.screen import Screen, screen_lines
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.journal import Reason, StageOutcome
from ichat_lifecycle.ports import VerdictKind
from ichat_lifecycle.states import State, Trigger

SIZES = [(80, 24), (140, 40), (60, 20), (40, 10), (20, 5), (300, 100)]


def ready() -> Story:
    return Story(in_flight=4).serving(30.0).idle(*[0.0018, 0.0024] * 20, every_s=60)


def loading() -> Story:
    story = Story().loading(4, expected_s=30.0).after(3.1)
    return story.phase("loading_weights", 0.45).after(0.5)


def lost() -> Scene:
    book = ready().book()
    book.lose(DOCUMENTS, GoneError("nothing listens there: connection refused"), NOON)
    return book.scene()


SCENES = {
    "parsed": Story(vllm_version=None).scene(),
    "loading": loading().scene(),
    "ready": ready().scene(),
    "degraded": hung(Story()).scene(),
    "stopping": stopping(Story()).scene(),
    "lost": lost(),
    "odd": Story(model="演示" * 60).fire(Trigger.BIND, cause="x" * 400).scene(),
}


def text_of(scene: Scene, width: int = 80, height: int = 24) -> list[str]:
    """As somebody without colours sees it; in UTC."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=height, color_system=None, highlight=False)
    console.print(Screen(replace(scene, zone=UTC)))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def flat(line: str) -> str:
    return " ".join(line.split())


def section(lines: list[str], label: str) -> list[str]:
    """The lines beside a label."""
    labels = [line[:10].strip() for line in lines]
    if label not in labels:
        return []
    begin = labels.index(label)
    rest = labels[begin + 1 :]
    end = next((at for at, text in enumerate(rest) if text), len(rest))
    return [line[10:] for line in lines[begin : begin + 1 + end] if line]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SCENES)
def test_a_screen_is_never_larger_than_its_terminal(name: str, size: tuple[int, int]) -> None:
    width, height = size
    lines = screen_lines(SCENES[name], width, height)
    assert len(lines) <= height
    assert [line.plain for line in lines if line.cell_len > width] == []


@pytest.mark.parametrize("name", SCENES)
def test_where_the_worker_is_stands_on_every_screen(name: str) -> None:
    for size in SIZES[:4]:
        lines = text_of(SCENES[name], *size)
        assert SCENES[name].state in "".join(lines[:2])
        assert f"[{SCENES[name].state}]" in "".join(lines)


def test_the_header_of_a_ready_worker() -> None:
    first, second, *_ = text_of(ready().scene())
    assert flat(first) == "demo READY for 40 min 0 s · 4 in flight · 0 restarts 12:40:26"
    assert flat(second) == "http://127.0.0.1:18000 · pid 4242 · vLLM 0.32.0 since 12:00:26"


def test_the_path_is_that_of_the_table() -> None:
    path = text_of(ready().scene())[3].strip()
    assert path == (
        "PARSED → BOUND → ENGINE_UP → SERVING → [READY] ⇄ DEGRADED → STOPPING → STOPPED"
    )


def test_the_states_that_it_has_been_in_are_told_from_those_that_it_has_not() -> None:
    line = screen_lines(loading().scene(), 80, 24)[3]
    style = {line.plain[span.start : span.end]: span.style for span in line.spans}
    assert style["PARSED"] != style["READY"]
    assert "bold" in str(style["[BOUND]"])


def test_a_load_shows_its_phases_and_what_is_expected() -> None:
    head, *phases = section(text_of(loading().scene()), "Load")
    assert head.startswith("20 s of about 30 s")
    assert head.count("━") / (head.count("━") + head.count("─")) == pytest.approx(2 / 3, abs=0.05)
    assert [phase[:34].split() for phase in phases] == [
        ["starting", "200", "ms"],
        ["importing", "9.9", "s"],
        ["configuring", "1.1", "s"],
        ["starting", "engine", "5.2", "s"],
        ["▸", "loading", "weights", "45%", "3.6", "s"],
    ]
    begins = [phase.index("━") for phase in phases]
    assert begins == sorted(begins), "one after the other"


def test_a_load_that_takes_longer_than_expected_says_so() -> None:
    head, *_ = section(text_of(Story().loading(5, expected_s=10.0).scene()), "Load")
    assert head == "20 s, earlier starts took about 10 s"


def test_a_load_goes_on_between_two_documents() -> None:
    scene = loading().scene()
    later = replace(scene, now=scene.now + timedelta(seconds=7))
    lines = section(text_of(later), "Load")
    assert lines[0].startswith("27 s of about 30 s")
    assert "10 s" in lines[-1], "3.6 and 7"


def test_many_phases_leave_room_and_the_newest_are_shown() -> None:
    story = Story().fire(Trigger.BIND)
    for number in range(40):
        story.after(1).phase(f"phase_{number}")
    lines = text_of(story.scene())
    assert len(lines) <= 24
    assert "▸ phase 39" in section(lines, "Load")[-1]
    assert section(lines, "Events")


def test_a_finished_load_is_one_line_where_there_is_little_room() -> None:
    (line,) = section(text_of(ready().scene()), "Load")
    assert line.startswith("26 s, expected about 30 s; importing 9.9 s, starting engine 5.2 s")
    assert len(section(text_of(ready().scene(), 140, 40), "Load")) == 11


def test_the_life_so_far_and_how_much_of_it_was_ready() -> None:
    strip, axis = section(text_of(ready().scene()), "Life")
    assert strip[0] == "░"
    assert strip[1:] == "█" * 68
    assert flat(axis) == "12:00:00 READY 98.9 % of 40 min 26 s now"


def test_a_life_with_a_moment_out_of_service_was_not_ready_all_the_time() -> None:
    story = Story()
    for trigger in (Trigger.BIND, Trigger.START_ENGINE, Trigger.SERVE, Trigger.BECOME_READY):
        story.fire(trigger)
    story.after(1e6).fire(Trigger.DEGRADE).after(0.5).fire(Trigger.RECOVER)
    strip, axis = section(text_of(story.scene()), "Life")
    assert "▞" in strip
    assert "READY 99.9 %" in axis


def test_a_life_that_was_never_ready_has_no_share() -> None:
    assert flat(section(text_of(loading().scene()), "Life")[1]) == "12:00:00 20 s now"


def test_probes_and_verdicts() -> None:
    story = Story().serving()
    book = story.book()
    for answered_s in [0.002] * 30 + [0.048]:
        story.after(5).verdict(VerdictKind.IDLE, answered_s)
        book.take(story.entries()[-1])  # live: each of them is seen
    story.after(5).verdict(VerdictKind.HUNG, silent_s=12.0, in_flight=2)
    book.take(story.entries()[-1])
    lines = text_of(book.scene())
    (probe,) = section(lines, "Probe")
    assert probe == f"{'▁' * 28}█x  no answer; median 2.0 ms, most 48 ms"
    first, last = section(lines, "Verdicts")
    assert first == "12:03:01  idle 31 times, answered in 48 ms"
    assert last == "12:03:06  hung, no answer for 12 s, 2 in flight"
    assert len(section(text_of(book.scene(), 140, 40), "Probe")) == 3


def test_why_a_worker_is_not_ready_is_told_in_full() -> None:
    story = hung(Story())
    lines = text_of(story.scene())
    reason = story.snapshot.reason
    assert reason and reason.root_cause and reason.hint and story.snapshot.evidence
    assert section(lines, "Reason") == [f"{reason.code}: {reason.message}"]
    assert " ".join(section(lines, "Cause")) == reason.root_cause
    assert " ".join(section(lines, "Hint")) == reason.hint
    assert "".join(section(lines, "Evidence")) == story.snapshot.evidence
    assert section(lines, "Events")[-1].endswith(
        "a pause of 3.4 s before the next engine, 2 restarts left"
    )


def test_a_reason_that_is_longer_than_the_screen_says_where_the_rest_is() -> None:
    story = Story().fire(Trigger.STOP, Reason("engine_died", "word " * 2000))
    lines = text_of(story.scene())
    assert len(lines) == 24
    assert "more lines: ichat-lifecycle status http://127.0.0.1:18000 --json" in lines[-1]


def test_a_blocked_worker_does_not_look_ready() -> None:
    story = ready()
    book = story.book()
    book.take_status(parse_status(story.document(LoopHealth(7.5, True, "slow.py:3 in wait"))))
    scene = book.scene()
    assert not scene.ready
    assert section(text_of(scene), "Cause") == ["slow.py:3 in wait"]


def test_what_a_stop_has_done_so_far() -> None:
    story = stopping(Story()).stage("release engine", 10, outcome=StageOutcome.TIMED_OUT)
    head, *stages = section(text_of(story.scene()), "Stop")
    assert head.startswith("6 s of at most 26 s  ")
    assert [stage.strip() for stage in stages] == [
        "drain done, 3 requests ended in 4.2 s",
        "release watchdog done in 0.4 ms",
        "release app done in 50 ms",
        "release engine timed out in 10 s",
    ]


def test_lost_contact_is_told_with_since_when_and_why() -> None:
    lines = text_of(lost())
    assert "(stale)" in lines[0]
    assert lines[2].strip() == (
        "no contact for 0 s, since 12:00:00: nothing listens there: connection refused;"
    )
    assert lines[3].strip() == "trying again"


def test_events_alone_can_be_missing() -> None:
    book = ready().book()
    book.lose(EVENTS, GoneError("gone"), NOON)
    lines = text_of(book.scene())
    assert "(stale)" not in lines[0]
    assert "no events for 0 s" in lines[2]
    book.regain(EVENTS)
    assert text_of(book.scene())[2] == ""


def test_the_newest_events_are_shown_without_healthy_verdicts() -> None:
    events = section(text_of(ready().scene()), "Events")
    assert events[-1] == "12:00:26  SERVING → READY by become_ready in 800 ms"
    assert not any("idle" in event for event in events)


# --- what a watcher knows


def test_the_newer_of_document_and_events_says_where_the_worker_is() -> None:
    story = Story().serving()
    book = story.book()
    story.after(10).fire(Trigger.DEGRADE)
    book.take(story.entries()[-1])
    scene = book.scene()
    assert (scene.state, scene.since) == (State.DEGRADED, story.now())
    assert not scene.ready


def test_time_stands_still_while_nothing_is_heard() -> None:
    clock_s = [0.0]
    story = ready()
    book = Logbook(URL, parse_status(story.document()), lambda: clock_s[0])
    clock_s[0] = 3.0
    assert book.scene().now - story.now() == timedelta(seconds=3)
    book.lose(DOCUMENTS, GoneError("hung up"), NOON)
    clock_s[0] = 10.0
    book.lose(DOCUMENTS, GoneError("refused"), NOON + timedelta(seconds=7))
    scene = book.scene()
    assert scene.now == story.now(), "nobody knows whether it is still READY"
    assert scene.no_contact is not None
    assert (scene.no_contact.since, scene.no_contact.for_s) == (NOON, 7.0)
    assert scene.no_contact.error.message == "refused", "the newest cause"


def test_another_life_at_the_same_address_begins_anew() -> None:
    book = hung(Story()).book()
    second = Story(began=NOON + timedelta(hours=2), start_id="second").fire(Trigger.BIND)
    book.take(second.entries()[0])
    assert len(book.scene().entries) == 1
    book = hung(Story()).book()
    book.take_status(parse_status(second.document()))
    scene = book.scene()
    assert (scene.state, scene.entries, scene.probes) == (State.BOUND, (), ())


def test_a_worker_about_to_end_is_known_as_that() -> None:
    assert not ready().book().ending
    assert stopping(Story()).book().ending
