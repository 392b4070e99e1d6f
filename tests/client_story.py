"""Lives to show: written down by the real recorder, told by the real documents, as JSON."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from typing import Any, Self

from stand_ins import NOON, FakeIdentity
from structlog.testing import capture_logs

from ichat_lifecycle.client.documents import Entry, parse_entry, parse_status
from ichat_lifecycle.client.logbook import Logbook, Scene
from ichat_lifecycle.config import Settings
from ichat_lifecycle.control.loop_watch import LoopHealth
from ichat_lifecycle.control.view import history_document, lifecycle_document
from ichat_lifecycle.journal import Journal, Reason, Snapshot, StageOutcome
from ichat_lifecycle.ports import Signs, Verdict, VerdictKind
from ichat_lifecycle.recorder import Recorder
from ichat_lifecycle.states import Trigger, row_for

URL = "http://127.0.0.1:18000"
PHASES = (
    ("importing", 9.8),
    ("configuring", 1.1),
    ("starting_engine", 5.2),
    ("loading_weights", 4.4),
    ("compiling", 2.9),
    ("allocating_kv_cache", 0.4),
)


class Story:
    """A life that is made up, event by event. It is what the control plane asks for as well.

    Args:
        began: when it began; time passes by after() only.
    """

    def __init__(self, began: datetime = NOON, **identity: Any) -> None:
        self.settings = Settings()
        self.restarts_left = 3
        self.identity = FakeIdentity(**{"pid": 4242, "control_url": URL, **identity})
        self._began = began
        self._passed_s = 0.0
        self.recorder = Recorder(self, asyncio.Event())
        self.recorder.begin(self.monotonic())

    # --- as a Clock and as a Life

    def now(self) -> datetime:
        return self._began + timedelta(seconds=self._passed_s)

    def monotonic(self) -> float:
        return self._passed_s

    @property
    def snapshot(self) -> Snapshot:
        return self.recorder.snapshot

    @property
    def journal(self) -> Journal:
        return self.recorder.journal

    # --- what happens

    def after(self, seconds: float) -> Self:
        self._passed_s += seconds
        return self

    def phase(self, name: str, fraction: float | None = None) -> Self:
        self.recorder.phase(name, fraction, self.monotonic())
        return self

    def fire(
        self,
        trigger: Trigger,
        reason: Reason | None = None,
        cause: str | None = None,
        took_s: float = 0.0004,
    ) -> Self:
        source = self.snapshot.state
        row = row_for(source, trigger)
        assert row is not None, f"{trigger} from {source}"
        with capture_logs():
            self.recorder.entered(
                trigger,
                source,
                row.dest,
                mono_s=self.monotonic(),
                took_s=took_s,
                reason=reason,
                cause=cause,
            )
        return self

    def stage(self, name: str, took_s: float, **more: Any) -> Self:
        with capture_logs():
            self.recorder.stage(name, more.pop("outcome", StageOutcome.DONE), took_s, **more)
        return self

    def recovery(self, step: str, left: int, **more: Any) -> Self:
        with capture_logs():
            self.recorder.recovery(step, left, **more)
        return self

    def verdict(self, kind: VerdictKind, answered_s: float | None = None, **signs: Any) -> Self:
        with capture_logs():
            self.recorder.judged(Verdict(kind, Signs(answered_s=answered_s, **signs)))
        return self

    def idle(self, *answered_s: float, every_s: float = 5.0) -> Self:
        for seconds in answered_s:
            self.after(every_s).verdict(VerdictKind.IDLE, seconds)
        return self

    # --- lives

    def loading(self, phases: int = len(PHASES), expected_s: float | None = None) -> Self:
        """As far as so many phases have begun; the last one has just begun."""
        if expected_s is not None:
            self.recorder.expect(expected_s, 3)
        pause_s = 0.2
        for number, (phase, lasts_s) in enumerate(PHASES[:phases]):
            self.after(pause_s).phase(phase)
            pause_s = lasts_s
            if number == 0:
                self.after(lasts_s).fire(Trigger.BIND, took_s=lasts_s)
                pause_s = 0.1
        return self

    def serving(self, expected_s: float | None = None) -> Self:
        self.loading(expected_s=expected_s).after(0.6).fire(Trigger.START_ENGINE, took_s=14.6)
        self.phase("building_app").after(0.9).fire(Trigger.SERVE, took_s=0.9)
        self.phase("waiting_for_health").after(0.1)
        return self.phase("warm_up").after(0.7).fire(Trigger.BECOME_READY, took_s=0.8)

    # --- how it is told

    def document(self, loop: LoopHealth | None = None) -> dict[str, Any]:
        document = lifecycle_document(self, self.identity, loop or LoopHealth())
        return _as_json(document)

    def history(self) -> dict[str, Any]:
        return _as_json(history_document(self))

    def entries(self) -> list[Entry]:
        written = (_as_json(entry.as_dict()) for entry in self.journal.since(0))
        return [parse_entry(entry["event"], entry, self.identity.start_id) for entry in written]

    def book(self, url: str = URL) -> Logbook:
        """What somebody knows who has read all of it; his clock stands still."""
        book = Logbook(url, parse_status(self.document()), lambda: 0.0)
        for entry in self.entries():
            book.take(entry)
        return book

    def scene(self, url: str = URL) -> Scene:
        return self.book(url).scene()


def _as_json(document: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(document))
    return read


def hung(story: Story) -> Story:
    """READY for an hour, then silent, with a reason of many words."""
    story.serving(30.0).idle(*[0.0018, 0.0021, 0.0017, 0.0019] * 10)
    story.after(3600).verdict(VerdictKind.HUNG, silent_s=10.0, in_flight=4)
    reason = Reason(
        "engine_hung",
        "the engine hangs: no answer from the engine for 10 s",
        "RPC call to execute_model timed out: VLLM::Worker_TP0 (pid 31337) waits in "
        "torch.distributed.all_reduce for a peer that has not answered since the last collective",
        "its processes are alive but stuck; look at the stacks in the evidence bundle, and at "
        "dmesg for errors of the interconnect (NVLink, InfiniBand) before you start it again",
    )
    story.after(0.001).fire(Trigger.DEGRADE, reason, reason.message)
    evidence = (
        "/var/lib/ichat/state/ichat-lifecycle/evidence/2026-01-02T13-04-01Z-4242-engine_hung-3f9a"
    )
    story.recorder.publish(evidence=evidence)
    story.after(0.001).recovery("lost", 2, error=RuntimeError(reason.message))
    story.recovery("backoff", 2, delay_s=3.4)
    return story.after(2)


def stopping(story: Story) -> Story:
    story.serving(30.0).idle(0.0018, 0.0021).after(120)
    story.fire(Trigger.STOP, cause="SIGTERM").after(4.2)
    story.stage("drain", 4.2, ended=3).stage("release watchdog", 0.0004)
    return story.after(1.5).stage("release app", 0.05).after(0.3)
