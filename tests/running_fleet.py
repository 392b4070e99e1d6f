"""A fleet that runs: `up` as a process, its workers with fakes for engines, and who asks them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml
from waiting import DEADLINE_S, until

PROGRAM = Path(__file__).with_name("fleet_up.py")
TOKEN = "fleet-token"
LOOPBACK = "127.0.0.1"


def request(model: str, tokens: int) -> dict[str, Any]:
    """What a client asks for."""
    return {"model": model, "prompt": "Hello", "max_tokens": tokens, "temperature": 0}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


class RunningFleet:
    """A context manager; at its end everything of the fleet has ended, else it raises."""

    program: Sequence[str] = (sys.executable, str(PROGRAM))

    def __init__(self, directory: Path, *workers: Mapping[str, Any], **sections: Any) -> None:
        self.file = directory / "configs.yaml"
        self._model = directory / "model"
        self._model.mkdir(exist_ok=True)
        (self._model / "config.json").write_text("{}")
        self.sections: dict[str, Any] = {
            "fleet": {"port": 0, "token": TOKEN, "max_parallel_starts": 4},
            **sections,
        }
        self.workers = [self.worker(**worker) for worker in workers]
        self.lines: list[dict[str, Any]] = []
        self.url = ""

    def worker(self, model_name: str, **more: Any) -> dict[str, Any]:
        """One for the file, with a port of its own."""
        (port,) = free_ports(1)
        whole = {"model_path": str(self._model), "port": port, "control_port": 0, **more}
        return {"model_name": model_name, **whole}

    def write(self) -> None:
        """The file as it should be now."""
        self.file.write_text(yaml.safe_dump({**self.sections, "managed_workers": self.workers}))

    def __enter__(self) -> Self:
        self.write()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*self.program, str(self.file)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = until(lambda: self.process.poll() is not None or self._url())
        return self

    def __exit__(self, *_: object) -> None:
        pids = self.pids
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        until(lambda: not any(map(psutil.pid_exists, pids)))
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                document: Any = None
                with contextlib.suppress(ValueError):
                    document = json.loads(line)
                self.lines.append(document if isinstance(document, dict) else {"text": line})

    def _url(self) -> str:
        return next((line["url"] for line in self.lines if line.get("event") == "fleet"), "")

    @property
    def pids(self) -> list[int]:
        """Of all workers that there were."""
        return [line["pid"] for line in self.events("worker") if line.get("trigger") == "start"]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == name]

    # --- asking

    def get(self, path: str) -> httpx.Response:
        with self._client() as client:
            return client.get(path)

    def post(self, path: str, body: Any = None, token: str | None = TOKEN) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with self._client() as client:
            return client.post(path, json=body, headers=headers)

    def _client(self) -> httpx.Client:
        uds = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        transport = httpx.HTTPTransport(uds=uds)
        url = "http://fleet" if uds else self.url
        return httpx.Client(base_url=url, transport=transport, timeout=DEADLINE_S)

    def seen(self, name: str) -> dict[str, Any]:
        """One worker as the supervisor sees it."""
        document: dict[str, Any] = self.get(f"/fleet/{name}").json()
        return document

    def serving(self, *names: str) -> bool:
        return all(self.seen(name)["stage"] == "serving" for name in names)

    def ready(self) -> bool:
        return self.get("/readyz").status_code == 200

    def wait_until_ready(self) -> Self:
        try:
            until(self.ready)
        except AssertionError as error:
            error.add_note(json.dumps(self.get("/fleet").json(), indent=2))
            error.add_note("\n".join(map(str, self.lines[-30:])))
            raise
        return self

    def port(self, name: str) -> int:
        return next(
            int(w["port"]) for w in self.workers if name in (w.get("name"), w["model_name"])
        )

    def ask(self, name: str) -> httpx.Response:
        return httpx.post(
            f"http://{LOOPBACK}:{self.port(name)}/v1/completions",
            json=request(name, 8),
            timeout=DEADLINE_S,
            trust_env=False,
        )

    @contextlib.contextmanager
    def asked_all_the_time(self, name: str, every_s: float = 0.02) -> Iterator[Asked]:
        """While it lasts, a client asks, each time on a new connection."""
        asked = Asked(self.port(name), json.dumps(request(name, 1)), every_s)
        thread = threading.Thread(target=asked.run)
        thread.start()
        try:
            yield asked
        finally:
            asked.enough.set()
            thread.join()


class Asked:
    """What a client has seen: `counts` by status, or by what it failed with."""

    def __init__(self, port: int, body: str, every_s: float) -> None:
        self._port, self._every_s = port, every_s
        self._request = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
        )
        self.enough = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while not self.enough.is_set():
                group.create_task(self._ask())
                await asyncio.sleep(self._every_s)

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                self.counts[await self._status()] += 1
        except Exception as error:
            self.counts[type(error).__name__] += 1

    async def _status(self) -> str:
        reader, writer = await asyncio.open_connection(LOOPBACK, self._port)
        try:
            writer.write(self._request.encode())
            if not (answer := await reader.read()):
                raise ConnectionResetError("closed before the request was there")
            return answer.split(b" ", 2)[1].decode()
        finally:
            writer.close()
