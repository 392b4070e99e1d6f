"""Nobody waits for a reader of a worker's stderr or stdout: a pipe takes 64 KiB and no more."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import io
import logging
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from ichat_lifecycle import worker
from ichat_lifecycle.adapters import engine_output
from ichat_lifecycle.adapters.engine_output import EngineOutput
from ichat_lifecycle.adapters.line_writer import CHARACTERS_LIMIT, LIMIT, LineWriter
from ichat_lifecycle.adapters.printed import Printed, printed_by
from ichat_lifecycle.adapters.threads import within
from ichat_lifecycle.errors import LimitError
from ichat_lifecycle.redact import Secrets

DEADLINE_S = 120.0  # 20,000 lines are logged within
ON_THEIR_WAY = 100  # lines that the writer has taken and the pipe has not
FULL = "x" * 1_000_000  # more than any pipe takes


@contextlib.contextmanager
def unread_pipe() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """A pipe that is full: the stream to write to, and the one to read from."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"." * 4096)
    os.set_blocking(writing, True)

    def more() -> bytes:
        return os.read(reading, 65_536)

    with os.fdopen(reading, closefd=False) as reader, os.fdopen(writing, "w") as stream:
        drain = threading.Thread(target=lambda: collections.deque(iter(more, b""), maxlen=0))
        try:
            yield stream, reader
        finally:
            drain.start()  # else a test that fails waits for ever for its stream to close
    drain.join(DEADLINE_S)
    os.close(reading)


def test_what_is_dropped_is_reported_once_there_is_room_without_another_line() -> None:
    reported = threading.Event()
    counts: list[int] = []

    def on_dropped(count: int) -> None:
        counts.append(count)
        reported.set()

    with unread_pipe() as (stream, reader):
        writer = LineWriter(stream, on_dropped, limit=4)
        for number in range(100):
            writer.write(f"{number}\n")
        assert not reported.is_set()
        assert writer.dropped >= 95
        reading = threading.Thread(target=reader.read, daemon=True)
        reading.start()
        assert reported.wait(DEADLINE_S)
        assert writer.close(DEADLINE_S)
    assert sum(counts) == writer.dropped


