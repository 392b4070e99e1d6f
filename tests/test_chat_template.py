"""A chat template that cannot render is reported at the start, not by the first client's 400."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from lifecycle_lives import live, nothing, stop_when_ready, until

from ichat_lifecycle.adapters.chat_template import syntax_error
from ichat_lifecycle.adapters.questions import broken_chat, error_message
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.errors import ArgumentsError, ExitCode
from ichat_lifecycle.lifecycle import Lifecycle
from ichat_lifecycle.ports import Fault, Notice
from ichat_lifecycle.states import State
from ichat_lifecycle.testing.fakes import FakeWorld
from ichat_lifecycle.testing.plan import Outcome

BROKEN = "{% for m in messages %}\n{{ m.content }}"


@pytest.mark.parametrize(
    ("template", "line"), [(BROKEN, 2), ("{{ a", 1), ("{{ a b }}", 1), ("\n{% if %}x", 2)]
)
def test_a_mistake_in_the_syntax_is_found_with_its_line(template: str, line: int) -> None:
    assert (syntax_error(template) or "").startswith(f"line {line}: ")


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{% if m.x %}{% continue %}{% endif %}{% endfor %}",
        "{% generation %}{{ x }}{% endgeneration %}",  # transformers' own tag
        "{{ messages | tojson(indent=2) }}",
    ],
)
def test_what_others_extend_jinja_with_is_no_mistake(template: str) -> None:
    assert syntax_error(template) is None


def _check(given: str, text: str = "") -> None:
    """`text` is what the file holds; by default it is read."""
    arguments = VllmArguments(argparse.Namespace(), [])
    read = (lambda _: text) if text else (lambda path: Path(path).read_text(encoding="utf-8"))
    arguments.layout = Layout("0", {"load_chat_template": read})
    arguments._check_chat_template(argparse.Namespace(chat_template=given))


def test_a_file_that_is_no_text_is_bad_arguments_and_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, why in ((binary, "can't decode"), (tmp_path, "a directory, not a file")):
        with pytest.raises(ArgumentsError, match=why) as caught:
            _check(str(path))
        assert caught.value.message.startswith(f"--chat-template {path}: ")


@pytest.mark.parametrize(
    ("given", "shown"), [("my.jinja", "my.jinja"), (BROKEN, "(given as text)")]
)
def test_a_template_that_was_given_and_cannot_be_compiled_is_bad_arguments(
    given: str, shown: str
) -> None:
    with pytest.raises(ArgumentsError, match="line 2: ") as caught:
        _check(given, BROKEN)
    assert caught.value.exit_code == ExitCode.BAD_ARGUMENTS
    assert caught.value.message.startswith(f"--chat-template {shown}: ")
    _check(given, "{{ messages }}")


def _openai(message: str) -> str:
    return json.dumps({"error": {"message": message, "code": 400}})


NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
    "chat template if the tokenizer does not define one."
)


@pytest.mark.parametrize(
    ("status", "text", "cause"),
    [
        (200, "{}", None),
        (400, _openai("no chats here"), "no chats here"),
        (500, "", "vLLM answers 500"),
        (400, "not JSON", "not JSON"),
        (400, _openai(NO_TEMPLATE), None),
        (404, "Not Found", None),
        (501, _openai("not for this model"), None),
    ],
)
def test_what_vllm_answers_to_a_chat_that_is_to_be_rendered(
    status: int, text: str, cause: str | None
) -> None:
    """A model without any template completes texts, which is no mistake of anybody's."""
    assert broken_chat(status, text) == cause


@pytest.mark.parametrize(
    ("text", "message"), [('{"error": "Unauthorized"}', "Unauthorized"), ("[]", "[]")]
)
def test_the_message_of_an_error_in_whatever_form(text: str, message: str) -> None:
    assert error_message(text) == message
    assert len(error_message("x" * 10_000)) == 500


# --- what an inspection finds

NOTICE = Notice("chat_template_broken", "no chats", "line 1", "mend it")
OTHER = Notice("another", "something else")


def test_what_is_found_is_logged_and_shown_and_keeps_nobody_from_being_ready() -> None:
    seen: list[Any] = []

    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        world.notices = (NOTICE,)
        await until(lifecycle, State.READY)
        lifecycle.warn(OTHER)
        lifecycle.warn(OTHER)
        seen.append(lifecycle.snapshot.warnings)
        world.notices = ()  # the next engine's is mended
        lifecycle.post_fault(Fault("engine_died", "it ended"))
        await until(lifecycle, State.READY, restarts=1)
        seen.append(lifecycle.snapshot.warnings)
        lifecycle.ask_to_stop("test")

    with structlog.testing.capture_logs() as logs:
        live(script)
    assert seen == [(NOTICE, OTHER), (OTHER,)]
    lines = [entry for entry in logs if entry["event"] == "worker_warning"]
    assert [(line["code"], line["log_level"]) for line in lines] == [
        (NOTICE.code, "warning"),
        (OTHER.code, "warning"),
    ]


def test_an_inspection_that_fails_is_logged_and_harms_nobody() -> None:
    with structlog.testing.capture_logs() as logs:
        life = live(stop_when_ready, probe_inspect=Outcome(0, OSError("no")))
    assert life.error is None
    assert [entry for entry in logs if entry["event"] == "inspection_failed"]


def test_an_inspection_that_hangs_ends_at_the_deadline_of_readiness() -> None:
    life = live(nothing, probe_inspect=Outcome(hang=True))
    assert "proving readiness" in str(life.error)


def test_warnings_are_bounded() -> None:
    async def script(world: FakeWorld, lifecycle: Lifecycle) -> None:
        await until(lifecycle, State.READY)
        for number in range(100):
            lifecycle.warn(Notice(f"n{number}", "one more"))
        lifecycle.ask_to_stop("test")

    life = live(script)
    assert [n.code for n in life.lifecycle.snapshot.warnings] == [f"n{n}" for n in range(80, 100)]


@pytest.mark.parametrize("template", ["{{ " + "(" * 20_000, "{% if x %}" * 3_000])
def test_a_template_too_deep_for_the_parser_is_a_clear_error(template: str) -> None:
    assert syntax_error(template) == "too many expressions or blocks within each other"
