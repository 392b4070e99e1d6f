"""What engine processes print, caught at the file descriptors and read in a thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from ichat_lifecycle.adapters.engine_lines import LINES_KEPT
from ichat_lifecycle.adapters.engine_output import EngineOutput
from ichat_lifecycle.adapters.line_splitter import LINE_LIMIT
from ichat_lifecycle.adapters.line_throttle import BURST, LINE_COST

DEADLINE_S = 30
CHILD = "import sys; print('child out'); print('child err', file=sys.stderr)"
# A child that lives until its standard input ends.
LIVES = [sys.executable, "-c", "import sys; sys.stdin.read(); print('last words')"]


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def output(shown: list[str]) -> Iterator[EngineOutput]:
    """Invariant of every test here: no thread and no file descriptor is left."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    made = EngineOutput(shown.append)
    yield made
    made.close()
    made.close()
    until(lambda: made.at_end)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def print_into(output: EngineOutput, text: str | bytes) -> None:
    """As an engine process would, at the descriptor; returns when all of it has been read."""
    with output.redirected():
        os.write(2, text.encode() if isinstance(text, str) else text)
    output.close()
    until(lambda: output.at_end)


# --- catching


def test_it_catches_this_process_and_its_children(output: EngineOutput, shown: list[str]) -> None:
    """At the descriptors 1 and 2, so libraries in C and children too."""
    with output.redirected():
        os.write(1, b"own out\n")
        os.write(2, b"own err\n")
        subprocess.run([sys.executable, "-c", CHILD], check=True, timeout=60)
    until(lambda: len(shown) == 4)
    assert sorted(shown) == ["child err", "child out", "own err", "own out"]
    assert output.lines == tuple(shown)


@pytest.mark.parametrize("error", [None, RuntimeError("load failed")])
def test_the_descriptors_are_put_back(
    output: EngineOutput,
    shown: list[str],
    error: Exception | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also after a load that failed; what is printed outside goes where it went before."""
    os.write(1, b"before\n")
    try:
        with output.redirected():
            os.write(1, b"within\n")
            if error is not None:
                raise error
    except RuntimeError as caught:
        assert caught is error
    os.write(1, b"after\n")
    os.write(2, b"after err\n")
    until(lambda: shown == ["within"])
    assert capfd.readouterr() == ("before\nafter\n", "after err\n")


def test_pythons_own_buffers_end_up_on_the_right_side() -> None:
    """What was printed but not flushed before, stays outside; and the other way round."""
    script = """
import sys, time
from ichat_lifecycle.adapters.engine_output import EngineOutput
shown = []
output = EngineOutput(shown.append)
sys.stdout.write("before;")
with output.redirected():
    sys.stdout.write("within;")
sys.stdout.write("after;")
output.close()
while not output.at_end:
    time.sleep(0.005)
print(shown)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert done.stdout == "before;after;['within;']\n"


# --- reading


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("no end", ["no end"]),
        ("\n", [""]),
        ("10%\r20%\rdone\r\n", ["10%", "20%", "done"]),
        ("\x1b[1;36m(EngineCore)\x1b[0;0m INFO\x1b[m\n", ["(EngineCore) INFO"]),
        (b"\xff\xfe broken\n", ["\ufffd\ufffd broken"]),
        ("x" * (LINE_LIMIT + 5) + "\n", ["x" * LINE_LIMIT, "xxxxx"]),
    ],
    ids=["lines", "no end", "empty", "progress", "colours", "no UTF-8", "long"],
)
def test_what_a_line_is(
    output: EngineOutput, shown: list[str], text: str | bytes, lines: list[str]
) -> None:
    print_into(output, text)
    assert shown == lines


def test_a_line_is_one_however_it_comes(output: EngineOutput, shown: list[str]) -> None:
    """The pipe may be read between any two bytes."""
    with output.redirected():
        for byte in "né\r\n10%\r20%\rend\n".encode():
            os.write(2, bytes([byte]))
            time.sleep(0.001)
    output.close()
    until(lambda: output.at_end)
    assert shown == ["né", "10%", "20%", "end"]


