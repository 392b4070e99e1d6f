"""What a fault did, as seen from outside: polls, streams, the process table, shared memory."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from harness import Server, Worker, living_in, wait_for

POLL_S = 0.005
STREAM_TIMEOUT_S = 240.0
SHARED_MEMORY = Path("/dev/shm")

COMPLETE, ERROR, CUT = "complete", "error", "cut"


@dataclass(frozen=True)
class Claim:
    """What has to be true of a fault. `times`: by how much a limit was missed, where it is one."""

    what: str
    holds: bool
    times: float = 1.0


@dataclass
class Measured:
    """Named numbers, and each claim's verdict. A claim that fails carries what was seen."""

    numbers: dict[str, float | int | str | None] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def number(self, name: str, value: float | int | str | None) -> None:
        self.numbers[name] = round(value, 3) if isinstance(value, float) else value

    def claim(self, what: str, holds: bool, seen: object = None) -> None:
        self.claims.append(
            Claim(what if holds or seen is None else f"{what} (seen: {seen})", holds)
        )

    def within(self, name: str, value: float | None, limit_s: float) -> None:
        """A number that is a time, and the claim that it keeps its limit."""
        self.number(name, value)
        times = math.inf if value is None else value / limit_s
        seen = "" if times <= 1 else f" (seen: {value})"
        self.claims.append(Claim(f"{name} within {limit_s:g} s{seen}", times <= 1, times))

    def failed(self, slowness: float = 1.0) -> list[str]:
        """The claims that do not hold; with `slowness`, limits are that many times as long."""
        return [c.what for c in self.claims if not c.holds and not 1 < c.times <= slowness]

    def shown(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.numbers.items())


def slowness(work_s: float = 0.2) -> float:
    """How many times as long as on a quiet machine work takes now: 1 where nobody else has any."""
    began, used = time.monotonic(), time.thread_time()
    while time.thread_time() < used + work_s:
        pass
    return max(1.0, (time.monotonic() - began) / work_s)


# Polling ------------------------------------------------------------------------------------------


class Poller:
    """Asks one URL every POLL_S on a kept-alive connection, and keeps each answer with its time."""

    def __init__(self, url: str, interval_s: float = POLL_S, *, bodies: bool = False) -> None:
        self._url = httpx.URL(url)
        self._interval_s = interval_s
        self._bodies = bodies
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[tuple[float, int | None]] = []  # None: nobody answered
        self.waits_s: list[float] = []
        self.documents: list[Any] = []

    def __enter__(self) -> Poller:
        self._thread.start()
        wait_for(lambda: self.answers, "a first poll", 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        connection = self._connect()
        while not self._ended.wait(self._interval_s):
            began = time.monotonic()
            try:
                connection.request("GET", self._url.path)
                answer = connection.getresponse()
                self._keep(answer.status, answer.read())
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                connection = self._connect()
                self._keep(None, b"")
            self.waits_s.append(time.monotonic() - began)
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._url.host, self._url.port, timeout=5)

    def _keep(self, status: int | None, body: bytes) -> None:
        self.answers.append((time.monotonic(), status))
        if self._bodies and body:
            self.documents.append(json.loads(body))

    def first(self, wanted: Callable[[int | None], bool], since: float) -> float | None:
        """Seconds from `since` to the first answer that is wanted; None without one."""
        return next(
            (at - since for at, s in tuple(self.answers) if at >= since and wanted(s)), None
        )

    def wait_first(
        self, wanted: Callable[[int | None], bool], since: float, timeout_s: float
    ) -> float | None:
        """The same, waiting for it."""
        while (found := self.first(wanted, since)) is None and time.monotonic() < since + timeout_s:
            time.sleep(POLL_S)
        return found


def not_200(status: int | None) -> bool:
    return status != httpx.codes.OK


def is_503(status: int | None) -> bool:
    return status == httpx.codes.SERVICE_UNAVAILABLE


def control_poller(server: Worker, path: str = "/readyz", interval_s: float = POLL_S) -> Poller:
    return Poller(server.control + path, interval_s, bodies=path == "/lifecycle")


# Streams ------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """How one streamed completion ended."""

    outcome: str = CUT
    tokens: int = 0
    ended_at: float = 0.0
    detail: str = ""


