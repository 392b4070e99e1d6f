"""Arguments by vLLM's own parser, behind the `Arguments` port."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ichat_lifecycle import causes, environment
from ichat_lifecycle.adapters import vllm_environment, vllm_memory
from ichat_lifecycle.adapters.chat_template import syntax_error
from ichat_lifecycle.adapters.fresh_arguments import fresh, generated_ids, has_ids
from ichat_lifecycle.adapters.logging_choice import LoggingChoice, configure, of_variables
from ichat_lifecycle.adapters.threads import considerate, in_thread
from ichat_lifecycle.adapters.vllm_layout import Layout, load
from ichat_lifecycle.arguments import ParsedArguments, parse
from ichat_lifecycle.credentials import API_KEY_FLAG, HUB_TOKEN_FLAG, header_value
from ichat_lifecycle.errors import ArgumentsError, LifecycleError
from ichat_lifecycle.gpus import gpus_needed
from ichat_lifecycle.input_file import kind_instead
from ichat_lifecycle.ports import PhaseReport
from ichat_lifecycle.refusals import refuse_variables


class _StopAsked(Exception):
    """Ends the import between two steps."""


class VllmArguments:
    """iChat's arguments in, vLLM's validated namespace out. Importing vLLM takes seconds.

    Attributes:
        layout: vLLM's functions; None until parsed.
        logging: what the user has said about vLLM's loggers, as far as that is known.
        parsed: the outcome; None until parsed.
    """

    def __init__(
        self,
        framework: argparse.Namespace,
        backend_argv: list[str],
        on_logging: Callable[[LoggingChoice], None] = lambda choice: None,
        also_known: Sequence[str] = (),
    ) -> None:
        self._also_known = also_known
        self._framework = framework
        self._argv = backend_argv
        self._on_logging = on_logging
        self.logging = of_variables(os.environ)
        self._stop = threading.Event()
        self.layout: Layout | None = None
        self.parsed: ParsedArguments | None = None
        self._generated: frozenset[str] = frozenset()

    def for_engine(self) -> argparse.Namespace:
        """A copy of the namespace for one engine and its app, with generated ids made anew."""
        assert self.parsed is not None, "arguments are validated before BOUND"
        return fresh(self.parsed.vllm, self._generated)

    async def validate(self, on_phase: PhaseReport) -> None:
        """Parses off the loop, unless `validate_now` has been called already."""
        if self.parsed is not None:
            return
        on_phase("importing", None)
        try:
            with considerate():
                await in_thread(self.validate_now, "arguments")
        finally:
            self._stop.set()

    def validate_now(self) -> None:
        """Parses in the caller's thread, and looks whether this machine has the memory now.

        Raises:
            ArgumentsError: a flag is unknown, in conflict or has a bad value.
            LimitError: there is not enough memory.
            StartError: vLLM is missing or not supported.
        """
        parsed = self.parse_now()
        assert self.layout is not None
        if self.layout.platform.is_cpu():
            vllm_memory.check(
                parsed.vllm.gpu_memory_utilization,
                getattr(parsed.vllm, "kv_cache_memory_bytes", None),
                os.environ,
            )
        self.parsed = parsed

    def parse_now(self) -> ParsedArguments:
        """What does not depend on the moment: also for an engine that is not to start now.

        Raises:
            ArgumentsError: a flag is unknown, in conflict or has a bad value.
            StartError: vLLM is missing or not supported.
        """
        refuse_variables(os.environ)
        vllm_environment.check(os.environ)
        try:
            self.layout = load(self._checkpoint)
        except (LifecycleError, _StopAsked):
            raise
        except Exception as error:
            raise import_error(error) from error
        self._on_logging(self.logging)
        parser = self.layout.make_arg_parser(self.layout.argument_parser())
        parsed = parse(self._framework, self._argv, parser, self._also_known)
        self.logging = configure(parsed.vllm, self.layout.configure_logging_from_args)
        self._on_logging(self.logging)
        if has_ids(parsed.vllm):
            again = parse(self._framework, self._argv, parser, self._also_known)
            self._generated = generated_ids(parsed.vllm, again.vllm)
        _strip_keys(parsed.vllm)
        self._validate_with_vllm(parsed.vllm)
        self._compare_gpus(parsed)
        return parsed

    def _checkpoint(self, step: str) -> None:
        if self._stop.is_set():
            raise _StopAsked(step)

    def _validate_with_vllm(self, namespace: argparse.Namespace) -> None:
        assert self.layout is not None
        try:
            _import_parser_plugins(namespace)
            self.layout.validate_serve_args(namespace)
            self.layout.validate_api_args(namespace)
            self._check_chat_template(namespace)
        except LifecycleError:
            raise
        except Exception as error:
            text = str(error) or repr(error)
            raise ArgumentsError(text.removeprefix("Error: ")) from error

    def _check_chat_template(self, namespace: argparse.Namespace) -> None:
        """Before the load, which would succeed, and every chat be refused."""
        given = getattr(namespace, "chat_template", None)
        assert self.layout is not None
        if not given or self.layout.load_chat_template is None:
            return
        shown = "(given as text)" if set(given) & set("{}\n") else given
        # vLLM reads it once more, and would wait for somebody who writes.
        if (kind := kind_instead(given)) is not None:
            raise ArgumentsError(f"--chat-template {shown}: {kind}, not a file")
        try:
            wrong = syntax_error(self.layout.load_chat_template(given))
        except (OSError, ValueError) as error:  # a directory, or what is no text
            raise ArgumentsError(f"--chat-template {shown}: {error}") from error
        if wrong is not None:
            raise ArgumentsError(
                f"--chat-template {shown}: {wrong}", hint="correct the Jinja template"
            )

    def _compare_gpus(self, parsed: ParsedArguments) -> None:
        """CPU workers need none, and iChat names some to them, too."""
        assert self.layout is not None
        ids = parsed.gpu_ids
        if not ids or self.layout.platform.is_cpu():
            return
        found = gpus_needed(lambda name: getattr(parsed.vllm, name, None))
        if found is not None and found[0] > len(ids):
            raise ArgumentsError(
                f"--gpu-ids names {len(ids)} of the {found[0]} GPUs that are needed",
                hint=f"{found[1]} needs {found[0]}: name as many, or lower the sizes",
            )


def import_error(error: Exception) -> LifecycleError:
    """What ended the import of vLLM or of a library of its own."""
    text = f"{type(error).__name__}: {error}"
    name = environment.blamed(text, os.environ) if isinstance(error, ValueError) else None
    if name is not None:
        return ArgumentsError(
            f"{name}: a library of vLLM's cannot read it",
            root_cause=text,
            code="bad_variable",
            hint="correct the variable, or unset it",
        )
    return causes.start_error(error, ())


def _strip_keys(namespace: argparse.Namespace) -> None:
    """Those of a `--config` file, too; vLLM's own middleware compares with what is left here."""
    given: list[str] | None = getattr(namespace, "api_key", None)
    if given:
        namespace.api_key = [header_value(API_KEY_FLAG, str(key)) for key in given]
        if namespace.api_key != given:
            environment.stripped(API_KEY_FLAG)()
    token = getattr(namespace, "hf_token", None)
    if isinstance(token, str):  # True: the one that is kept in the user's home
        namespace.hf_token = header_value(HUB_TOKEN_FLAG, token)


def _import_parser_plugins(namespace: argparse.Namespace) -> None:
    """As vLLM's `setup_server` does before it validates: plugins register parsers by name."""
    tool: Any = getattr(namespace, "tool_parser_plugin", None)
    reasoning: Any = getattr(namespace, "reasoning_parser_plugin", None)
    if tool:
        from vllm.tool_parsers import ToolParserManager

        ToolParserManager.import_tool_parser(tool)
    if reasoning:
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(reasoning)
