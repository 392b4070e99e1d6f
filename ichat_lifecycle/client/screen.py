"""The watch screen: the sections of one scene, in as many lines as there are."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ichat_lifecycle.client import sections
from ichat_lifecycle.client.lines import cut
from ichat_lifecycle.client.logbook import Scene
from ichat_lifecycle.client.look import FAINT
from ichat_lifecycle.states import STARTING_STATES

TALL = 36  # lines from which on there is room for more than the essentials
EVENTS_AT_LEAST = 3
STATUS = "ichat-lifecycle status"
BLANK = Text()


@dataclass(frozen=True, slots=True)
class Screen:
    """A rich renderable that fills the terminal it is shown on."""

    scene: Scene

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        yield Text("\n").join(screen_lines(self.scene, options.max_width, height))


def screen_lines(scene: Scene, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` cells.

    What matters most comes first and is kept: where it is, why, and then how it got there.
    """
    above = [
        *sections.header(scene, width),
        *(sections.contact(scene, width) or [BLANK]),
        *sections.path(scene, width),
        BLANK,
        *_why(scene, width, height),
    ]
    if len(above) >= height:
        more = f" … {len(above) - height + 1} more lines: {STATUS} {scene.url} --json"
        return [*above[: height - 1], cut(Text(more, FAINT), width)]
    body = _body(scene, width, height, height - len(above) - EVENTS_AT_LEAST - 1)
    left = height - len(above) - len(body) - 1
    return [*above, *body, BLANK, *sections.events(scene, width, left)]


def _why(scene: Scene, width: int, height: int) -> list[Text]:
    lines = sections.why(scene, width)
    return [*lines, BLANK] if lines and height >= TALL else lines


def _body(scene: Scene, width: int, height: int, room: int) -> list[Text]:
    """The blocks that there is room for, each as a whole."""
    tall = height >= TALL
    full = tall or scene.state in STARTING_STATES
    blocks = (
        sections.stop(scene, width, room),
        sections.load(scene, width, room) if full else sections.load_in_short(scene, width),
        sections.life(scene, width),
        sections.probes(scene, width, rows=3 if tall else 1),
        sections.verdicts(scene, width, 8 if tall else 3),
    )
    body: list[Text] = []
    for block in blocks:
        between = [BLANK] if tall and block and body else []
        if len(body) + len(between) + len(block) <= room:
            body += [*between, *block]
    return body
