"""The page in a browser: a start, a hang, a recovery and a drain of a worker that lives; commands;
no JavaScript; contact lost and found. Screenshots of each stay in .cache/screenshots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from living_worker import DEADLINE_S, TOKEN, Worker
from tools import CACHE, chromium
from waiting import until

from ichat_lifecycle.ports import Fault
from ichat_lifecycle.states import State

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

SCREENSHOTS = CACHE / "screenshots"
# Colour scheme, width and height of each.
LOOKS: dict[str, tuple[Any, int, int]] = {
    "light": ("light", 1280, 900),
    "dark": ("dark", 1280, 900),
    "phone": ("light", 390, 844),
    "wall": ("dark", 1920, 1080),
}
# Remembers the page's clock and its stream of events. To clear whatever has a number would also
# clear the time-out by which a running page shows what it has just heard, and it waits for that.
WATCHED = """
  const every = window.setInterval;
  window.clocks = [];
  window.setInterval = (...given) => {
    const id = every(...given);
    window.clocks.push(id);
    return id;
  };
  window.EventSource = class extends window.EventSource {
    constructor(...given) {
      super(...given);
      window.stream = this;
    }
  };
"""
FITS = """() => {
  const boxes = [...document.querySelectorAll(".tick")].map(tick => tick.getBoundingClientRect());
  const shown = boxes.filter(box => box.width).sort((one, other) => one.left - other.left);
  const apart = shown.every((box, n) => n === 0 || shown[n - 1].right < box.left);
  return apart && document.documentElement.scrollWidth <= innerWidth;
}"""
HINT = "lower --gpu-memory-utilization or --max-model-len, and look at dmesg; " * 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of this module only: while Playwright runs, its own event loop runs in this thread."""
    path = chromium()
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()
    assert asyncio._get_running_loop() is None


class Screen:
    """A page in a window of its own, and what its console says."""

    def __init__(self, browser: Any, worker: Worker, look: str = "light", **options: Any) -> None:
        scheme, width, height = LOOKS[look]
        self.look = look
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, **options
        )
        self.context.set_default_timeout(DEADLINE_S * 1000)
        self.context.add_init_script(WATCHED)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(worker.url)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def shows(self, selector: str, text: str) -> None:
        """Waits until that is so."""
        self.page.locator(selector, has_text=text).first.wait_for()

    def hold_clock(self) -> None:
        """Only the stream of events brings anything new from here on."""
        self.page.wait_for_function("window.stream.readyState === EventSource.OPEN")
        self.page.evaluate("for (const id of window.clocks) clearInterval(id)")

    def photograph(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}-{self.look}.png"
        self.page.screenshot(path=path, full_page=self.look != "wall")

    def fits(self) -> bool:
        """Whether nothing makes the page wider than the window, nor covers another time of day."""
        return bool(self.page.evaluate(FITS))


@pytest.fixture
def screens(browser: Any) -> Iterator[list[Screen]]:
    """Those that a test opens, and at its end none has had a complaint."""
    opened: list[Screen] = []
    yield opened
    assert [complaint for screen in opened for complaint in screen.complaints] == []


@pytest.fixture
def show(browser: Any, screens: list[Screen]) -> Any:
    def show(worker: Worker, look: str = "light", **options: Any) -> Screen:
        screens.append(Screen(browser, worker, look, **options))
        # Before the worker is gone: contact that is lost is a complaint.
        worker.leaving.callback(screens[-1].context.close)
        return screens[-1]

    return show


def ready(worker: Worker) -> None:
    until(lambda: worker.lifecycle.snapshot.ready, "READY")


def die(worker: Worker) -> None:
    cause = "torch.OutOfMemoryError: CUDA out of memory"
    fault = Fault("engine_died", "the engine ended", cause, HINT, "memory")
    worker.do(lambda: worker.lifecycle.post_fault(fault))


