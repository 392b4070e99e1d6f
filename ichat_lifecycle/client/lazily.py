"""Commands that are imported only once they are asked for: parsers stay light."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable


def lazily(module: str, name: str) -> Callable[[argparse.Namespace, list[str]], int]:
    """A command by the names of its module in this package and of its function there."""

    def run(args: argparse.Namespace, _: list[str]) -> int:
        code: int = getattr(importlib.import_module(f"ichat_lifecycle.{module}"), name)(args)
        return code

    return run
