"""The generated parts of states.md: the table, the diagram and the bound on a stop."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ichat_lifecycle.config import Settings
from ichat_lifecycle.diagram import mermaid
from ichat_lifecycle.states import TABLE


def table() -> str:
    """The table as Markdown."""
    lines = ["| trigger | from | to | guards | action |", "|---|---|---|---|---|"]
    for row in TABLE:
        sources = ", ".join(row.sources)
        guards = ", ".join(f"`{guard}`" for guard in row.guards) or "none"
        lines.append(f"| `{row.trigger}` | {sources} | {row.dest} | {guards} | {row.meaning} |")
    return "\n".join(lines)


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    return f"```mermaid\n{mermaid()}\n```"


def bound() -> str:
    """The longest possible stop with the default settings, stage by stage."""
    settings = Settings()
    lines = ["| stage | deadline |", "|---|---|"]
    lines += [f"| {stage} | {seconds:g} s |" for stage, seconds in settings.stop_stages().items()]
    return "\n".join([*lines, f"| **the longest possible stop** | **{settings.stop_bound:g} s** |"])


SECTIONS: Mapping[str, Callable[[], str]] = {"table": table, "diagram": diagram, "bound": bound}


def rendered(text: str) -> str:
    """`text` with everything between its markers made anew.

    Raises:
        ValueError: a marker is missing.
    """
    for name, make in SECTIONS.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"no markers for {name!r}")
        section = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _: section, text)  # noqa: B023  # called at once
    return text


def write(path: Path) -> None:
    """Makes the generated parts of the file anew."""
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


def check(path: Path) -> str | None:
    """What has drifted, or None."""
    text = path.read_text(encoding="utf-8")
    return None if rendered(text) == text else "the generated parts have drifted from the code"