class Streams:
    """Some streamed completions at once, all of which have begun when this has been entered."""

    def __init__(self, main: str, count: int = 4, tokens: int = 1900) -> None:
        self._main, self._count, self._tokens = main, count, tokens
        self._begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(max(1, count))
        self._futures: list[Future[Stream]] = []

    def __enter__(self) -> Streams:
        self._futures = [self._pool.submit(self._one) for _ in range(self._count)]
        for _ in self._futures:
            assert self._begun.acquire(timeout=120), "a stream did not begin"
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)  # each is bounded by STREAM_TIMEOUT_S

    @property
    def running(self) -> int:
        return sum(not future.done() for future in self._futures)

    def ended(self, timeout_s: float) -> list[Stream]:
        """All of them; one that has not ended in time is told as hung."""
        deadline = time.monotonic() + timeout_s
        found = []
        for future in self._futures:
            try:
                found.append(future.result(max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                found.append(Stream("hung", ended_at=time.monotonic()))
        return found

    def _one(self) -> Stream:
        stream = Stream()
        try:
            self._read(stream)
        except httpx.HTTPError as error:
            stream.detail = repr(error)
        stream.ended_at = time.monotonic()
        if not stream.tokens:
            self._begun.release()  # it will never begin
        return stream

    def _read(self, stream: Stream) -> None:
        body = completion(self._tokens) | {"stream": True}
        url = f"{self._main}/v1/completions"
        with httpx.stream(
            "POST", url, json=body, timeout=STREAM_TIMEOUT_S, verify=False
        ) as response:
            if response.status_code != httpx.codes.OK:
                stream.outcome = f"refused {response.status_code}"
                return
            finished = False
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line:
                    continue
                if data == "[DONE]":
                    # vLLM ends a stream that broke with [DONE] too, after the error.
                    if stream.outcome != ERROR:
                        stream.outcome = COMPLETE if finished else CUT
                    continue
                event = json.loads(data)
                if "error" in event:
                    stream.outcome, stream.detail = ERROR, str(event["error"])
                    continue
                finished = event["choices"][0]["finish_reason"] == "length" or finished
                stream.tokens += 1
                if stream.tokens == 1:
                    self._begun.release()


def completion(tokens: int = 4, prompt: Any = "Hello") -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}


def ask(main: str, tokens: int = 4, timeout_s: float = 60) -> httpx.Response:
    url = f"{main}/v1/completions"
    return httpx.post(url, json=completion(tokens), timeout=timeout_s, verify=False)


def outcomes(streams: list[Stream]) -> str:
    """For example `4 error`, or `3 complete, 1 cut`."""
    kinds = [stream.outcome for stream in streams]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def all_are(streams: list[Stream], outcome: str) -> bool:
    return all(stream.outcome == outcome for stream in streams)


def long_prompt(tokens: int) -> list[int]:
    """Token ids, each prompt its own: the prefix cache must not save the work."""
    return [random.randrange(3, 512) for _ in range(tokens)]


# What is left -------------------------------------------------------------------------------------


def shared_memory_of(server: Server) -> set[Path]:
    """Entries of /dev/shm that processes of the server have mapped or opened now."""
    found: set[Path] = set()
    for process in living_in(server.directory):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8").splitlines()
            found |= {Path(line.split()[5]) for line in maps if f" {SHARED_MEMORY}/" in line}
    return {path for path in found if path.exists()}


def sockets_left(server: Server) -> list[str]:
    """Socket files in its own temporary directory."""
    # os.walk() passes over a directory that is removed meanwhile; Path.rglob() fails.
    files = (Path(place, name) for place, _, names in os.walk(server.temporary) for name in names)
    return sorted(path.name for path in files if path.is_socket())


def port_answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def left_of(server: Worker, shared: set[Path]) -> list[str]:
    """What is still there of a worker: processes, shared memory, socket files, open ports."""
    left = []
    for process in living_in(server.directory):
        with contextlib.suppress(Exception):
            left.append(f"pid {process.pid} {process.name()}")
    left += [str(path) for path in shared if path.exists()]
    left += sockets_left(server)
    left += [str(p) for p in (server.port, server.control_port) if port_answers(p)]
    return left


def claim_nothing_left(
    measured: Measured, server: Worker, shared: set[Path], within_s: float = 5
) -> None:
    began = time.monotonic()
    while (left := left_of(server, shared)) and time.monotonic() < began + within_s:
        time.sleep(POLL_S)
    measured.number("nothing left after", None if left else time.monotonic() - began)
    measured.claim(f"nothing left after {within_s:g} s", not left, left)


def exit_of(server: Server, since: float, timeout_s: float) -> tuple[float | None, int | None]:
    """Seconds to the end of the main process and its exit code; None, None if it has not ended."""
    deadline = time.monotonic() + timeout_s
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if server.process.returncode is None:
        return None, None
    return time.monotonic() - since, server.process.returncode


def wait_alive(server: Server, condition: Callable[[], Any], what: str) -> None:
    """Waits for it; a server that ends before it is told at once."""

    def reached() -> bool:
        if condition():
            return True
        assert server.process.poll() is None, f"ended before {what}: {last_line(server)}"
        return False

    wait_for(reached, what)


def last_line(server: Server) -> str:
    lines = server.log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else ""


@contextlib.contextmanager
def destroyed(server: Server) -> Iterator[None]:
    try:
        yield
    finally:
        server.destroy()
