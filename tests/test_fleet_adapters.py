"""What a supervisor has to do with the world: processes, what they tell and print, sockets."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_world import plan
from on_loop import DEADLINE_S, open_files, run
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import guardian
from ichat_lifecycle.adapters.answer_headers import AnswerHeaders
from ichat_lifecycle.adapters.held_socket import Absence, HeldSocket
from ichat_lifecycle.adapters.line_throttle import BURST, LINE_COST
from ichat_lifecycle.adapters.line_writer import LineWriter
from ichat_lifecycle.adapters.notify_socket import NotifySockets
from ichat_lifecycle.adapters.output_tail import KEPT, OutputTail
from ichat_lifecycle.adapters.worker_process import SERVE, ServeLauncher, WorkerProcess
from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.config import TOKEN_VARIABLE
from ichat_lifecycle.errors import AddressError, ArgumentsError, LifecycleError
from ichat_lifecycle.fleet import engine_words
from ichat_lifecycle.fleet.engine_words import NoEngineError, Question, ask_vllm
from ichat_lifecycle.fleet.gateway import RunningGateway
from ichat_lifecycle.fleet.models import ServerSettings
from ichat_lifecycle.fleet.slots import Slots
from ichat_lifecycle.ports import Address
from ichat_lifecycle.redact import Secrets

LOOPBACK = "127.0.0.1"


# --- processes


class Started:
    """A program in Python, as a worker is started, and what came of it."""

    def __init__(
        self,
        program: str,
        hearer: Callable[[Any], None] | None = None,
        scrub: Callable[[str], str] = str,
    ) -> None:
        self.lines: list[str] = []
        self.codes: list[int] = []
        self.dropped: list[int] = []
        with socket.create_server((LOOPBACK, 0)) as sock:
            self.process = WorkerProcess(
                [sys.executable, "-c", program, str(sock.fileno())],
                os.environ,
                [sock.fileno()],
                hearer or self.lines.append,
                hearer or self.codes.append,
                self.dropped.append,
                scrub=scrub,
            )


def test_nobody_gets_the_secrets_that_a_process_prints() -> None:
    """Neither in its lines, nor in its last words, which are in the journal and the events."""
    secrets = Secrets()
    secrets.add("s3cret-value")
    program = "print('s3cret-value'); print('ichat-lifecycle: error: bad s3cret-value', end='')"

    async def scenario() -> None:
        started = Started(program, scrub=secrets.scrub)
        await started.process.wait()
        assert started.lines == ["***", "ichat-lifecycle: error: bad ***"]
        assert started.process.last_words == "bad ***"

    run(scenario())


def test_a_processs_lines_come_before_its_end() -> None:
    async def scenario() -> None:
        before = open_files()
        started = Started("print('one'); print('two', end=''); raise SystemExit(75)")
        assert await started.process.wait() == 75
        assert (started.lines, started.codes) == (["one", "two"], [75])
        assert open_files() == before

    run(scenario())


def test_the_last_words_of_a_process_that_fails_are_its_error() -> None:
    async def scenario() -> None:
        program = (
            "import sys; print('ichat-lifecycle: error: no model; hint: get one'); sys.exit(66)"
        )
        started = Started(program)
        assert await started.process.wait() == 66
        assert started.process.last_words == "no model; hint: get one"

    run(scenario())


def test_a_process_is_reaped_whoever_fails_over_its_lines() -> None:
    def fail(_: object) -> None:
        raise RecursionError("a defect")

    async def scenario() -> None:
        before = open_files()
        started = Started("print('[' * 15_000); print('one'); print('two', end='')", fail)
        with capture_logs() as logs:
            assert await started.process.wait() == 0
        assert [line["event"] for line in logs] == ["line_not_taken"], "told once"
        assert open_files() == before
        with pytest.raises(ProcessLookupError):  # no zombie either
            os.kill(started.process.pid, 0)

    run(scenario())


def test_a_flood_of_lines_is_slowed_and_told_and_its_last_words_come() -> None:
    async def scenario() -> None:
        program = (
            "import os, time\n"
            "end = time.monotonic() + 1\n"
            "while time.monotonic() < end: os.write(1, b'\\n' * 65_536)\n"
            "os.write(1, b'ichat-lifecycle: error: why\\n')"
        )
        started = Started(program)
        busy_s = time.process_time()
        await started.process.wait()
        busy_s = time.process_time() - busy_s
        assert started.process.last_words == "why"
        assert started.dropped, "it is told"
        assert len(started.lines) < 2 * BURST / LINE_COST
        assert busy_s < 10

    run(scenario())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_that_does_not_tell_of_ends_is_asked_by_a_thread(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As old kernels and some sandboxes are."""

    def refused(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refused)

    async def scenario() -> None:
        before = open_files()
        started = Started("print('one', flush=True); import time; time.sleep(600)")
        while not started.lines:
            await asyncio.sleep(0.01)
        started.process.terminate()
        assert await started.process.wait() == -signal.SIGTERM
        assert (started.lines, started.codes) == (["one"], [-signal.SIGTERM])
        started.process.kill()  # nobody any more
        assert open_files() == before

    run(scenario())


