"""Prints the fault matrix as this run measured it: `vllm serve` beside ours. Exit 1 if one fails.

make faults [FAULTS="--rows 1,3,9 --times 10 --saturate 60 --no-vllm-serve"]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

from ichat_lifecycle.demo_model import make_demo_model

from .lab import Lab
from .matrix import ROWS, Row
from .measure import Measured, slowness

WIDTH = 100
BUSY = 1.3  # times as slow as a quiet machine, from which on times say little


@dataclass
class Outcome:
    """What all runs of one row showed."""

    row: Row
    theirs: str = "-"
    slowness: float = 1.0
    shown: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, variant: str, number: int, measured: Measured | Exception, took_s: float) -> None:
        name = ", ".join(filter(None, [variant, f"run {number}" if number > 1 else ""]))
        prefix = f"{name}: " if name else ""
        if isinstance(measured, Measured):
            self.shown.append(f"{prefix}{measured.shown()}")
            self.failed += [f"{prefix}{what}" for what in measured.failed()]
        else:
            self.failed.append(f"{prefix}{type(measured).__name__}: {measured} ({took_s:.0f} s)")

    def text(self) -> str:
        verdict = "FAILED" if self.failed else "ok"
        busy = (
            f" (a busy machine: {self.slowness:.1f} times as slow)" if self.slowness > BUSY else ""
        )
        lines = [f"{self.row.number:>2}  {self.row.fault}  {verdict}{busy}"]
        lines += _wrapped("vllm serve: ", self.theirs)
        for line in self.shown:
            lines += _wrapped("ours:       ", line)
        for line in self.failed:
            lines += _wrapped("FAILED:     ", line)
        return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    indent = " " * 4
    return textwrap.wrap(
        head + text, WIDTH, initial_indent=indent, subsequent_indent=indent + " " * len(head)
    )


def main() -> int:
    args = _parser().parse_args()
    rows = [row for row in ROWS if not args.rows or row.number in args.rows]
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "demo"
        make_demo_model(model)
        lab = Lab(str(model), args.saturate)
        try:
            outcomes = [_run(lab, row, args.times, args.vllm_serve) for row in rows]
        finally:
            lab.close()
    _print_table(outcomes)
    return int(any(outcome.failed for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make faults", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=_numbers, help="for example 1,3,9; default: all")
    parser.add_argument("--times", type=int, default=1, help="how often each row is run")
    parser.add_argument(
        "--saturate", type=float, default=600.0, metavar="SECONDS", help="how long fault 7 lasts"
    )
    parser.add_argument(
        "--no-vllm-serve", dest="vllm_serve", action="store_false", help="measure ours only"
    )
    return parser


def _numbers(text: str) -> set[int]:
    numbers = {int(part) for part in text.replace(",", " ").split()}
    if unknown := numbers - {row.number for row in ROWS}:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(map(str, sorted(unknown)))}")
    return numbers


def _run(lab: Lab, row: Row, times: int, vllm_serve: bool) -> Outcome:
    outcome = Outcome(row)
    if vllm_serve and row.theirs is not None:
        with tempfile.TemporaryDirectory() as directory:
            try:
                outcome.theirs = row.theirs(lab, Path(directory))
            except Exception as error:  # the table goes on without this one
                outcome.theirs = f"could not be measured: {error!r}"
    for number in range(1, times + 1):
        for variant in row.variants:
            began = time.monotonic()
            measured = _drive(lab, row, variant)
            outcome.add(variant, number, measured, time.monotonic() - began)
            outcome.slowness = max(outcome.slowness, slowness())
    print(outcome.text(), flush=True)
    return outcome


def _drive(lab: Lab, row: Row, variant: str) -> Measured | Exception:
    with tempfile.TemporaryDirectory() as directory:
        try:
            return row.ours(lab, variant, Path(directory))
        except Exception as error:
            lab.close()  # whatever state that left it in
            return error


def _print_table(outcomes: list[Outcome]) -> None:
    failed = [outcome.row.number for outcome in outcomes if outcome.failed]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} rows ok", end="")
    print(f"; FAILED: {', '.join(map(str, sorted(failed)))}" if failed else "")


if __name__ == "__main__":
    sys.exit(main())