def test_a_life_is_seen_from_its_start_to_its_drain(show: Any) -> None:
    """Each step happens only once all screens have shown the one before."""
    held = ("engine.start", "evidence.save", "server.drained")
    with Worker(*held, model="qwen3-32b-instruct", expected_s=30.0) as worker:
        screens = [show(worker, look) for look in LOOKS]

        def all_show(name: str, *texts: tuple[str, str]) -> None:
            for screen in screens:
                for selector, text in texts:
                    screen.shows(selector, text)
                assert screen.fits(), (name, screen.look)
                screen.photograph(name)

        worker.phase("loading_weights", 0.62)
        all_show("loading", ("h1", "BOUND"), (".phases .now", "62 %"), (".start", "expected: 30 s"))

        worker.let("engine.start")
        all_show("ready", ("h1", "READY"), (".happened", "answered in"))

        worker.world.in_flight = 3
        worker.do(lambda: worker.world.move(frozen=True))
        all_show("hung", ("h1", "DEGRADED"), (".trouble", "no answer"), (".happened .bad", "hung"))
        assert screens[0].page.locator(".probes .missed").count() > 0

        worker.do(lambda: worker.world.move(frozen=False))
        all_show("recovered", ("h1", "READY"), (".happened", "by recover"))
        assert screens[0].page.locator(".trouble").count() == 0

        die(worker)
        all_show("degraded", ("h1", "DEGRADED"), (".trouble", HINT.strip()), (".head", "takes no"))

        worker.let("evidence.save")
        until(lambda: worker.lifecycle.snapshot.restarts == 1, "the restart")
        ready(worker)
        all_show("restarted", ("h1", "READY"), (".facts", "2 of 3 left"), (".trouble", "/evidence"))

        worker.lifecycle.ask_to_stop("SIGTERM")
        all_show("stopping", ("h1", "STOPPING"), (".stopping", "asked for by SIGTERM"))


def test_what_is_open_focused_or_scrolled_stays_so(show: Any) -> None:
    with Worker() as worker:
        ready(worker)
        page = show(worker, "phone").page
        page.locator("summary").click()
        page.locator(".scroll").focus()
        page.evaluate("scrollTo(0, 500); document.querySelector('.scroll').scrollLeft = 40")
        before = page.locator(".as-of").inner_text()
        page.wait_for_function(
            "old => document.querySelector('.as-of').innerText !== old", arg=before
        )
        assert page.locator("#arguments").get_attribute("open") is not None
        assert page.evaluate("document.activeElement.className") == "scroll"
        assert page.evaluate("[scrollY, document.querySelector('.scroll').scrollLeft]") == [500, 40]


def test_the_time_line_is_zoomed_without_a_new_page(show: Any) -> None:
    with Worker() as worker:
        page = show(worker).page
        page.locator("#token").fill("typed")
        page.get_by_role("link", name="hour").click()
        page.locator('a[aria-current][href="?window=3600"]').wait_for()
        assert page.url.endswith("?window=3600")
        assert page.locator("#token").input_value() == "typed"
        page.reload()
        page.locator('a[aria-current][href="?window=3600"]').wait_for()
        assert page.locator("#token").input_value() == "", "it was in memory only"


def test_an_event_is_shown_sooner_than_the_next_second(show: Any) -> None:
    with Worker("engine.start") as worker:
        screen = show(worker)
        screen.shows("h1", "BOUND")
        screen.hold_clock()
        worker.phase("compiling")
        screen.shows(".phases .now", "compiling")


def test_a_stream_that_was_refused_is_asked_for_again(browser: Any) -> None:
    """A browser does that by itself after a broken connection, but not after an error's answer."""
    with Worker() as worker:
        screen = Screen(browser, worker)
        stream = "**/lifecycle/events?*"
        screen.page.route(stream, lambda route: route.fulfill(status=502))
        with screen.page.expect_response(lambda answer: answer.status == 502):
            screen.page.reload()
        screen.page.unroute(stream)
        with screen.page.expect_response(
            lambda answer: "/lifecycle/events" in answer.url and answer.status == 200
        ):
            pass
        screen.context.close()


def test_without_javascript_all_is_there(show: Any) -> None:
    with Worker() as worker:
        ready(worker)
        screen = show(worker, java_script_enabled=False)
        screen.shows("h1", "READY")
        screen.shows(".diagram", "DEGRADED")
        screen.page.locator("#controls noscript p").wait_for()  # seen, and not only there
        assert screen.page.locator("meta[http-equiv=refresh]").count() == 1
        assert screen.page.locator("[data-command]:enabled").count() == 0
        screen.page.get_by_role("link", name="last minute").click()
        screen.page.locator('a[aria-current][href="?window=60"]').wait_for()
        screen.photograph("no-javascript")


def command(screen: Screen, name: str, *, yes: bool = True) -> None:
    """By the keyboard only."""
    page = screen.page
    page.get_by_role("button", name=name, exact=True).press("Enter")
    page.locator("dialog[open]").wait_for()
    page.locator("#yes" if yes else "#no").press("Enter")


