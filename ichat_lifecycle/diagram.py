"""The table as a picture: Mermaid for documents, SVG for the page, with the way a life has gone.

The edges are the table's own rows. Only their places on the paper are here: a state without a place
or a row without a route fails a test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

from ichat_lifecycle.states import TABLE, State, Trigger

# A row of the table from one of its sources.
Edge = tuple[Trigger, State]

WIDTH, HEIGHT = 980, 316
_BOX_W, _BOX_H = 140, 46
_STOP_Y = 218  # all ways to STOPPING run together here

_PLACES: Mapping[State, tuple[int, int]] = {
    State.PARSED: (20, 40),
    State.BOUND: (210, 40),
    State.ENGINE_UP: (400, 40),
    State.SERVING: (590, 40),
    State.READY: (780, 40),
    State.DEGRADED: (780, 140),
    State.STOPPING: (590, 250),
    State.STOPPED: (780, 250),
}


@dataclass(frozen=True)
class Way:
    """How a life has gone so far.

    Attributes:
        current: where it is; None for the bare table.
        taken: how often it went along each edge.
    """

    current: State | None = None
    taken: Mapping[Edge, int] = field(default_factory=dict)

    @classmethod
    def of(cls, current: State, edges: Iterable[Edge]) -> Way:
        """The way along these edges, in whatever order."""
        return cls(current, Counter(edges))


BARE = Way()


def edges() -> Iterator[tuple[Edge, State]]:
    """Each edge of the table with the state it leads to."""
    for row in TABLE:
        for source in row.sources:
            yield (row.trigger, source), row.dest


# Mermaid ------------------------------------------------------------------------------------------


def mermaid(way: Way = BARE) -> str:
    """A Mermaid state diagram; edges that were taken say how often."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.PARSED}"]
    for (trigger, source), dest in edges():
        times = way.taken.get((trigger, source), 0)
        lines.append(f"    {source} --> {dest}: {trigger}{f' ({times})' if times else ''}")
    lines.append(f"    {State.STOPPED} --> [*]")
    if way.current is not None:
        lines += ["    classDef current font-weight:bold,stroke-width:3px"]
        lines += [f"    class {way.current} current"]
    return "\n".join(lines)


# SVG ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Route:
    """Where an edge runs, and where its name stands."""

    path: str
    label: tuple[int, int]
    anchor: str = "middle"


STYLE = """
.diagram { font: 13px system-ui, sans-serif; --line: #9aa3ad; --ink: #333a42; --paper: #fff;
  --way: #2f6fde; --good: #1d7f46; --warn: #b45f06; --busy: #2f6fde; --end: #6b7280; }
@media (prefers-color-scheme: dark) { .diagram { --line: #59636e; --ink: #d6dce3;
  --paper: #1b2027; --way: #7aa8ff; --good: #3fb871; --warn: #f0a33c; --busy: #7aa8ff;
  --end: #99a2ad; } }
.diagram .edge { fill: none; stroke: var(--line); stroke-width: 1.5; marker-end: url(#tip); }
.diagram .edge.taken { stroke: var(--way); stroke-width: 2.5; marker-end: url(#tip-taken); }
.diagram .tip { fill: var(--line); } .diagram .tip.taken { fill: var(--way); }
.diagram .trigger { fill: var(--ink); font-size: 12px; opacity: .8; }
.diagram .box { fill: var(--paper); stroke: var(--line); stroke-width: 1.5; }
.diagram .name { fill: var(--ink); font-weight: 600; }
.diagram .visited .box { stroke: var(--way); stroke-width: 2; }
.diagram .current .box { fill: var(--busy); stroke: var(--busy); }
.diagram .current .name { fill: var(--paper); }
.diagram .current.READY .box { fill: var(--good); stroke: var(--good); }
.diagram .current.DEGRADED .box { fill: var(--warn); stroke: var(--warn); }
.diagram .current.STOPPING .box, .diagram .current.STOPPED .box { fill: var(--end);
  stroke: var(--end); }
"""


def svg(way: Way = BARE, *, style: str | None = STYLE) -> str:
    """An SVG image.

    Args:
        style: its style sheet; None where the page around it has one.
    """
    told = escape(_told(way))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="diagram" role="img" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}"><title>{told}</title>'
    )
    parts = [head, f"<style>{style}</style>" if style else "", _TIPS]
    # What was taken comes last, over the ways that run together with it.
    ordered = sorted(edges(), key=lambda known: known[0] in way.taken)
    parts += [_edge(edge, dest, taken=edge in way.taken) for edge, dest in ordered]
    parts += [_label(row.trigger, _route((row.trigger, row.sources[0]), row.dest)) for row in TABLE]
    parts += [_box(state, way) for state in State]
    return "\n".join(filter(None, [*parts, "</svg>"]))


