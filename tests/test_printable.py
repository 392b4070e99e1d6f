"""What came from elsewhere, as it is shown: no terminal obeys any of it, no field begins a line."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from ichat_lifecycle.adapters.console_lines import CODES, ConsoleLines
from ichat_lifecycle.adapters.terminal import LiveStream
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.errors import LifecycleError, report
from ichat_lifecycle.fleet.lines import bad_line, json_line
from ichat_lifecycle.printable import json_text, one_line, plain

EVIL = "a\x1b]0;title\x07\x1b[2J\x1b[5mb\x9b2Jc\x1b]52;c;cm0=\x07d\u202ee\u2066f\u200bg\ud800h\x7f"
FORGED = "x\n12:00:00 error    lifecycle   forged\r\x85y\u2028z\x0b\x0c\x1c"
JOINED = "\u200c\u200d"

anything = st.text(st.characters(exclude_categories=()), max_size=80)


def obeyed(text: str, allowed: str = "\n\t" + JOINED) -> set[str]:
    """The characters of a text that are shown as nothing, and do something else instead."""
    bad = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    numbers = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    formats = numbers | {*range(0x13430, 0x13440), *range(0x1BCA0, 0x1BCA4)}  # these have a glyph
    shown = {*allowed, *map(chr, formats)}
    return {c for c in text if unicodedata.category(c) in bad and c not in shown}


def test_every_character_that_is_not_shown_is_known() -> None:
    """All of Unicode as this Python has it."""
    text = "".join(map(chr, range(0x110000)))
    assert obeyed(plain(text)) == set()
    assert obeyed(one_line(text), "") == set()
    written = json_text([*text])  # one by one: two surrogates side by side are one character
    assert obeyed(written) == set()
    assert json.loads(written) == [*text], "nothing is lost"


@given(anything)
def test_a_field_is_one_line(text: str) -> None:
    shown = one_line(text)
    assert len(shown.splitlines()) <= 1
    assert obeyed(shown, "") == set()
    assert one_line(shown) == shown
    assert obeyed(plain(text)) == set()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("演示 model 👩‍💻 می‌خواهم", "演示 model 👩‍💻 می‌خواهم"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("before\x1b]0;no end\nthe next line", "before\nthe next line"),
        ("\x9b2J\r", "\ufffd2J\ufffd"),
        ("\u202egpj.exe", "\ufffdgpj.exe"),
        ("\U000e0041", "\ufffd"),
    ],
)
def test_text_stays_text(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_long_field_is_cut() -> None:
    assert one_line("x" * 100, 10) == "x" * 9 + "…"
    assert one_line("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize("field", ["event", "process", "logger", "level", "place", "exception"])
@pytest.mark.parametrize("evil", [EVIL, FORGED], ids=["evil", "forged"])
def test_a_line_of_the_log_is_the_only_one_that_begins_at_the_left(field: str, evil: str) -> None:
    event = {"timestamp": "12:00:00", "level": "info", "logger": "engine.vllm", "event": "said"}
    shown = ConsoleLines(colors=False)(None, "", {**event, field: evil})
    _, *more = shown.split("\n")
    assert all(line.startswith("    ") for line in more)
    assert obeyed(shown, "\n") == set()


@pytest.mark.parametrize("evil", [EVIL, FORGED], ids=["evil", "forged"])
def test_a_workers_bad_line_is_one_line(evil: str) -> None:
    shown = bad_line("a", json.dumps({"level": "error", "event": evil, "field": evil, evil: 1}))
    assert shown.startswith("a: error: ")
    assert len(shown.splitlines()) == 1
    assert obeyed(shown, "") == set()
    written = json_line("a", json.dumps({"event": "演示" + evil}))
    assert obeyed(written, "") == set()
    assert json.loads(written)["event"] == "演示" + evil.replace("\ud800", "\ufffd")
    assert "演示" in written


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("evil", [EVIL, FORGED, "\x1b]8;;http://x\x07link", "[blink]b[/]"])
def test_above_a_live_view_no_line_is_obeyed(evil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for the colors of our own log."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    with LiveStream(terminal, lambda: Text("the table")) as stream:
        stream.write(f"\x1b[31merror\x1b[0m {evil}\n")
    shown = terminal.getvalue()
    assert "\x1b[31merror" in shown
    for forbidden in ("\x9b", "\x1b[5m", "\x1b[2J", "\x1b]", "\u202e", "\x85", "\u2028", "\x07"):
        assert forbidden not in shown
    assert all(code.startswith("\x1b[") for code in CODES)
    if "[" in evil and "\x1b" not in evil:
        assert evil in shown, "rich's markup is no markup here"


def test_an_error_is_one_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    error = LifecycleError(EVIL, hint=FORGED, root_cause=EVIL + FORGED)
    error.told = [EVIL, FORGED]
    report(error)
    report(ValueError(EVIL + FORGED))
    with pytest.raises(SystemExit):
        build_parser().parse_args(["wait", "--for", "READY", EVIL, EVIL])
    with pytest.raises(SystemExit):
        build_parser().parse_args(["wait", "--for", EVIL + FORGED])
    lines = capsys.readouterr().err.splitlines()
    assert obeyed("".join(lines), "") == set()
    assert sum(line.startswith("ichat-lifecycle: error: ") for line in lines) == 3
    assert not any(line.startswith(("12:00", "y", "z")) for line in lines)
