"""Secret words of a command line go another way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ichat_lifecycle.secret_words import LIMIT, apart, hand_over, secret_flags, taken


@pytest.mark.parametrize(
    ("argv", "plain", "secret"),
    [
        ("--model m --hf-token x --port 1", "--model m --port 1", "--hf-token x"),
        ("--api-key x y --port 1", "--port 1", "--api-key x y"),
        ("--hf-token=x m", "", "--hf-token=x m"),
        ("--hf-token -5 --seed -1", "--seed -1", "--hf-token -5"),
        ("m --gateway-address http://u:p@h", "m", "--gateway-address http://u:p@h"),
        ("--set a.b=1 --set http.token=x", "--set a.b=1", "--set http.token=x"),
        ('--kv {"token":"x"} --other {"port":1}', '--other {"port":1}', '--kv {"token":"x"}'),
        ("--enable-prefix-caching --max-tokens 5", "--enable-prefix-caching --max-tokens 5", ""),
        ("--otlp-traces-endpoint http://h?sig=x", "", "--otlp-traces-endpoint http://h?sig=x"),
    ],
)
def test_a_flag_with_a_secret_goes_with_all_its_values(argv: str, plain: str, secret: str) -> None:
    assert apart(argv.split()) == (tuple(plain.split()), tuple(secret.split()))


def test_flags_are_named_without_their_values() -> None:
    assert secret_flags(["--hf-token=x", "--api-key", "y", "z"]) == ["--hf-token", "--api-key"]


def test_what_is_handed_over_is_taken_once() -> None:
    """Words of any kind, in front of the others; the descriptor is closed."""
    words = ["--hf-token", "x", "", "zwei Wörter\n", "--args-fd"]
    fd = hand_over(words)
    assert not os.get_inheritable(fd)
    assert taken(["--args-fd", str(fd), "--port", "1"]) == [*words, "--port", "1"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("words", [[], ["--port", "1"], ["--model", "--args-fd", "5"]])
def test_without_a_descriptor_in_front_nothing_is_taken(words: list[str]) -> None:
    """A value may be spelled like it."""
    assert taken(words) == words


@pytest.mark.parametrize("number", ["", "x", "-1", "0", "2", "٣", "12345678901234567890", "999999"])
def test_a_descriptor_that_is_none_is_refused(number: str) -> None:
    """Standard streams as well: whoever reads them waits for ever."""
    with pytest.raises(ValueError, match="--args-fd"):
        taken(["--args-fd", number])
    with pytest.raises(ValueError, match="--args-fd"):
        taken(["--args-fd"])


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '"x"', "[" * 5000, "\udc80", '["' + "x" * LIMIT + '"]']
)
def test_a_file_of_something_else_is_refused_and_not_shown(content: str, tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_bytes(content.encode(errors="surrogateescape"))
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(ValueError, match="expected a JSON list"):
        taken(["--args-fd", str(fd)])


SERVE = [sys.executable, "-m", "ichat_lifecycle", "serve"]


def test_serve_takes_them_as_if_they_stood_there() -> None:
    """Conflicts and all; and its errors show no secret that came that way."""
    model = "https://user:s3cret-pw@host/model"
    fd = hand_over(["--model", model])
    done = subprocess.run(
        [*SERVE, "--args-fd", str(fd), "--model-path", "/no/such", "--hf-token", "hf-s3cret-pw"],
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(fd)
    assert done.returncode == 2
    assert "are in conflict" in done.stderr
    assert "s3cret" not in done.stderr + done.stdout


def test_serve_refuses_a_descriptor_that_is_none() -> None:
    done = subprocess.run([*SERVE, "--args-fd", "77"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--args-fd 77: Bad file descriptor" in done.stderr


def test_json_is_what_is_handed_over() -> None:
    """Who writes a supervisor of his own may do so, too."""
    fd = hand_over(["a"])
    with os.fdopen(fd) as file:
        assert json.load(file) == ["a"]