def _tip(name: str, kind: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" '
        f'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path class="{kind}" d="M0 0 8 4 0 8z"/></marker>'
    )


_TIPS = f"<defs>{_tip('tip', 'tip')}{_tip('tip-taken', 'tip taken')}</defs>"


def _told(way: Way) -> str:
    if way.current is None:
        return "The states of a worker"
    return f"The worker is {way.current}"


def _edge(edge: Edge, dest: State, *, taken: bool) -> str:
    trigger, source = edge
    return (
        f'<path class="edge{" taken" if taken else ""}" data-edge="{trigger}-{source}" '
        f'd="{_route(edge, dest).path}"/>'
    )


def _label(trigger: Trigger, route: _Route) -> str:
    x, y = route.label
    return f'<text class="trigger" x="{x}" y="{y}" text-anchor="{route.anchor}">{trigger}</text>'


def _box(state: State, way: Way) -> str:
    x, y = _PLACES[state]
    kinds = ["state", state.value]
    kinds += ["current"] if state is way.current else []
    kinds += ["visited"] if _visited(state, way) else []
    return (
        f'<g class="{" ".join(kinds)}" data-state="{state}">'
        f'<rect class="box" x="{x}" y="{y}" width="{_BOX_W}" height="{_BOX_H}" rx="8"/>'
        f'<text class="name" x="{x + _BOX_W // 2}" y="{y + _BOX_H // 2 + 5}" '
        f'text-anchor="middle">{state}</text></g>'
    )


def _visited(state: State, way: Way) -> bool:
    """Whether the life is there or was: it left by some edge."""
    return state is way.current or any(source is state for _, source in way.taken)


def _route(edge: Edge, dest: State) -> _Route:
    trigger, source = edge
    if trigger is Trigger.STOP:
        return _to_stopping(source)
    return _SPECIAL[trigger] if trigger in _SPECIAL else _along(source, dest)


def _along(source: State, dest: State) -> _Route:
    """Between two neighbours in a line."""
    (x, y), (to, _) = _PLACES[source], _PLACES[dest]
    middle = y + _BOX_H // 2
    return _Route(f"M{x + _BOX_W} {middle}H{to}", ((x + _BOX_W + to) // 2, y - 8))


def _to_stopping(source: State) -> _Route:
    x, y = _PLACES[source]
    end_x, end_y = _PLACES[State.STOPPING]
    end = f"H{end_x + _BOX_W // 2}V{end_y}"
    label = (340, _STOP_Y - 7)
    if source is State.READY:  # round DEGRADED, which is below it
        return _Route(f"M{x + _BOX_W} {y + _BOX_H // 2}h26V{_STOP_Y}{end}", label)
    return _Route(f"M{x + 30} {y + _BOX_H}V{_STOP_Y}{end}", label)


_READY_X, _READY_Y = _PLACES[State.READY]
_DEGRADED_X, _DEGRADED_Y = _PLACES[State.DEGRADED]
_BOUND_X, _BOUND_Y = _PLACES[State.BOUND]
_BETWEEN_Y = (_READY_Y + _BOX_H + _DEGRADED_Y) // 2 + 4

_SPECIAL: Mapping[Trigger, _Route] = {
    Trigger.DEGRADE: _Route(
        f"M{_READY_X + 50} {_READY_Y + _BOX_H}V{_DEGRADED_Y}", (_READY_X + 44, _BETWEEN_Y), "end"
    ),
    Trigger.RECOVER: _Route(
        f"M{_DEGRADED_X + 90} {_DEGRADED_Y}V{_READY_Y + _BOX_H}",
        (_DEGRADED_X + 96, _BETWEEN_Y),
        "start",
    ),
    Trigger.RESTART_ENGINE: _Route(
        f"M{_DEGRADED_X} {_DEGRADED_Y + _BOX_H // 2}H{_BOUND_X + 90}V{_BOUND_Y + _BOX_H}",
        (_BOUND_X + 300, _DEGRADED_Y + _BOX_H // 2 - 7),
    ),
}