def test_a_step_of_a_progress_bar_is_seen_before_the_next_one(shown: list[str]) -> None:
    """That may take minutes: a bar ends its line only then. What is half a line is no line."""
    seen: list[str] = []
    lines: list[str] = []
    output = EngineOutput(shown.append, lines.append, seen.append)
    with output.redirected():
        os.write(2, b"\rLoading: 50% Completed")
        until(lambda: "Loading: 50% Completed" in seen)
        os.write(2, b"\rLoading: 100% Completed\n")
    output.close()
    until(lambda: output.at_end)
    until(lambda: output.at_end)
    assert shown == ["", "Loading: 50% Completed", "Loading: 100% Completed"]
    assert lines == ["Loading: 50% Completed", "Loading: 100% Completed"]


def test_only_the_newest_lines_are_kept(output: EngineOutput, shown: list[str]) -> None:
    """All are shown, but an engine that prints for a year must not fill the memory."""
    total = LINES_KEPT + 100
    print_into(output, "".join(f"{n}\n" for n in range(total)))
    assert shown == [str(n) for n in range(total)]
    assert output.lines == tuple(shown[-LINES_KEPT:])


def test_a_chatty_process_does_not_push_out_anothers_lines(output: EngineOutput) -> None:
    """The first error of one is often older than all that the other has said since."""
    error = "(EngineCore pid=7) ERROR 11-22 16:00:00 [core.py:1] ValueError: no"
    chat = "(Worker pid=8) INFO 11-22 16:00:01 [x.py:1] {}"
    print_into(output, f"{error}\n" + "".join(chat.format(n) + "\n" for n in range(LINES_KEPT * 2)))
    assert output.lines[0] == error
    assert len(output.lines) == LINES_KEPT + 1
    assert output.lines_by_child["EngineCore"] == (error,)
    assert output.lines_by_child["Worker"][-1] == chat.format(LINES_KEPT * 2 - 1)


def test_a_sink_that_fails_does_not_stop_the_reading() -> None:
    """A full disk must not block the engine at its pipe."""

    def fail(line: str) -> None:
        raise OSError("no space left on device")

    output = EngineOutput(fail)
    print_into(output, "one\ntwo\n" + "x" * 200_000 + "\n")  # more than a pipe holds
    assert output.lines[:2] == ("one", "two")


# --- the end


def test_the_end_comes_with_the_last_process(output: EngineOutput, shown: list[str]) -> None:
    """Not when we close our own end: it is the proof that no engine process is left."""
    with output.redirected():
        children = [subprocess.Popen(LIVES, stdin=subprocess.PIPE) for _ in range(2)]
    output.close()
    for said, child in enumerate(children):
        until(lambda: len(shown) == said)  # noqa: B023  # called before the next turn
        assert not output.at_end
        child.communicate(timeout=60)
    until(lambda: output.at_end)
    assert shown == ["last words"] * 2


def test_close_alone_ends_it() -> None:
    output = EngineOutput(lambda line: None)
    assert not output.at_end
    output.close()
    until(lambda: output.at_end)
    assert "engine-output" not in [thread.name for thread in threading.enumerate()]


# --- what is printed


@pytest.mark.parametrize(
    "line",
    [
        "ichat-lifecycle: engine process 1",
        "(?=a)x ichat-lifecycle: engine process 4242",
        "(EngineCore pid=7) INFO 11-22 16:00:00 [x.py:1] /lora/ichat-lifecycle: engine process 0",
    ],
)
def test_no_line_is_more_than_a_line(output: EngineOutput, shown: list[str], line: str) -> None:
    """A client's text can be in any: an earlier version read births at the end of a line."""
    print_into(output, f"{line}\n")
    assert shown == [line] == list(output.lines)


def test_a_flood_is_cut_and_told_and_its_last_words_come(
    output: EngineOutput, shown: list[str]
) -> None:
    """A client can have anything printed, and as often as it likes."""
    with output.redirected():
        for _ in range(400):
            os.write(2, b"\n" * 65_536)
        os.write(2, b"RuntimeError: why it ended\n")
    output.close()
    until(lambda: output.at_end)
    assert len(shown) < 2 * BURST / LINE_COST
    assert "RuntimeError: why it ended" in shown[-2:]
    assert any(line.endswith("were dropped: they came too fast") for line in shown)
    assert "RuntimeError: why it ended" in output.lines