def test_a_command_needs_a_token_and_a_confirmation_and_arrives(show: Any) -> None:
    with Worker() as worker:
        ready(worker)
        screen = show(worker)
        page = screen.page
        screen.shows("h1", "READY")
        assert page.locator("[data-command]:enabled").count() == 0
        page.locator("#token").fill(TOKEN)
        assert page.locator("[data-command]:enabled").count() == 5
        command(screen, "Sleep", yes=False)
        assert not worker.world.asleep
        command(screen, "Sleep")
        screen.shows("#answer.well", "Sleep: 200, the worker is DEGRADED")
        assert page.evaluate("document.activeElement.dataset.command") == "sleep"
        assert worker.world.asleep
        screen.shows(".note", "The engine sleeps.")
        screen.photograph("asleep")
        command(screen, "Wake")
        screen.shows("#answer.well", "Wake: 200")
        screen.shows("h1", "READY")
        command(screen, "Restart engine")
        screen.shows("#answer.well", "Restart engine: 202")
        assert worker.lifecycle.snapshot.restarts == 1


@pytest.mark.parametrize("name", ["Stop", "Stop now"])
def test_a_worker_is_stopped_from_the_page(browser: Any, name: str) -> None:
    with Worker("server.drained") as worker:
        ready(worker)
        worker.world.in_flight = 1
        screen = Screen(browser, worker)
        screen.page.locator("#token").fill(TOKEN)
        command(screen, name)
        until(lambda: worker.lifecycle.snapshot.stop_asked, "the stop")
        if name == "Stop":
            screen.shows("#answer.well", "Stop: 202")
            screen.shows("h1", "STOPPING")
            assert screen.page.locator("[data-command]:enabled").all_inner_texts() == ["Stop now"]
            assert worker.lifecycle.snapshot.state is State.STOPPING
            command(screen, "Stop now")
        # Nobody lets the drain end: only a stop without one gets there.
        until(lambda: "engine.release_now" in worker.world.calls, "the end")
        screen.context.close()


def test_a_wrong_token_is_told_as_such(browser: Any) -> None:
    with Worker() as worker:
        ready(worker)
        screen = Screen(browser, worker)
        screen.page.locator("#token").fill("wrong")
        command(screen, "Stop")
        screen.shows("#answer.bad", "Stop: 401 unauthorized: the control token is wrong")
        screen.photograph("wrong-token")
        assert not worker.lifecycle.snapshot.stop_asked
        screen.context.close()
        # The browser itself complains of the 401, and of nothing else.
        assert [c for c in screen.complaints if "401" not in c] == []


def test_without_a_token_of_the_worker_the_page_says_so(show: Any) -> None:
    with Worker(token=None) as worker:
        screen = show(worker)
        screen.shows("#controls", "takes no commands")
        assert screen.page.locator("button, input").count() == 0


def test_contact_that_is_lost_is_told_and_found_again_with_another_worker(browser: Any) -> None:
    with Worker(model="first") as worker:
        ready(worker)
        port = worker.plane.address[1]
        screen = Screen(browser, worker)
        screen.shows(".model", "first")
        screen.page.locator("#token").fill(TOKEN)
    screen.shows("#contact", "No contact with the worker since")
    assert "lost" in str(screen.page.locator("body").get_attribute("class"))
    assert screen.page.title().startswith("no contact · ")
    assert screen.page.locator("[data-command]:enabled").count() == 0
    screen.photograph("lost")
    with Worker("engine.start", port=port, model="second") as worker:
        screen.shows(".model", "second")
        screen.page.locator("#contact").wait_for(state="hidden")
        assert screen.page.locator("body.lost").count() == 0
        assert screen.page.locator("#token").input_value() == TOKEN, "the page was not loaded anew"
        worker.phase("compiling")
        screen.shows(".phases .now", "compiling")
        screen.hold_clock()
        worker.phase("capturing_graphs")
        screen.shows(".phases .now", "capturing graphs")  # the events of the second are heard
        screen.context.close()
    assert [c for c in screen.complaints if "ERR_" not in c] == []


def test_a_worker_of_another_build_has_the_page_loaded_anew(browser: Any) -> None:
    with Worker() as worker:
        port = worker.plane.address[1]
        screen = Screen(browser, worker)
        screen.page.locator("#token").fill(TOKEN)
    with Worker(port=port, token=None):
        screen.shows("#controls", "takes no commands")
        screen.context.close()


def test_hostile_names_stay_text(show: Any) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>"
    with Worker(model=hostile, arguments={hostile: hostile}) as worker:
        screen = show(worker)
        screen.shows(".model", hostile)
        screen.page.wait_for_function("document.title.includes('onerror')")
        assert screen.page.locator("main img, main script").count() == 0


def test_screenshots_stay_out_of_the_repository() -> None:
    ignored = (Path(__file__).parent.parent / ".gitignore").read_text(encoding="utf-8")
    assert "/.cache/" in ignored.splitlines()
    assert SCREENSHOTS.parent.name == ".cache"