def test_nothing_is_imported_from_where_a_fleet_is_started(tmp_path: Path) -> None:
    """That may be anybody's directory."""
    (tmp_path / "argparse.py").write_text("raise SystemExit('run')")
    done = subprocess.run([*SERVE, "--help"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert engine_words.PROGRAM[:2] == SERVE[:2]


def test_a_workers_environment_is_the_supervisors_without_what_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one directory of metrics each worker would show the numbers of all."""
    names = ("PROMETHEUS_MULTIPROC_DIR", FLEET_TOKEN_VARIABLE, "HF_HOME", "A")
    for name in names:
        monkeypatch.setenv(name, "supervisor")
    program = f"import os; print([os.environ.get(name) for name in {names}])"
    lines: list[str] = []

    async def scenario() -> None:
        notify = NotifySockets()
        with socket.create_server((LOOPBACK, 0)) as sock:
            launcher = ServeLauncher(
                notify,
                lambda _: sock.fileno(),
                lambda _, line: lines.append(line),
                "",
                [sys.executable, "-c", program],
            )
            worker = launcher.launch(
                plan("a", env={"A": "its own"}),
                accept_from="start",
                watchdog_s=60,
                on_news=lambda news: None,
            )
            await worker.wait()
        notify.close()

    run(scenario())
    assert lines == [str([None, None, "supervisor", "its own"])]


def test_a_workers_own_token_is_its_in_all_its_lives_and_is_hidden() -> None:
    """What is to be hidden must not become more with each start."""
    made: list[str] = []
    tokens: list[str] = []

    async def scenario() -> None:
        notify = NotifySockets()
        with socket.create_server((LOOPBACK, 0)) as sock:
            launcher = ServeLauncher(
                notify,
                lambda _: sock.fileno(),
                lambda name, line: None,
                command=[sys.executable, "-c", ""],
                on_token=made.append,
            )
            for one in (plan("a"), plan("a"), plan("b"), plan("c", env={TOKEN_VARIABLE: "given"})):
                worker = launcher.launch(
                    one, accept_from="start", watchdog_s=60, on_news=lambda news: None
                )
                tokens.append(worker.token)
                await worker.wait()
        notify.close()

    run(scenario())
    first, again, other, given = tokens
    assert made == [first, other]
    assert (again, given) == (first, "given")
    assert len(set(made)) == 2


def test_secret_words_are_inherited_and_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start has them anew; neither the supervisor nor a child of the worker keeps them."""
    program = (
        "import os, subprocess, sys\n"
        "from ichat_lifecycle.secret_words import taken\n"
        "seen = open('/proc/self/cmdline').read()\n"
        "words = taken(sys.argv[1:])\n"
        "print('s3' + 'cret' in seen, words[:2], '--fd' in words, '--args-fd' in words)\n"
        "show = 'ls -l /proc/self/fd | grep -c memfd'\n"
        "print(subprocess.run(['sh', '-c', show], close_fds=False, text=True,"
        " capture_output=True).stdout.strip())\n"
    )
    lines: list[str] = []
    one = plan("a", secret_argv=("--hf-token", "s3cret"))

    async def scenario() -> None:
        before = open_files()
        notify = NotifySockets()
        with socket.create_server((LOOPBACK, 0)) as sock:
            launcher = ServeLauncher(
                notify,
                lambda _: sock.fileno(),
                lambda _, line: lines.append(line),
                command=[sys.executable, "-c", program],
            )
            for _ in range(2):
                worker = launcher.launch(
                    one, accept_from="start", watchdog_s=60, on_news=lambda news: None
                )
                await worker.wait()
        notify.close()
        assert open_files() == before

    run(scenario())
    assert lines == ["False ['--hf-token', 's3cret'] True False", "0"] * 2


def test_all_of_much_output_comes() -> None:
    async def scenario() -> None:
        started = Started("for n in range(20000): print(n)")
        await started.process.wait()
        assert started.lines == [str(n) for n in range(20_000)]

    run(scenario())


def test_a_child_that_keeps_the_output_open_holds_nothing_up() -> None:
    async def scenario() -> None:
        program = (
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            "print(child.pid, flush=True)"
        )
        started = Started(program)
        assert await started.process.wait() == 0
        await gone(int(started.lines[0]))

    run(scenario())


async def gone(pid: int) -> None:
    while guardian.started(pid) is not None:
        await asyncio.sleep(0.01)


# Prints without end, whatever becomes of the reader; with a word it does not end when asked to.
ORPHAN = """
import os, signal, sys, time
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
if sys.argv[1:]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try:
        os.write(1, b"an orphan\\n")
    except OSError:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_an_orphan_prints_on_goes_nowhere(stubborn: bool) -> None:
    """It is nobody's: not its dead parent's, and not the next process's."""

    async def scenario() -> None:
        before = open_files()
        words = ", 'x'" if stubborn else ""
        started = Started(
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-c', {ORPHAN!r}{words}])\n"
            "print(f'its pid is {child.pid}', flush=True)\n"
            "time.sleep(0.3)\n"
            "raise SystemExit(75)"
        )
        assert await started.process.wait() == 75
        orphan = next(int(line.split()[-1]) for line in started.lines if "pid is" in line)
        try:
            seen = len(started.lines)
            after = Started("import time; time.sleep(0.3); print('mine')")
            assert await after.process.wait() == 0
            assert after.lines == ["mine"]
            assert len(started.lines) == seen
            assert started.codes == [75]
            if stubborn:
                assert guardian.started(orphan) is not None
            else:
                await gone(orphan)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        assert open_files() == before

    run(scenario())


def test_it_gets_the_socket_and_nothing_else_of_ours() -> None:
    async def scenario() -> None:
        program = (
            "import os, socket, sys\n"
            "sock = socket.socket(fileno=int(sys.argv[1]))\n"
            "print(sock.getsockopt(1, 30))\n"  # SO_ACCEPTCONN
            # Three streams, the socket, and the directory that is being listed.
            "print(len(os.listdir('/proc/self/fd')), os.getpgid(0) == os.getpid())"
        )
        started = Started(program)
        await started.process.wait()
        assert started.lines == ["1", "5 True"]

    run(scenario())


@pytest.mark.parametrize(
    ("ask", "code"), [("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)]
)
def test_a_process_is_ended_and_asking_again_is_safe(ask: str, code: int) -> None:
    async def scenario() -> None:
        started = Started("print('up', flush=True); import time; time.sleep(600)")
        while not started.lines:
            await asyncio.sleep(0.01)
        getattr(started.process, ask)()
        assert await started.process.wait() == code
        for again in (started.process.terminate, started.process.hurry, started.process.kill):
            again()

    run(scenario())


# --- sockets


def test_a_held_socket_answers_exactly_while_nobody_serves() -> None:
    async def scenario() -> None:
        before = open_files()
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        held = HeldSocket(Address(LOOPBACK, port), lambda: Absence("gone for now", "starting", 7))
        async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
            answer = await client.post(f"http://{LOOPBACK}:{port}/v1/x", content=b"x" * 100_000)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
            assert answer.json()["error"] == {
                "message": "gone for now",
                "type": "service_unavailable",
                "param": None,
                "code": 503,
                "state": "starting",
            }
        me = object()
        held.served_by(me)
        held.served_by(me)
        await asyncio.sleep(0.2)
        waiting = socket.create_connection((LOOPBACK, port))
        waiting.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        waiting.setblocking(False)
        await asyncio.sleep(0.2)
        with pytest.raises(BlockingIOError):
            waiting.recv(1)
        held.left_by(me)
        held.left_by(me)
        loop = asyncio.get_running_loop()
        assert (await loop.sock_recv(waiting, 100)).startswith(b"HTTP/1.1 503 ")
        waiting.close()
        await held.close()
        assert open_files() == before
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, port)).close()

    run(scenario())


def test_a_held_unix_socket_goes_with_its_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "a.sock"
        held = HeldSocket(Address(uds=str(path)), lambda: Absence("", "", 1))
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("http://x/health")).status_code == 503
        held.close_now()
        while path.exists():
            await asyncio.sleep(0.01)
        await held.close()

    run(scenario())


# Of 127.0.0.1, signed by itself, with its key: for tests only, valid for a hundred years.
CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))
NEXT_CERTIFICATE = str(Path(__file__).with_name("next_certificate.pem"))


