"""The parts of the watch screen: each a pure function from a scene to lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise

from rich.text import Text

from ichat_lifecycle.client.charts import (
    CELLS,
    MISSED,
    Stay,
    meter,
    sparkline,
    strip,
    waterfall,
)
from ichat_lifecycle.client.documents import (
    PHASE,
    STAGE,
    VERDICT,
    Entry,
    Progress,
    as_state,
)
from ichat_lifecycle.client.lines import GUTTER, columns, cut, folded, labelled, spread
from ichat_lifecycle.client.logbook import DOCUMENTS, Scene
from ichat_lifecycle.client.look import BAD, FAINT, STATE_STYLE
from ichat_lifecycle.client.words import (
    clock,
    counted,
    in_full,
    moment,
    of_expected,
    phase_name,
    span,
    told,
    took,
)
from ichat_lifecycle.states import STARTING_STATES, TABLE, State

NAME_WIDTH, TIME_WIDTH = 24, 10
HARMLESS = ("idle", "busy")
SUMMARY_WIDTH = 38
COUNTS_WIDTH = 50  # what stands beside a name, roughly: a long name must not hide the state
BAD_OUTCOMES = ("failed", "timed_out")


# --- who and where


def header(scene: Scene, width: int) -> list[Text]:
    """Two lines: what one looks for first, and who it is."""
    status = scene.status
    heard = scene.no_contact is None or scene.no_contact.what != DOCUMENTS
    style = STATE_STYLE[scene.state] if heard else "white"
    if scene.state is State.READY and not scene.ready:
        style = "red"
    name = cut(Text(f" {status.model or 'worker'}", "bold"), max(1, width - COUNTS_WIDTH))
    first = Text.assemble(
        name,
        "  ",
        (f" {scene.state} ", f"bold reverse {style}"),
        f" for {span(scene.for_s)}{'' if heard else ' (stale)'}",
        f" · {status.in_flight} in flight · {counted(status.restarts, 'restart')}",
    )
    facts = [scene.url, f"pid {status.pid}" if status.pid is not None else ""]
    facts.append(f"vLLM {status.vllm_version}" if status.vllm_version else "")
    second = Text(" " + " · ".join(fact for fact in facts if fact), FAINT)
    right = Text(f"since {moment(scene.since, scene.now, scene.zone)} ", FAINT)
    return [
        spread(first, Text(f"{clock(scene.now, scene.zone)} ", FAINT), width),
        spread(second, right, width),
    ]


def contact(scene: Scene, width: int) -> list[Text]:
    """Nothing while the worker is heard."""
    lost = scene.no_contact
    if lost is None:
        return []
    what = "no contact" if lost.what == DOCUMENTS else "no events"
    since = f"for {span(lost.for_s)}, since {clock(lost.since, scene.zone)}"
    text = f"{what} {since}: {lost.error.message}; trying again"
    return [Text(f" {line}".ljust(width), f"{BAD} reverse") for line in folded(text, width - 2)]


def path(scene: Scene, width: int) -> list[Text]:
    """The states in the order of the table, with where the worker is and has been."""
    been = {as_state(t.fields.get("source")) for t in scene.transitions}
    line, lines = Text(" "), []
    for state, following in [*pairwise(State), (State.STOPPED, None)]:
        here = state is scene.state
        name = f"[{state}]" if here else state.value
        step = f" {_arrow(state, following)} " if following else ""
        if line.cell_len + len(name) + len(step.rstrip()) > width - 1:
            lines.append(line)
            line = Text("   ")
        style = STATE_STYLE[state] if here or state in been else FAINT
        line.append(name, f"bold {style}" if here else style).append(step, FAINT)
    return [*lines, line]


def _arrow(state: State, following: State) -> str:
    back = any(row.dest is state and following in row.sources for row in TABLE)
    return "⇄" if back else "→"


# --- why it is not ready


def why(scene: Scene, width: int) -> list[Text]:
    """Reason, cause, hint, evidence, and warnings, all in full: that is what one needs at night."""
    reason = scene.status.reason
    parts: list[tuple[str, str]] = []
    if reason and not scene.ready:
        parts.append(("Reason", f"{reason.code}: {reason.message}"))
        parts += [("Cause", reason.root_cause), ("Hint", reason.hint)]
    parts.append(("Evidence", scene.status.evidence))
    parts += [("Warning", in_full(warning)) for warning in scene.status.warnings]
    style = {"Reason": "bold", "Hint": "green", "Warning": "yellow"}
    return [
        line
        for label, text in parts
        if text
        for line in labelled(
            label, [Text(t, style.get(label, "")) for t in folded(text, width - GUTTER - 1)], width
        )
    ]


# --- the load


def load(scene: Scene, width: int, most: int) -> list[Text]:
    """The phases of the start, each where it was in time; at most `most` lines of the newest."""
    progress = _progress_now(scene)
    if not progress.phase:
        return []
    bars = _bars(width)
    total_s = max(progress.elapsed_s, progress.expected_s or 0.0)
    lines = [_load_head(scene, progress, bars)]
    for name, begin_s, end_s in _phases(progress)[-max(1, most - 1) :]:
        now = scene.state in STARTING_STATES and end_s == progress.elapsed_s
        shown = phase_name(name, progress.fraction if now else None)
        head = columns([(f"{'▸ ' if now else '  '}{shown}", NAME_WIDTH)])
        spent = took(end_s - begin_s).rjust(TIME_WIDTH - 2)
        bar = waterfall(begin_s, end_s, total_s, bars)
        style = STATE_STYLE[State.BOUND] if now else FAINT
        lines.append(Text.assemble((head, "bold" if now else ""), spent, "  ", (bar, style)))
        if now and progress.download:
            lines.append(Text(f"  {progress.download}", FAINT))
    return labelled("Load", lines, width)


def load_in_short(scene: Scene, width: int) -> list[Text]:
    """One line: how long it took, and what most of it went into."""
    progress = _progress_now(scene)
    if not progress.phase:
        return []
    phases = [(end_s - begin_s, name) for name, begin_s, end_s in _phases(progress)]
    longest = sorted(phases, reverse=True)[:3]
    parts = ", ".join(f"{phase_name(name)} {took(seconds)}" for seconds, name in longest)
    expected_s = progress.expected_s
    of = "" if expected_s is None else f", expected about {span(expected_s)}"
    line = Text(f"{took(progress.elapsed_s)}{of}").append(f"; {parts}" if parts else "", FAINT)
    return labelled("Load", [line], width)


def _bars(width: int) -> int:
    """What is left for bars to the right of names and times."""
    return max(0, width - GUTTER - NAME_WIDTH - TIME_WIDTH - 1)


def _progress_now(scene: Scene) -> Progress:
    """The document is of a moment ago, and a start goes on."""
    progress = scene.status.progress
    if scene.state not in STARTING_STATES:
        return progress
    since_s = max(0.0, (scene.now - scene.status.now).total_seconds())
    return replace(progress, elapsed_s=progress.elapsed_s + since_s)


def _load_head(scene: Scene, progress: Progress, bars: int) -> Text:
    said = of_expected(progress)
    if progress.expected_s is None or scene.state not in STARTING_STATES:
        return Text(said)
    if progress.elapsed_s > progress.expected_s:
        return Text(said, "yellow")
    line = meter(progress.elapsed_s / progress.expected_s, bars)
    head = columns([(said, NAME_WIDTH + TIME_WIDTH)])
    return Text.assemble(head, (line, STATE_STYLE[State.BOUND]))


def _phases(progress: Progress) -> list[tuple[str, float, float]]:
    """Each phase with its begin and end, in seconds since the start began."""
    begins = [phase.began_s for phase in progress.phases]
    ends = [*begins[1:], max(progress.elapsed_s, *begins[-1:])] if begins else []
    names = [phase.name for phase in progress.phases]
    return list(zip(names, begins, ends, strict=True))


# --- the stop


def stop(scene: Scene, width: int, most: int) -> list[Text]:
    """What a stop has done so far, and how long it may take at most."""
    if scene.state is not State.STOPPING:
        return []
    bound_s = scene.status.stop_bound_s
    head = Text(span(scene.for_s))
    if bound_s:
        said = f"{span(scene.for_s)} of at most {span(bound_s)}"
        head = Text(columns([(said, NAME_WIDTH + TIME_WIDTH)]))
        head.append(meter(scene.for_s / bound_s, _bars(width)), STATE_STYLE[State.STOPPING])
    stages = [e for e in scene.entries if e.kind == STAGE and e.at >= scene.since]
    return labelled("Stop", [head, *(_stage(entry) for entry in stages)][-most:], width)


def _stage(entry: Entry) -> Text:
    return Text(f"  {told(entry).line}", BAD if entry.text("outcome") in BAD_OUTCOMES else "")


# --- the life so far


def stays(scene: Scene) -> list[Stay]:
    """Which state the worker was in when, since its life began."""
    transitions = scene.transitions
    begin = min([*(_began(scene)), *(t.at for t in transitions[:1]), scene.since])
    found: list[Stay] = []
    last_s = 0.0
    for entry in transitions:
        at_s = (entry.at - begin).total_seconds()
        source = as_state(entry.fields.get("source"))
        if source:
            found.append(Stay(source, last_s, at_s))
        last_s = at_s
    return [*found, Stay(scene.state, last_s, (scene.now - begin).total_seconds())]


def _began(scene: Scene) -> list[datetime]:
    """When the first start began: each phase says how long ago that was."""
    first = next((e for e in scene.entries if e.kind == PHASE), None)
    if first is None:
        return []
    return [first.at - timedelta(seconds=first.number("elapsed_s") or 0.0)]


def life(scene: Scene, width: int) -> list[Text]:
    """A strip of states from the begin of the life to now, and how much of it was READY."""
    found = stays(scene)
    total_s = found[-1].end_s
    cells = strip(found, width - GUTTER - 1)
    line = Text()
    for state in cells:
        line.append(CELLS[state], STATE_STYLE[state])
    ready_s = sum(s.end_s - s.begin_s for s in found if s.state is State.READY)
    share = f"READY {_percent(ready_s / total_s)} of " if ready_s > 0 and total_s > 0 else ""
    begin = moment(scene.now - timedelta(seconds=total_s), scene.now, scene.zone)
    left = Text.assemble((begin, FAINT), f"   {share}{span(total_s)}")
    axis = spread(left, Text("now", FAINT), width - GUTTER - 1)
    return labelled("Life", [line, axis], width)


def _percent(fraction: float) -> str:
    """Never rounded up to 100 %: a moment without service was one."""
    return "100 %" if fraction >= 1 else f"{int(fraction * 1000) / 10} %"


# --- the engine's health


def probes(scene: Scene, width: int, rows: int = 1) -> list[Text]:
    """How long the engine took to answer, the newest to the right."""
    if not scene.probes:
        return []
    lines = sparkline(scene.probes, width - GUTTER - SUMMARY_WIDTH - 2, rows)
    texts = [_spark(line) for line in lines]
    texts[-1].append(f"  {_latencies(scene.probes)}", FAINT)
    return labelled("Probe", texts, width)


def _spark(line: str) -> Text:
    text = Text(line, STATE_STYLE[State.READY])
    text.highlight_words([MISSED], BAD)
    return text


def _latencies(values: Sequence[float | None]) -> str:
    answered = [value for value in values if value is not None]
    newest = "no answer" if values[-1] is None else took(values[-1])
    if not answered:
        return newest
    median, most = statistics.median(answered), max(answered)
    return f"{newest}; median {took(median)}, most {took(most)}"


def verdicts(scene: Scene, width: int, count: int) -> list[Text]:
    """The last `count` verdicts, the newest below."""
    found = [entry for entry in scene.entries if entry.kind == VERDICT][-count:]
    return labelled("Verdicts", _dated(scene, [(e.until, e) for e in found]), width)


# --- events


def events(scene: Scene, width: int, count: int) -> list[Text]:
    """The last `count` events, the newest below; of verdicts only those that say something."""
    found = [entry for entry in scene.entries if _matters(entry)][-count:] if count > 0 else []
    return labelled("Events", _dated(scene, [(e.at, e) for e in found]), width)


def _matters(entry: Entry) -> bool:
    return entry.kind != VERDICT or entry.text("kind") not in HARMLESS


def _dated(scene: Scene, entries: Sequence[tuple[datetime, Entry]]) -> list[Text]:
    """Each with its time before it, all times equally wide."""
    times = [moment(at, scene.now, scene.zone) for at, _ in entries]
    wide = max(map(len, times), default=0) + 2
    return [
        Text.assemble((time.ljust(wide), FAINT), (told(entry).line, _style(entry)))
        for time, (_, entry) in zip(times, entries, strict=True)
    ]


def _style(entry: Entry) -> str:
    if _bad(entry):
        return "red"
    return STATE_STYLE[entry.dest] if entry.dest else ""


def _bad(entry: Entry) -> bool:
    outcome = entry.text("outcome") in BAD_OUTCOMES or entry.text("step") == "lost"
    return outcome or (entry.kind == VERDICT and entry.text("kind") not in (*HARMLESS, "asleep"))
