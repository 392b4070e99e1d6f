"""The one line that ends a failed run, and the exit code, which is there also without the line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from ichat_lifecycle.errors import AddressError, LifecycleError, report


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (
            AddressError("taken", hint="move", root_cause="by\n 42"),
            "taken; cause: by 42; hint: move",
            69,
        ),
        (AddressError("taken by 42", root_cause="by 42"), "taken by 42", 69),
        (KeyError("a"), "KeyError: 'a'", 70),
    ],
)
def test_the_line_has_message_cause_and_hint(error: Exception, line: str, code: int) -> None:
    stream = io.StringIO()
    assert report(error, stream) == code
    assert stream.getvalue() == f"ichat-lifecycle: error: {line}\n"


def test_a_full_disk_takes_the_line_and_leaves_the_exit_code() -> None:
    stream = Path("/dev/full").open("w")  # noqa: SIM115  # closing it fails too
    assert report(LifecycleError("no room"), stream) == 70
    with pytest.raises(OSError, match="No space left"):
        stream.close()


def test_a_closed_stream_does_too() -> None:
    stream = io.StringIO()
    stream.close()
    assert report(LifecycleError("nobody listens"), stream) == 70