def test_a_held_socket_speaks_the_tls_that_its_worker_speaks() -> None:
    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        held = HeldSocket(Address(LOOPBACK, port), lambda: Absence("", "", 1))
        trusted = ssl.create_default_context(cafile=CERTIFICATE)
        async with httpx.AsyncClient(verify=trusted, timeout=DEADLINE_S) as client:
            assert (await client.get(f"http://{LOOPBACK}:{port}")).status_code == 503
            held.certify((CERTIFICATE, CERTIFICATE))
            assert (await client.get(f"https://{LOOPBACK}:{port}")).status_code == 503
            held.certify(None)
            assert (await client.get(f"http://{LOOPBACK}:{port}")).status_code == 503
            for _ in range(2):  # what was refused once is refused again
                with pytest.raises(ArgumentsError, match="no TLS with these"):
                    held.certify(("none.pem", CERTIFICATE))
            assert (await client.get(f"http://{LOOPBACK}:{port}")).status_code == 503
            held.certify((CERTIFICATE, None))
            assert (await client.get(f"https://{LOOPBACK}:{port}")).status_code == 503
        await held.close()

    run(scenario())


def test_a_held_socket_serves_what_is_in_the_files_now(tmp_path: Path) -> None:
    """Under the same path. What is refused, or taken back, leaves the certificate before."""
    pem = tmp_path / "a.pem"
    texts = [Path(CERTIFICATE).read_text(), Path(NEXT_CERTIFICATE).read_text()]

    async def served(port: int) -> str:
        where = (LOOPBACK, port)
        return await asyncio.to_thread(ssl.get_server_certificate, where, timeout=DEADLINE_S)

    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        held = HeldSocket(Address(LOOPBACK, port), lambda: Absence("", "", 1))
        both = (str(pem), str(pem))
        pem.write_text(texts[0])
        held.certify(both, "first")
        assert await served(port) in texts[0]
        pem.write_text(texts[1])
        held.certify(both, "first")
        assert await served(port) in texts[0], "nothing is new, by its digest"
        held.certify(both, "second")
        assert await served(port) in texts[1]
        pem.write_text("nonsense")
        with pytest.raises(ArgumentsError):
            held.certify(both, "third")
        assert await served(port) in texts[1]
        held.certify(both, "first")  # another worker of the same reload was refused
        assert await served(port) in texts[0]
        await held.close()

    run(scenario())


