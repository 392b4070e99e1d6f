"""What the Gateway is given as a worker's address, and the warning where it cannot reach it."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from typing import Any

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle.adapters import advertise
from ichat_lifecycle.adapters.advertise import Advertised, advertisable, gateway_host, is_here
from ichat_lifecycle.backend import Options, VLLMBackend
from ichat_lifecycle.cli import build_parser

WILDCARDS = ["", "0.0.0.0", "::", "0:0:0:0:0:0:0:0"]


def advertised(
    listens: str = "0.0.0.0",
    gateway: str = "127.0.0.1:4000",
    uds: str | None = None,
    **given: Any,
) -> tuple[tuple[str, int], list[Any]]:
    """What is advertised after two beats, and what was logged."""
    found = Advertised(gateway, lambda: (listens, 8001, uds), **given)

    async def beats() -> None:
        for _ in range(2):
            await found.look()

    with capture_logs() as logs:
        asyncio.run(beats())
    return found.where, logs


@pytest.fixture
def far_gateway(monkeypatch: pytest.MonkeyPatch) -> list[socket.AddressFamily]:
    """The way to any Gateway leads over 10.0.0.7 to another machine. Gives the families asked."""
    families: list[socket.AddressFamily] = []

    async def route(host: str, port: int, family: socket.AddressFamily) -> tuple[str, str]:
        families.append(family)
        return "10.0.0.7", "10.0.0.1"

    monkeypatch.setattr(advertise, "_route", route)
    return families


@pytest.mark.parametrize("host", WILDCARDS)
def test_all_interfaces_are_the_one_that_leads_to_the_gateway(
    host: str, far_gateway: list[socket.AddressFamily]
) -> None:
    """Not the host's name, which is a Pod's; a socket on 0.0.0.0 has no address of IPv6."""
    assert advertised(host, "gateway:4000") == (("10.0.0.7", 8001), [])
    expected = socket.AF_UNSPEC if ":" in host else socket.AF_INET
    assert far_gateway == [expected], "once is enough"


@pytest.mark.parametrize("gateway", ["127.0.0.1:4000", "http://localhost:4000/ichat", "127.0.0.1"])
def test_the_real_way_to_a_gateway_on_this_machine(gateway: str) -> None:
    assert advertised("0.0.0.0", gateway) == (("127.0.0.1", 8001), [])


def test_without_a_way_to_the_gateway_it_is_the_hosts_name() -> None:
    where, logs = advertised("0.0.0.0", "no-such-host.invalid:4000")
    assert where == (socket.gethostname(), 8001)
    assert logs == []


def test_a_way_that_comes_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Advertised("gateway:4000", lambda: ("0.0.0.0", 8001, None))
    failures = [OSError("network is unreachable")]

    async def route(*_: object) -> tuple[str, str]:
        if failures:
            raise failures.pop()
        return "10.0.0.7", "10.0.0.1"

    monkeypatch.setattr(advertise, "_route", route)

    async def beats() -> None:
        await found.look()
        assert found.where == (socket.gethostname(), 8001)
        await found.look()
        assert found.where == ("10.0.0.7", 8001)

    asyncio.run(beats())


@pytest.mark.usefixtures("far_gateway")
def test_what_is_given_wins() -> None:
    given: dict[str, Any] = {"host": "worker.example", "port": 30_001}
    assert advertised("0.0.0.0", "g:1", **given) == (("worker.example", 30_001), [])
    assert advertised("127.0.0.1", "g:1", **given) == (("worker.example", 30_001), [])
    assert advertised("x", "g:1", uds="/run/s", **given) == (("worker.example", 30_001), [])
    assert advertised("10.0.0.7", "g:1", port=30_001) == (("10.0.0.7", 30_001), [])


@pytest.mark.usefixtures("far_gateway")
@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"listens": "127.0.0.1"}, "127.0.0.1"),
        ({"listens": "localhost"}, "localhost"),
        ({"listens": "::1"}, "::1"),
        ({"uds": "/run/s"}, "unix:/run/s"),
    ],
)
def test_an_address_that_a_far_gateway_cannot_reach_is_warned_about_once(
    options: dict[str, Any], shown: str
) -> None:
    (host, _), logs = advertised(gateway="http://u:word@gateway:4000", **options)
    assert host == shown
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("advertised_unreachable", "warning")
    assert line["host"] == shown
    assert "--advertise-host" in line["hint"]
    assert "word" not in line["gateway"]


@pytest.mark.parametrize("options", [{"listens": "127.0.0.1"}, {"uds": "/run/s"}])
def test_a_gateway_on_this_machine_reaches_everything(options: dict[str, Any]) -> None:
    _, logs = advertised(gateway="127.0.0.1:4000", **options)
    assert logs == []


@pytest.mark.parametrize(
    ("text", "host"),
    [("10.0.0.7", "10.0.0.7"), ("[fd00::7]", "fd00::7"), ("worker-1.pods", "worker-1.pods")],
)
def test_hosts_that_can_be_advertised(text: str, host: str) -> None:
    assert advertisable(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0.0.0.0", "[::]", "0", "0x0", "00.0.0.0", "::ffff:0.0.0.0"),
        *("http://w", "w:8000", "a b", "w/x", "a\nb", "-w"),
    ],
)
def test_hosts_that_cannot_be_advertised(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        advertisable(text)


@pytest.mark.parametrize(
    "words",
    [
        ["--advertise-host", "0.0.0.0"],
        ["--advertise-host", "http://w"],
        ["--advertise-port", "0"],
        ["--advertise-port", "65536"],
    ],
)
def test_a_wrong_flag_is_a_wrong_argument(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_known_args(["serve", *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gateway", "expected"),
    [
        ("g:4000", ("g", 4000)),
        ("http://u:p@g", ("g", 80)),
        ("[::1]:4000", ("::1", 4000)),
        ("g:port", ("", 80)),
    ],
)
def test_the_host_of_a_gateways_address(gateway: str, expected: tuple[str, int]) -> None:
    assert gateway_host(gateway) == expected


def test_which_hosts_are_clearly_this_machine() -> None:
    for host in ("127.0.0.1", "localhost", "::1", socket.gethostname()):
        assert is_here(host)
    for host in ("192.0.2.1", "gateway.example", "2001:db8::1"):
        assert not is_here(host)


# --- who the worker is


def identity(argv: list[str], **options: Any) -> dict[str, Any]:
    backend = VLLMBackend(
        argparse.Namespace(),
        ["--model", "org/demo", *argv],
        options=Options(defer_parsing=True, gateway="127.0.0.1:4000", **options),
    )
    heartbeat = backend._heartbeat()
    assert heartbeat is not None
    return dict(heartbeat._identity())


def test_a_worker_that_is_killed_and_started_again_is_the_same_to_the_gateway() -> None:
    """Its id holds no pid, which would be a second worker's until the Gateway forgets the first."""
    name = socket.gethostname()
    assert identity(["--port", "8001"])["worker_id"] == f"{name}-8001"
    assert identity([])["worker_id"] == f"{name}-8000"
    assert identity(["--uds", "/run/w.sock"])["worker_id"] == f"{name}-/run/w.sock"
    assert identity(["--port", "8001"], worker_id="w1")["worker_id"] == "w1"


def test_workers_on_any_free_port_are_told_apart_by_their_pids() -> None:
    assert identity(["--port", "0"])["worker_id"] == f"{socket.gethostname()}-{os.getpid()}"


def test_what_is_advertised_is_what_the_flags_say() -> None:
    found = identity(["--port", "8001"], advertise_host="w.example", advertise_port=443)
    assert (found["host"], found["port"]) == ("w.example", 443)