def test_what_waits_is_bounded_in_characters_too() -> None:
    with unread_pipe() as (stream, reader):
        writer = LineWriter(stream, lambda count: None)
        for _ in range(20):
            writer.write("x" * (CHARACTERS_LIMIT // 10))
        assert 9 <= writer.dropped <= 11
        threading.Thread(target=reader.read, daemon=True).start()
        assert writer.close(DEADLINE_S)


def test_without_a_thread_it_is_a_limit_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(LimitError, match="can't start new thread"):
        LineWriter(io.StringIO(), lambda count: None)
    ran: list[int] = []
    assert within(1.0, lambda: ran.append(1))
    assert ran == [1]


def test_printing_does_not_wait() -> None:
    with unread_pipe() as (stream, reader):
        lines = LineWriter(stream, lambda count: None)
        printed = Printed(stream, lines)

        def prints() -> None:
            print(FULL, file=printed)
            printed.flush()
            with contextlib.redirect_stderr(printed):
                sys.stderr.write(FULL)

        assert within(DEADLINE_S, prints)
        threading.Thread(target=reader.read, daemon=True).start()
        assert lines.close(DEADLINE_S)


def test_lines_stay_whole_whoever_else_prints() -> None:
    written: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    lines = LineWriter(Stream(), lambda count: None)
    printed = Printed(sys.__stderr__ or sys.stderr, lines)
    print("a", "b", 3, file=printed)
    print("no end", end="", file=printed)
    printed.flush()
    print("!\nrest", end="", file=printed)
    assert lines.close(DEADLINE_S)
    assert "".join(written) == "a b 3\nno end!\n"
    assert all(text.endswith("\n") for text in written)


@pytest.mark.usefixtures("capfd")
def test_while_an_engine_starts_what_is_printed_is_a_part_of_the_load() -> None:
    """Its lines go into the pipe, where the phases of a download are read out of them."""
    seen: list[str] = []
    lines = LineWriter(io.StringIO(), lambda count: None)
    printed = Printed(os.fdopen(2, "w", buffering=1, closefd=False), lines)
    output = EngineOutput(seen.append)
    with output.redirected():
        assert engine_output.is_redirected()
        print("Fetching 3 files", file=printed)
    assert not engine_output.is_redirected()
    output.close()
    end = time.monotonic() + DEADLINE_S
    while not output.at_end and time.monotonic() < end:
        time.sleep(0.01)
    assert lines.close(DEADLINE_S)
    assert "Fetching 3 files" in seen


def test_the_engines_output_is_read_though_nobody_reads_ours() -> None:
    """By default its lines go to our stderr; a full one must not stop the engine."""
    script = (
        "import os, sys, threading\n"
        "from ichat_lifecycle.adapters.engine_output import EngineOutput\n"
        "reading, writing = os.pipe()\n"
        "os.dup2(writing, 2)\n"
        "output = EngineOutput()\n"
        "with output.redirected():\n"
        "    for _ in range(5000): os.write(2, b'x' * 99 + b'\\n')\n"
        "print('done', flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("same", [True, False])
def test_a_stdout_of_its_own_stays_one(same: bool) -> None:
    script = (
        "import os, sys\n"
        "from ichat_lifecycle.adapters.line_writer import LineWriter\n"
        "from ichat_lifecycle.adapters.logs import own_stderr\n"
        "from ichat_lifecycle.adapters.printed import printed_by\n"
        "lines = LineWriter(own_stderr(), lambda count: None)\n"
        "with printed_by(lines, lambda count: None):\n"
        "    print('to stdout'); print('to stderr', file=sys.stderr)\n"
        "lines.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if same else subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    if same:
        assert done.stdout == "to stdout\nto stderr\n"
    else:
        assert (done.stdout, done.stderr) == ("to stdout\n", "to stderr\n")


def test_a_stream_that_cannot_be_copied_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: int) -> bool:
        raise OSError(9, "Bad file descriptor")

    before = sys.stdout
    monkeypatch.setattr("ichat_lifecycle.adapters.printed.os.path.sameopenfile", fail)
    with printed_by(LineWriter(io.StringIO(), lambda count: None), lambda count: None):
        assert sys.stdout is before


def test_a_worker_whose_stderr_nobody_reads_logs_on_and_reports_what_was_lost() -> None:
    """The 251st request, or the engine's own lines, filled the pipe and stopped the event loop."""
    given = Namespace(lifecycle_log_format="json", lifecycle_log_level="info")
    backend: Any = SimpleNamespace(
        lifecycle=None, secrets=Secrets(), start_id="x", options=SimpleNamespace()
    )
    before = logging.getLogger().handlers[:], logging.getLogger().level
    texts: list[str] = []
    try:
        with unread_pipe() as (stream, reader):

            def log_on() -> None:
                for number in range(2 * LIMIT):
                    logging.getLogger("test_printed").info("request %d", number)
                print("and a library prints", FULL, file=sys.stderr)

            with worker._logging(given, backend, stream):
                assert within(DEADLINE_S, log_on)
                assert backend.options.lines_dropped() >= LIMIT - ON_THEIR_WAY
                reading = threading.Thread(target=lambda: texts.append(reader.read()), daemon=True)
                reading.start()
            stream.close()
            reading.join(DEADLINE_S)
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
        structlog.reset_defaults()
    assert '"event": "lines_dropped"' in texts[0]
    assert "request 0" in texts[0]


def test_a_worker_ends_though_nobody_ever_reads() -> None:
    given = Namespace(lifecycle_log_format="json", lifecycle_log_level="info")
    backend: Any = SimpleNamespace(
        lifecycle=None, secrets=Secrets(), start_id="x", options=SimpleNamespace()
    )
    before = logging.getLogger().handlers[:], logging.getLogger().level

    def life(stream: io.TextIOWrapper) -> None:
        with worker._logging(given, backend, stream):
            logging.getLogger().warning("unread")

    try:
        with unread_pipe() as (stream, _):
            assert within(DEADLINE_S, lambda: life(stream))
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
        structlog.reset_defaults()


def test_secrets_that_a_library_prints_are_hidden() -> None:
    """Tracebacks of threads and warnings of Python's own come this way as well."""
    secrets = Secrets()
    secrets.add("s3cret-value")
    stream = io.StringIO()
    lines = LineWriter(stream, lambda count: None)
    printed = Printed(io.StringIO(), lines, secrets.scrub)
    print("one s3cret-", end="", file=printed)  # a line may come in pieces
    print("value\nGET /?token=abc\ntwo", file=printed)
    assert lines.close()
    assert stream.getvalue() == "one ***\nGET /?token=***\ntwo\n"
