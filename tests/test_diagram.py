"""The diagram: drawn from the table, with the way a life has gone."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations
from xml.etree import ElementTree

import pytest

from ichat_lifecycle.diagram import HEIGHT, WIDTH, Edge, Way, edges, mermaid, svg
from ichat_lifecycle.states import TABLE, State, Trigger

SVG = "{http://www.w3.org/2000/svg}"
UP: list[Edge] = [
    (Trigger.BIND, State.PARSED),
    (Trigger.START_ENGINE, State.BOUND),
    (Trigger.SERVE, State.ENGINE_UP),
    (Trigger.BECOME_READY, State.SERVING),
]
DEGRADE, RECOVER = (Trigger.DEGRADE, State.READY), (Trigger.RECOVER, State.DEGRADED)


def parsed(way: Way | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(svg(way) if way else svg())  # our own


def paths(way: Way | None = None) -> dict[str, ElementTree.Element]:
    found = parsed(way).iter(f"{SVG}path")
    return {path.attrib["data-edge"]: path for path in found if "data-edge" in path.attrib}


def boxes(way: Way | None = None) -> dict[str, ElementTree.Element]:
    found = parsed(way).iter(f"{SVG}g")
    return {group.attrib["data-state"]: group for group in found}


def rectangle(group: ElementTree.Element) -> tuple[int, int, int, int]:
    attributes = group.find(f"{SVG}rect").attrib  # type: ignore[union-attr]
    x, y, width, height = (int(attributes[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def ends(path: ElementTree.Element) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where it begins and ends, by following its horizontal and vertical steps."""
    x = y = 0
    points = []
    for step, numbers in re.findall(r"([MHVh])([-\d ]+)", path.attrib["d"]):
        first, *rest = (int(number) for number in numbers.split())
        match step:
            case "M":
                x, y = first, rest[0]
            case "H":
                x = first
            case "h":
                x += first
            case "V":
                y = first
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
        points.append((x, y))
    return points[0], points[-1]


def on_the_border(point: tuple[int, int], box: tuple[int, int, int, int]) -> bool:
    (x, y), (left, top, right, bottom) = point, box
    inside = left <= x <= right and top <= y <= bottom
    return inside and (x in (left, right) or y in (top, bottom))


def test_each_edge_of_the_table_runs_from_its_source_to_its_end() -> None:
    places = {name: rectangle(group) for name, group in boxes().items()}
    assert set(places) == set(State)
    known = dict(edges())
    assert len(known) == sum(len(row.sources) for row in TABLE) == len(paths())
    for (trigger, source), dest in known.items():
        begin, end = ends(paths()[f"{trigger}-{source}"])
        assert on_the_border(begin, places[source]), (trigger, source)
        assert on_the_border(end, places[dest]), (trigger, dest)


def test_no_box_lies_on_another() -> None:
    for one, other in combinations(map(rectangle, boxes().values()), 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def test_each_trigger_is_named_once() -> None:
    names = [text.text for text in parsed().iter(f"{SVG}text") if text.attrib["class"] == "trigger"]
    assert sorted(filter(None, names)) == sorted(Trigger)


def test_the_way_is_marked() -> None:
    way = Way.of(State.DEGRADED, [*UP, DEGRADE, RECOVER, DEGRADE])
    taken = {name for name, path in paths(way).items() if "taken" in path.attrib["class"].split()}
    assert taken == {f"{trigger}-{source}" for trigger, source in [*UP, DEGRADE, RECOVER]}
    kinds = {name: set(group.attrib["class"].split()) for name, group in boxes(way).items()}
    assert [name for name, kind in kinds.items() if "current" in kind] == ["DEGRADED"]
    visited = {name for name, kind in kinds.items() if "visited" in kind}
    assert visited == set(State) - {State.STOPPING, State.STOPPED}
    assert "The worker is DEGRADED" in svg(way)


def test_the_bare_table_shows_no_way() -> None:
    assert not [path for path in paths().values() if "taken" in path.attrib["class"].split()]
    assert not [
        g for g in boxes().values() if {"current", "visited"} & set(g.attrib["class"].split())
    ]


def test_within_a_page_it_brings_no_style() -> None:
    """The page's content security policy allows none from within."""
    assert "<style" in svg()
    assert "style" not in svg(style=None)


def test_mermaid_tells_how_often() -> None:
    text = mermaid(Way.of(State.DEGRADED, [*UP, DEGRADE, RECOVER, DEGRADE]))
    assert "    READY --> DEGRADED: degrade (2)\n" in text
    assert "    DEGRADED --> BOUND: restart_engine\n" in text
    assert text.endswith("    class DEGRADED current")
    assert "class" not in mermaid()


@pytest.mark.parametrize(("flags", "text"), [([], mermaid()), (["--format", "svg"], svg())])
def test_the_command_prints_it(flags: list[str], text: str) -> None:
    command = [sys.executable, "-m", "ichat_lifecycle", "diagram", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == text + "\n"