def test_a_held_socket_answers_a_page_as_its_worker_would() -> None:
    headers = AnswerHeaders(allowed_origins=("https://a",), request_ids=True)

    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        held = HeldSocket(Address(LOOPBACK, port), lambda: Absence("", "", 1, headers))
        async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
            origin = {"Origin": "https://a", "Access-Control-Request-Method": "POST"}
            url = f"http://{LOOPBACK}:{port}/v1/completions"
            assert (await client.options(url, headers=origin)).status_code == 200
            answer = await client.post(url, headers=origin)
        assert answer.status_code == 503
        assert answer.headers["Access-Control-Allow-Origin"] == "https://a"
        assert len(answer.headers["X-Request-Id"]) == 32
        await held.close()

    run(scenario())


def test_an_upload_outlasts_the_change_to_a_worker() -> None:
    """Its 503 is under way, and a worker takes the socket over meanwhile."""

    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        held = HeldSocket(Address(LOOPBACK, port), lambda: Absence("", "", 1))
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\na")
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        held.served_by(me := object())
        await asyncio.sleep(0.2)
        held.left_by(me)  # at once again: it does not wait for the upload
        async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
            assert (await client.get(f"http://{LOOPBACK}:{port}")).status_code == 503
        for _ in range(99):
            writer.write(b"a")
            await writer.drain()
        assert await reader.read(), "no reset"
        writer.close()
        await held.close()

    run(scenario())


