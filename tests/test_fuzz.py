"""Each door of the package gets what was drawn to break it.

The tests draw a few; `make fuzz` has each go on for FUZZ_MINUTES.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running_fleet import LOOPBACK, TOKEN, RunningFleet
from schemathesis.core.result import Ok
from test_control_app import Bench
from test_fleet_planes import FakeFleet
from waiting import until

from ichat_lifecycle import printable, strict_json
from ichat_lifecycle.adapters.line_splitter import LINE_LIMIT, LineSplitter
from ichat_lifecycle.adapters.output_tail import OutputTail
from ichat_lifecycle.adapters.sd_notify import WORDS_LIMIT
from ichat_lifecycle.control.events import Bell, Events
from ichat_lifecycle.control.fleet_app import build_fleet_app
from ichat_lifecycle.errors import LifecycleError
from ichat_lifecycle.fleet.asking import WorkerClients
from ichat_lifecycle.fleet.fleet import Fleet
from ichat_lifecycle.fleet.lines import bad_line, json_line
from ichat_lifecycle.fleet.told import message_in
from ichat_lifecycle.journal import Journal
from ichat_lifecycle.log_line import parse
from ichat_lifecycle.testing import nasty, nasty_yaml
from ichat_lifecycle.testing.hostile_plane import HostilePlane, document

pytestmark = pytest.mark.hostile

SECONDS = float(os.environ.get("FUZZ_MINUTES", "0")) * 60
FEW = settings(
    max_examples=100,
    deadline=None,
    database=None,
    # Drawn anew each time, as who fuzzes wants it; what fails is told with how to draw it again.
    derandomize=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
QUIET_S = 0.05  # so long a server may think before it is taken to have said all
SERVER_FAILED = b"HTTP/1.1 500"

bearer = {"Authorization": f"Bearer {TOKEN}"}


def keep_on(test: Callable[[], None]) -> None:
    """Runs it once, and again until the time is over."""
    end_s = time.monotonic() + SECONDS
    while True:
        test()
        if time.monotonic() >= end_s:
            return


# --- what workers tell and print


@given(nasty.datagrams())
@FEW
def check_datagram(datagram: bytes) -> None:
    message = message_in(datagram)
    told = message.told
    assert len(message.problem) <= WORDS_LIMIT
    assert message.problem == printable.plain(message.problem)
    if told is not None:
        assert len(told.model_dump_json()) < 4 * WORDS_LIMIT


def test_no_datagram_gets_in_that_is_no_state() -> None:
    keep_on(check_datagram)


@given(st.lists(nasty.output(), max_size=3))
@FEW
def check_output(pieces: list[bytes]) -> None:
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)] + [splitter.rest]
    for line in lines:
        assert len(line) <= LINE_LIMIT
        document = strict_json.parse_object(json_line("evil", line))
        assert document["worker"] == "evil"
        shown = bad_line("evil", line)
        assert shown == "" or shown.startswith("evil: ")
        assert "\n" not in shown
        said = parse(line)
        for text in (line, shown, said.text, said.process, said.logger, said.traceback):
            assert text == printable.plain(text)


def test_no_output_is_obeyed_or_taken_for_anothers() -> None:
    keep_on(check_output)


# --- files


def test_no_file_is_more_than_wrong() -> None:
    """tests/test_drawn_files.py has Hypothesis draw them."""
    broken = nasty_yaml.fuzz_files(SECONDS or 1.0, random.SystemRandom().randrange(2**32))
    assert broken is None, broken


# --- requests


class Desk:
    """The supervisor, which does nothing and refuses every second reload."""

    file = "configs.yaml"
    reloads = 0

    async def reload(self) -> Mapping[str, Any]:
        self.reloads += 1
        if self.reloads % 2:
            raise LifecycleError("nothing was changed")
        return {}

    def stop(self, *, now: bool) -> None:
        pass


@contextlib.contextmanager
def served_plane() -> Iterator[str]:
    """The URL of a worker's control plane, on a loop of its own."""
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        plane = HostilePlane(document())
        serving = plane.serving()
        runner.run(serving.__aenter__())
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            runner.run(serving.__aexit__(None, None, None))

        stack.callback(end)
        yield plane.url


@contextlib.contextmanager
def fleets_app() -> Iterator[Any]:
    """One worker that answers, and one that does not. What would go on for ever ends at once."""
    output, bell = OutputTail(), Bell()
    for _ in range(10):
        output.add("there", "a line")
    output.close()
    bell.close()
    with served_plane() as url:
        yield build_fleet_app(
            cast(Fleet, FakeFleet(there=url, absent="http://127.0.0.1:1")),
            Desk(),
            output,
            Events(Journal(), "5eed", bell),
            token=TOKEN,
            clients=WorkerClients(),
        )


@contextlib.contextmanager
def workers_app() -> Iterator[Any]:
    yield Bench(token=TOKEN).app


@pytest.mark.parametrize("opened", [workers_app, fleets_app])
def test_no_operation_of_an_api_fails(opened: Any) -> None:
    with opened() as app:
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        operations = []
        for found in schema.get_all_operations():
            assert isinstance(found, Ok), found
            operations.append(found.ok().as_strategy())
        names = st.sampled_from([None, "there", "absent"])

        @given(st.one_of(operations), names)
        @FEW
        def never_fails(case: Any, name: str | None) -> None:
            if name is not None and "name" in case.path_parameters:
                case.path_parameters["name"] = name  # else it is never that of a worker
            answer = case.call(headers=bearer)
            assert answer.status_code != 500
            assert b"Traceback" not in answer.content

        keep_on(never_fails)


def answer_to(port: int, request: bytes) -> bytes:
    """All that comes before the server is quiet."""
    answer = b""
    with socket.create_connection((LOOPBACK, port), 10) as client, contextlib.suppress(OSError):
        client.sendall(request)
        client.settimeout(QUIET_S)
        while len(answer) < 1 << 20 and (piece := client.recv(1 << 16)):
            answer += piece
    return answer


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    directory: Path = tmp_path_factory.mktemp("fuzzed")
    absent = {"model_name": "absent", "env": {"FLEET_FAILS": "66"}}
    with RunningFleet(directory, {"model_name": "there"}, absent) as running:
        until(lambda: running.serving("there"))
        yield running


PATHS = (
    "/fleet",
    "/fleet/events",
    "/fleet/there",
    "/fleet/there/lifecycle/history",
    "/fleet/absent/logs",
    "/fleet/there/stop",
    "/lifecycle",
    "/lifecycle/engine",
    "/livez",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/health",
)


@pytest.mark.fleet
@pytest.mark.parametrize("plane", ["fleet", "control plane", "main port", "absent worker"])
def test_no_request_makes_a_plane_fail(fleet: RunningFleet, plane: str) -> None:
    control = str(fleet.seen("there")["control_url"])
    port, path, status = {
        "fleet": (int(fleet.url.rpartition(":")[2]), b"/livez", b"200"),
        "control plane": (int(control.rpartition(":")[2]), b"/livez", b"200"),
        "main port": (fleet.port("there"), b"/v1/completions", b"200"),
        "absent worker": (fleet.port("absent"), b"/livez", b"503"),
    }[plane]
    good = b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n" % path

    @given(nasty.requests(PATHS))
    @FEW
    def harmless(request: bytes) -> None:
        answer = answer_to(port, request)
        assert SERVER_FAILED not in answer
        assert b"Traceback" not in answer

    keep_on(harmless)
    assert answer_to(port, good).startswith(b"HTTP/1.1 " + status)
    assert not [line for line in fleet.lines if "Traceback" in str(line)]
    assert fleet.seen("there")["starts"] == 1
