"""`ichat-lifecycle status` and `history`: what they print, and what they end with."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from client_story import Story, hung, stopping
from client_worker import LiveWorker, http_answer, lived, nobody, own_proc, something_else
from rich.console import Console

from ichat_lifecycle.client import find
from ichat_lifecycle.client.documents import parse_history, parse_status
from ichat_lifecycle.client.find import Worker
from ichat_lifecycle.client.history import all_table, history_command, transitions_table
from ichat_lifecycle.client.look import console_for
from ichat_lifecycle.client.status import print_lines, status_command
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.errors import ArgumentsError, LifecycleError
from ichat_lifecycle.ports import Notice
from ichat_lifecycle.states import State, Trigger

URL = "http://127.0.0.1:18000"


def to_text() -> tuple[Console, io.StringIO]:
    """A console as commands have it where stdout is no terminal."""
    stream = io.StringIO()
    return console_for(stream), stream


def line_of(story: Story, loop: LoopHealth | None = None) -> str:
    console, stream = to_text()
    print_lines(console, [Worker(URL, parse_status(story.document(loop)))])
    (line,) = stream.getvalue().splitlines()
    return line


def words(line: str) -> list[str]:
    """The columns."""
    return re.split(r"  +", line)


# --- status


def test_a_ready_worker_is_one_line() -> None:
    story = Story(in_flight=4).serving().after(3 * 3600 + 12 * 60)
    assert words(line_of(story)) == [
        "demo",
        "READY",
        "for 3 h 12 min",
        "4 in flight",
        "0 restarts",
        URL,
    ]


def test_one_that_starts_tells_phase_percent_and_expected_time() -> None:
    story = Story().loading(4, expected_s=30.0).after(7).phase("loading_weights", 0.45)
    assert words(line_of(story))[-1] == "loading weights 45%, 23 s of about 30 s"
    late = Story().loading(4, expected_s=10.0)
    assert words(line_of(late))[-1] == "loading weights, 16 s, earlier starts took about 10 s"
    first = Story().loading(4)
    assert words(line_of(first))[-1] == "loading weights, 16 s"


def test_one_that_is_not_ready_tells_why() -> None:
    line = line_of(hung(Story()))
    assert "DEGRADED" in line
    assert line.endswith("engine_hung: the engine hangs: no answer from the engine for 10 s")


def test_a_warning_is_shown_of_a_ready_worker_too() -> None:
    story = Story().serving()
    story.recorder.warn(Notice("chat_template_broken", "no chats", "line 1", "mend it"))
    assert line_of(story).endswith("warning: chat_template_broken: no chats")
    (warning,) = parse_status(story.document()).warnings
    assert (warning.root_cause, warning.hint) == ("line 1", "mend it")
    odd = {**story.document(), "warnings": ["text", None, 3]}
    assert parse_status(odd).warnings == ()


def test_a_blocked_worker_is_not_ready_and_tells_why() -> None:
    line = line_of(Story().serving(), LoopHealth(7.5, True, "slow.py:3 in wait"))
    assert "READY" in line
    assert "loop_blocked: " in line


def test_several_workers_stand_in_columns() -> None:
    console, stream = to_text()
    stories = (Story(model="a").serving(), Story(model="longer").loading(2))
    print_lines(console, [Worker(URL, parse_status(story.document())) for story in stories])
    first, second = stream.getvalue().splitlines()
    assert first.index("READY") == second.index("BOUND")
    assert first.index(URL) == second.index(URL)
    assert not first.endswith(" ")


def test_a_long_line_is_neither_cut_nor_folded() -> None:
    story = Story(model="m" * 500).serving()
    assert "m" * 500 in line_of(story)


@pytest.mark.parametrize(("moves", "code"), [([], 1), ([Trigger.BIND], 1)])
def test_the_exit_code_says_whether_all_are_ready(moves: list[Trigger], code: int) -> None:
    async def scenario() -> None:
        console, stream = to_text()
        async with LiveWorker() as one, LiveWorker(model="two") as two:
            one.story.serving()
            assert await status_command([one.url], console) == 0
            for trigger in moves:
                two.story.fire(trigger)
            assert await status_command([one.url, two.url], console) == code
        assert len(stream.getvalue().splitlines()) == 3

    lived(scenario)


def test_one_that_does_not_answer_is_told_beside_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def scenario() -> None:
        console, stream = to_text()
        with nobody() as dead:
            async with LiveWorker() as worker, something_else(NO_WORKER) as other:
                worker.story.serving()
                assert await status_command([worker.url, dead, other], console) == 69
        assert len(stream.getvalue().splitlines()) == 1
        said = capsys.readouterr().err.splitlines()
        assert [dead in said[0], "connection refused" in said[0]] == [True, True]
        assert [other in said[1], "404" in said[1]] == [True, True]

    lived(scenario)


NO_WORKER = http_answer("404 Not Found", "application/json", b"{}")


def test_without_a_url_all_workers_of_the_machine_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "PROC", own_proc(tmp_path))

    async def scenario() -> None:
        console, stream = to_text()
        with pytest.raises(LifecycleError) as caught:
            await status_command([], console)
        assert caught.value.exit_code == 69
        async with LiveWorker(model="one") as one, LiveWorker(model="two") as two:
            one.story.serving()
            two.story.serving()
            assert await status_command([], console) == 0
        assert sorted(words(line)[0] for line in stream.getvalue().splitlines()) == ["one", "two"]

    lived(scenario)


def test_json_is_the_documents_with_their_urls() -> None:
    async def scenario() -> None:
        console, stream = to_text()
        async with LiveWorker(model="演示") as worker:
            assert await status_command([worker.url], console, as_json=True) == 1
            document = worker.story.document()
        (shown,) = json.loads(stream.getvalue())
        assert shown["url"] == worker.url
        assert (shown["model"], shown["state"]) == ("演示", "PARSED")
        assert shown.keys() == {"url", *document}
        assert stream.getvalue().isascii()

    lived(scenario)


def test_a_mistaken_url_is_a_mistake() -> None:
    console, _ = to_text()

    async def scenario() -> None:
        with pytest.raises(ArgumentsError):
            await status_command(["ftp://x"], console)

    lived(scenario)


# --- history


def printed(table: Any, width: int | None = None) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False) if width else console_for(stream)
    console.print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def entries_of(story: Story) -> Any:
    return parse_history(story.history())


def test_transitions_are_a_table() -> None:
    from datetime import UTC

    story = stopping(Story())
    head, *lines = printed(transitions_table(entries_of(story), plain=True, zone=UTC))
    assert words(head.strip()) == ["seq", "time", "trigger", "from → to", "took", "cause"]
    assert len(lines) == len(story.journal.transitions)
    assert words(lines[0].strip()) == [
        "1",
        "2026-01-02 12:00:10.000",
        "bind",
        "PARSED → BOUND",
        "9.8 s",
    ]
    assert words(lines[-1].strip())[2:] == ["stop", "READY → STOPPING", "0.4 ms", "SIGTERM"]


def test_all_is_merged_by_time() -> None:
    story = hung(Story())
    head, *lines = printed(all_table(entries_of(story), plain=True))
    assert words(head.strip())[2] == "event"
    events = [re.search(r"\d\.\d{3}  (\w+)", line) for line in lines]
    kinds = [found[1] for found in events if found]
    assert len(kinds) == len(story.journal.since(0))
    assert kinds[:4] == ["phase", "phase", "bind", "phase"]
    assert kinds[-4:] == ["verdict", "degrade", "recovery", "recovery"]
    assert "idle 40 times, answered in 1.9 ms" in "\n".join(lines)


def test_what_programs_read_is_not_cut() -> None:
    cause = "word " * 100 + "end"
    story = Story().fire(Trigger.BIND, cause=cause)
    lines = printed(transitions_table(entries_of(story), plain=True))
    assert len(lines) == 2
    assert lines[1].endswith(" end")


def test_in_a_terminal_what_is_long_is_folded_and_all_there() -> None:
    cause = " ".join(f"word{number}" for number in range(60)) + " /a" * 3 + "/long" * 60
    story = Story().fire(Trigger.BIND, cause=cause)
    lines = printed(transitions_table(entries_of(story)), width=80)
    assert max(map(len, lines)) <= 80
    shown = "".join(line[60:] for line in lines)
    assert "".join(cause.split()) in "".join(shown.split())


def test_the_history_of_a_worker_is_printed() -> None:
    async def scenario() -> None:
        async with LiveWorker() as worker:
            worker.story.serving()
            for everything, count in ((False, 5), (True, 1 + len(worker.story.entries()))):
                console, stream = to_text()
                code = await history_command(worker.url, console, everything=everything)
                assert (code, len(stream.getvalue().splitlines())) == (0, count)
            console, stream = to_text()
            assert await history_command(worker.url, console, as_json=True) == 0
            assert json.loads(stream.getvalue()) == worker.story.history()

    lived(scenario)


def test_a_terminal_that_knows_only_ascii_is_told_in_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    console = console_for(stream)
    console.print(transitions_table(entries_of(Story(model="演").serving()), plain=True))
    stream.flush()
    assert b"PARSED > BOUND" in raw.getvalue()


def test_states_of_a_newer_version_are_shown_as_they_are() -> None:
    item = {"seq": 1, "trigger": "x", "source": "LIMBO", "dest": "READY", "took_s": 0}
    at = {"at": "2026-01-02T12:00:00+00:00"}
    entries = parse_history({"transitions": [{**item, **at}]})
    assert "LIMBO → READY" in printed(transitions_table(entries, plain=True))[1]
    assert entries[0].dest is State.READY