def test_an_address_that_is_taken_is_an_error_at_once() -> None:
    async def scenario() -> None:
        with socket.create_server((LOOPBACK, 0)) as taken, pytest.raises(AddressError):
            HeldSocket(Address(*taken.getsockname()), lambda: Absence("", "", 1))

    run(scenario())


# --- what workers print


def test_the_newest_lines_are_kept_and_followed() -> None:
    async def scenario() -> None:
        tail = OutputTail()
        for n in range(KEPT + 5):
            tail.add("a", str(n))
        assert [text async for text in tail.read("a", 2)] == [f"{KEPT + 3}\n{KEPT + 4}"]
        all_of_it = [text async for text in tail.read("a", 10**6)]
        assert len("\n".join(all_of_it).splitlines()) == KEPT
        seen: list[str] = []

        async def follow() -> None:
            async for lines in tail.follow("a", 1):
                seen.extend(lines.splitlines())

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        tail.add("b", "another's")
        tail.add("a", "next")
        await asyncio.sleep(0)
        tail.add("a", "last")
        tail.close()
        await following
        assert seen == [str(KEPT + 4), "next", "last"]

    run(scenario())


# --- a Gateway that runs


def test_a_gateway_is_the_one_that_is_named_else_the_one_that_runs() -> None:
    with socket.create_server((LOOPBACK, 0)) as gateway:
        port = gateway.getsockname()[1]
        finder = RunningGateway()
        named = ServerSettings(gateway_address="g:1", port=port)
        assert finder.address(named) == "g:1"
        running = ServerSettings(host="0.0.0.0", port=port)
        assert finder.address(running) == f"{LOOPBACK}:{port}"
    assert finder.address(running) == f"{LOOPBACK}:{port}", "what has been found stays"
    assert RunningGateway().address(running) is None
    assert RunningGateway().address(ServerSettings()) is None, "nobody has said where"


# --- who may start


