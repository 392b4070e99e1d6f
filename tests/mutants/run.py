"""Mutation testing: would the tests notice? `make mutants` runs it; mutants.toml says what and how.

Runs in copies of the project, never in the project itself. Fails where a mutant survives that
survivors.toml does not explain, and where too few are killed.
"""

from __future__ import annotations

import argparse
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from forks import Forks
from mutating import Mutant, mutants_of

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
PACKAGE = "ichat_lifecycle"
PYTEST = ("-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist")
NO_LIMIT_S = 600.0


class Config:
    """mutants.toml and survivors.toml."""

    def __init__(self) -> None:
        read = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))
        explained = tomllib.loads((HERE / "survivors.toml").read_text(encoding="utf-8"))
        self.modules: dict[str, str] = read["modules"]
        self.tests: list[str] = read["tests"]
        self.options: list[str] = read["options"]
        self.imports: list[str] = read["imports"]
        self.environment: dict[str, str] = read["environment"]
        self.operators_out = "|".join(read["operators_out"])
        self.lines_out = "|".join(read["lines_out"])
        self.least_killed: float = read["least_killed"]
        self.processes: int = read["processes"]
        self.patience: float = read["patience"]
        self.memory: int = read["memory"]
        self.explained = {_key_of(entry): entry["why"] for entry in explained.get("survivor", ())}


def _key_of(entry: dict[str, str]) -> tuple[str, ...]:
    return tuple(entry[part] for part in ("module", "function", "operator", "was", "becomes"))


class Copy:
    """A copy of the project, in which one mutant lives at a time."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root = root
        self._config = config
        shutil.copytree(
            PROJECT,
            root,
            ignore=shutil.ignore_patterns(".*", "__pycache__", "benchmarks"),
            dirs_exist_ok=True,
        )
        # By content: a mutant may be as long, and as old to the second, as what it replaces.
        compiling = [sys.executable, "-m", "compileall", "-qq", "--invalidation-mode"]
        subprocess.run([*compiling, "checked-hash", root / PACKAGE], check=True)
        environment = {**config.environment, "PYTHONDONTWRITEBYTECODE": "1"}
        self._forks = Forks(root, config.imports, environment, config.memory)

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self._forks.__exit__()

    def survives(self, mutant: Mutant, limit_s: float) -> bool:
        path = self.root / PACKAGE / mutant.module
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.code, encoding="utf-8")
        try:
            # Most are killed by the first few tests: the others need not even be collected.
            first = [self._config.modules[mutant.module]]
            return self.passes(first, limit_s) and self.passes(self._config.tests, limit_s)
        finally:
            path.write_text(original, encoding="utf-8")

    def passes(self, tests: list[str], limit_s: float, *, told: bool = False) -> bool:
        """Whether these tests pass, in time."""
        return self._forks.passes([*PYTEST, *self._config.options, *tests], limit_s, told=told)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where all is well, 1 where it is not, 2 where the tests fail without a mutant."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make mutants")
    parser.add_argument("--only", default="", metavar="REGEX", help="of `module function operator`")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the copies go away
    config = Config()
    if args.list:
        for mutant in _mutants(config, args.only):
            print(_described(mutant))
        return 0
    began = time.monotonic()
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-"))
        copies = [
            stack.enter_context(Copy(Path(temporary) / str(n), config))
            for n in range(config.processes)
        ]
        limit_s = _limit_s(copies, config)
        if limit_s is None:
            return 2
        lived = _lives(config, args.only, copies, limit_s)
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes")
    return _told(config, lived, whole=not args.only)


def _limit_s(copies: list[Copy], config: Config) -> float | None:
    """How long a mutant may take; None where the tests fail without one."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(copies)) as pool:
        runs = [
            pool.submit(copy.passes, config.tests, NO_LIMIT_S, told=copy is copies[0])
            for copy in copies
        ]
        passed = [run.result() for run in runs]
    took_s = time.monotonic() - began
    print(f"the tests take {took_s:.0f} s without a mutant", flush=True)
    return took_s * config.patience if all(passed) else None


def _mutants(config: Config, only: str) -> Iterator[Mutant]:
    for module in config.modules:
        code = (PROJECT / PACKAGE / module).read_text(encoding="utf-8")
        yield from mutants_of(module, code, config.operators_out, config.lines_out, only)


def _lives(
    config: Config, only: str, copies: list[Copy], limit_s: float
) -> list[tuple[Mutant, bool]]:
    """Each mutant, and whether it survived; tells of it as soon as it is known."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def live(mutant: Mutant) -> bool:
        copy = free.get()
        try:
            survived = copy.survives(mutant, limit_s)
        finally:
            free.put(copy)
        if survived and mutant.key not in config.explained:
            print(f"\nsurvived: {_described(mutant)}", flush=True)
        return survived

    pool = ThreadPoolExecutor(len(copies))
    try:
        # Tests begin while there are still mutants to be made.
        lives: list[tuple[Mutant, Future[bool]]] = [
            (mutant, pool.submit(live, mutant)) for mutant in _mutants(config, only)
        ]
        return [(mutant, life.result()) for mutant, life in lives]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all the rest


def _described(mutant: Mutant) -> str:
    where = f"{PACKAGE}/{mutant.module}:{mutant.line} {mutant.function} {mutant.operator}"
    return f"{where}\n  - {mutant.was}\n  + {mutant.becomes}"


def _told(config: Config, lived: list[tuple[Mutant, bool]], whole: bool) -> int:
    """The summary, and the exit code that follows from it."""
    survivors = [mutant for mutant, survived in lived if survived]
    unexplained = [mutant for mutant in survivors if mutant.key not in config.explained]
    for mutant in survivors:
        why = config.explained.get(mutant.key, "NOT EXPLAINED in survivors.toml")
        print(f"{_described(mutant)}\n    {why}")
    for key in config.explained.keys() - {mutant.key for mutant in survivors} if whole else ():
        print(f"no survivor any more, to be taken out of survivors.toml: {key}")
    killed = len(lived) - len(survivors)
    share = killed / len(lived) if lived else 0.0
    print(f"{len(lived)} mutants, {killed} killed, {len(survivors)} survived: {share:.1%} killed")
    if unexplained:
        print(f"{len(unexplained)} of the survivors are not explained")
    too_few = whole and share < config.least_killed
    return 1 if unexplained or too_few else 0


if __name__ == "__main__":
    sys.exit(main())
