"""The page as HTML, and its static files. Everything that comes from a worker is escaped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.page.course import Course
from ichat_lifecycle.control.page.model import DEFAULT_WINDOW, WINDOWS, page_of
from ichat_lifecycle.control.page.probes import Samples
from ichat_lifecycle.control.view import Identity, Life
from ichat_lifecycle.diagram import STYLE, Way, svg
from ichat_lifecycle.journal import Kind

HERE = Path(__file__).parent
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class StaticFile:
    content: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class StaticFiles:
    """All of them, in memory. Another `version` is another content: it may be cached for ever."""

    version: str
    files: Mapping[str, StaticFile]

    @classmethod
    def load(cls) -> StaticFiles:
        files = {
            path.name: StaticFile(_content(path), TYPES[path.suffix])
            for path in sorted((HERE / "static").iterdir())
            if path.suffix in TYPES
        }
        digest = hashlib.sha256(b"".join(file.content for file in files.values()))
        return cls(digest.hexdigest()[:12], files)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    # The diagram in the page has no style sheet of its own: the page's policy would refuse it.
    return content + STYLE.encode() if path.name == "page.css" else content


class Renderer:
    """Writes the page of one life.

    Args:
        loop: how the worker's event loop is.
        samples: what the watchdog has found.
        takes_commands: whether there is a control token.
        last_event: the id of the newest event, for the stream to go on after it.
    """

    def __init__(
        self,
        life: Life,
        identity: Identity,
        loop: Callable[[], LoopHealth],
        samples: Samples,
        *,
        takes_commands: bool,
        last_event: Callable[[], str],
    ) -> None:
        self.static = StaticFiles.load()
        self._life = life
        self._identity = identity
        self._loop = loop
        self._samples = samples
        self._last_event = last_event
        self._course = Course(life.journal)
        self._diagram = (-1, Markup())
        environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals |= {
            "static": f"/page/static/{self.static.version}",
            # A page that is open knows by it that it has become another one.
            "build": f"{self.static.version}{'+commands' if takes_commands else ''}",
            "takes_commands": takes_commands,
            "windows": WINDOWS,
            "kinds": " ".join([*Kind, "gap"]),
        }
        self._page, self._view = (environment.get_template(f"{n}.html") for n in ("page", "view"))

    def page(self, window: str = DEFAULT_WINDOW) -> bytes:
        """The whole document."""
        return self._write(self._page.render, window)

    def view(self, window: str = DEFAULT_WINDOW) -> bytes:
        """The part that changes."""
        return self._write(self._view.render, window)

    def _write(self, render: Callable[..., str], window: str) -> bytes:
        last_event = self._last_event()  # first: what comes meanwhile has the page asked for again
        samples, course = self._samples.newest(), self._course
        page = page_of(self._life, self._identity, self._loop(), samples, course, window)
        text = render(page=page, diagram=self._drawn(), last_event=last_event)
        # A path may hold bytes that are no text (lone surrogates): shown as "?", not as a 500.
        return text.encode("utf-8", "replace")

    def _drawn(self) -> Markup:
        """The diagram, drawn anew only after a transition: it is the dearest part of the page."""
        course = self._course
        if self._diagram[0] != course.taken.total():
            way = Way(course.state, course.taken)
            self._diagram = (course.taken.total(), Markup(svg(way, style=None)))
        return self._diagram[1]