def test_slots_are_given_in_the_order_of_asking() -> None:
    went: list[str] = []
    goes = {name: lambda name=name: went.append(name) for name in "abcd"}
    slots = Slots(1)
    for go in goes.values():
        slots.ask(go)
    assert went == ["a"]
    slots.leave(goes["b"])  # it does not want to any more
    slots.leave(goes["a"])
    slots.leave(goes["a"])
    assert went == ["a", "c"]
    slots.resize(2)
    assert went == ["a", "c", "d"]


# --- vLLM's parser in a process of its own


def question() -> Question:
    return Question(("--model-path", "m"), {"seed": 1}, ("port",))


def answering(text: str) -> list[str]:
    program = f"import sys; sys.stdin.read(); print({text!r})"
    return [sys.executable, "-c", program]


def test_what_the_parser_says_comes_back() -> None:
    wrong = {"key": "seed", "message": "no", "hint": None}
    headers = {"allowed_origins": ["https://a"], "enable_request_id_headers": True}
    found = {"words": ["--seed", "1"], "wrong": [wrong], "headers": headers}
    (answer,) = ask_vllm([question()], answering(json.dumps({"workers": [found]})))
    assert answer.words == ("--seed", "1")
    assert answer.headers == AnswerHeaders(allowed_origins=("https://a",), request_ids=True)
    assert (answer.wrong[0].key, answer.wrong[0].message) == ("seed", "no")


@pytest.mark.engine
def test_each_worker_is_read_with_its_own_variables_and_not_with_this_moment() -> None:
    """What a fleet that runs needs for itself is not free: a file that is read again is fine."""
    argv = ("--model-path", "m", "--gpu-memory-utilization", "1.0")
    plain, wrong = (
        Question(argv, {}, ()),
        Question(argv, {}, (), {"VLLM_PORT": "tcp://10.0.0.1:80"}),
    )
    first, second, third = ask_vllm([plain, wrong, plain])
    assert (first.wrong, third.wrong) == ((), ())
    (told,) = second.wrong
    assert "VLLM_PORT=tcp://10.0.0.1:80: a link to a Service" in told.message


def test_a_parser_that_is_not_there_or_fails_says_so() -> None:
    with pytest.raises(NoEngineError, match="vLLM is not installed"):
        ask_vllm([question()], answering(json.dumps({"error": "vLLM is not installed"})))
    failed = {"failed": {"root_cause": "UnicodeDecodeError: x", "hint": "set PYTHONUTF8=1"}}
    with pytest.raises(LifecycleError, match="import has failed") as caught:
        ask_vllm([question()], answering(json.dumps(failed)))
    assert caught.value.hint == "set PYTHONUTF8=1"
    failing = [sys.executable, "-c", "raise SystemExit('it broke')"]
    with pytest.raises(LifecycleError, match="parser has failed") as caught:
        ask_vllm([question()], failing)
    assert caught.value.root_cause == "it broke"


def test_lines_wait_for_a_reader_without_holding_anybody_up() -> None:
    ours, theirs = os.pipe()
    dropped: list[int] = []
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours) as reader:
        writer = LineWriter(stream, dropped.append, limit=3)
        writer.write(f"first {'x' * 100_000}\n")  # a pipe takes 64 KiB
        for number in range(100):
            writer.write(f"{number}\n")
        assert not writer.close(within_s=0.05)
        assert dropped == []
        assert [reader.readline().split()[0] for _ in range(3)] == ["first", "0", "1"]
        while not dropped:
            writer.write("late\n")
        assert dropped[0] >= 96
        finished = threading.Thread(target=lambda: collections.deque(reader, maxlen=0))
        finished.start()
        assert writer.close(within_s=DEADLINE_S)
        stream.close()
        finished.join()


def test_a_stream_that_is_closed_ends_no_writer() -> None:
    stream = io.StringIO()
    stream.close()
    writer = LineWriter(stream, lambda count: None)
    writer.write("a\n")
    assert writer.close()
