"""Whatever state the standard streams are in when a command starts, it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "from ichat_lifecycle.cli import main; main(sys.argv[1:])"
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def run(script: str, redirections: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter, started by a shell that closes what `redirections` name."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environ},
    )


@pytest.mark.parametrize("redirections", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_leads_to_dev_null_before_anything_can_take_its_number(
    redirections: str, tmp_path: Path
) -> None:
    """A socket with the number 1 gets what is printed, and a redirection of stdout replaces it."""
    report = tmp_path / "report"
    done = run(
        "import os, socket, sys\n"
        "from ichat_lifecycle.adapters import standard_streams\n"
        "standard_streams.prepare()\n"
        "sock = socket.socket()\n"
        "print('out'); print('err', file=sys.stderr); sys.stdin.read(0)\n"
        "sys.stdout.flush()\n"
        f"open({str(report)!r}, 'w').write(f'{{sock.fileno()}}'\n"
        "    f' {all(os.get_inheritable(fd) for fd in (0, 1, 2))}')",
        redirections,
    )
    assert done.returncode == 0, done.stderr
    number, inherited = report.read_text().split()
    assert int(number) > 2
    assert inherited == "True"


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_command_line_runs_without_a_stream(redirections: str) -> None:
    done = run(f"import sys; sys.argv[1:] = ['--version']; {PROGRAM}", redirections)
    assert done.returncode == 0, done.stderr


def test_a_word_in_utf_8_is_what_was_typed_under_an_ascii_locale() -> None:
    """Python has its bytes as surrogates, which no URL and no file's text can hold."""
    script = "import sys; from ichat_lifecycle import cli; print(ascii(cli._as_typed(sys.argv[1])))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for word, shown in (("千问".encode(), "'\\u5343\\u95ee'"), (b"a\xff", "'a\\udcff'")):
        done = subprocess.run(
            [sys.executable, "-c", script, word],
            capture_output=True,
            check=True,
            env={**os.environ, **locale},
        )
        assert done.stdout.decode().strip() == shown


def test_what_a_stream_cannot_encode_is_escaped() -> None:
    done = run(
        "import sys\n"
        "from ichat_lifecycle.adapters import standard_streams\n"
        "standard_streams.prepare()\n"
        "print('мост \\udcff'); print('мост', file=sys.stderr)",
        **ASCII,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\\u043c\\u043e\\u0441\\u0442 \\udcff\n"
    assert done.stderr == "\\u043c\\u043e\\u0441\\u0442\n"


def test_check_prints_a_models_name_on_a_stream_that_is_ascii() -> None:
    """The same for each command that prints: `main` prepares the streams before all of them."""
    done = run(
        "import sys\n"
        "from types import SimpleNamespace as Any\n"
        "from ichat_lifecycle.fleet import commands\n"
        "plan = Any(name='most', model='\\u043c', address='127.0.0.1:1', uds=None, gpu_ids=None)\n"
        "commands.read_plans = lambda *a, **k: Any(doubts=[], plans=[plan])\n"
        f"sys.argv[1:] = ['check', 'configs.yaml']\n{PROGRAM}",
        **ASCII,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "most: \\u043c on 127.0.0.1:1\n"


NEVER_BLOCKS = """
import ctypes, os, sys
from ichat_lifecycle.adapters import logs, standard_streams
own = logs.own_stderr()
standard_streams.never_block()
libc = ctypes.CDLL(None, use_errno=True)
line = b"[07:52:49] json_schema_converter.cc: a client's pattern\\n"
taken = [libc.write(2, line, len(line)) for _ in range(100_000)]
assert taken[-1] == -1, "the pipe is full, and nobody waits"
assert os.get_blocking(own.fileno()), "the log's own stream is as it was"
os._exit(7)
"""


def test_what_c_libraries_print_never_waits_for_a_reader() -> None:
    """A stuck write would hold the event loop: no request would be answered any more."""
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", NEVER_BLOCKS],
            stdout=writer,
            stderr=writer,
            timeout=60,
            check=False,
        )
        assert done.returncode == 7, os.read(reader, 65_536)[-2_000:]
        assert os.get_blocking(writer), "nobody else's end has changed"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_file_is_written_on_from_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    program = (
        "import os\nfrom ichat_lifecycle.adapters import standard_streams\n"
        "standard_streams.never_block()\nos.write(2, b'after\\n')"
    )
    with log.open("a") as file:
        subprocess.run([sys.executable, "-c", program], stderr=file, timeout=60, check=True)
    assert log.read_text() == "before\nafter\n"
