"""Questions of the worker to itself: `/health`, the warm-up, the canary, the watchdog's token.

Each goes to vLLM's app within the process, below the middleware of the outside (see inner_app): it
shows whether the engine works, which does not depend on who is let in. `health` alone also looks
at the main port from outside (see front_door), because READY promises that clients can connect.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import structlog

from ichat_lifecycle.adapters.front_door import knock
from ichat_lifecycle.adapters.inner_app import inner_client
from ichat_lifecycle.adapters.questions import (
    CAUSE_LIMIT,
    broken_chat,
    chat_to_render,
    error_message,
    essence,
    request_for,
    shows_work,
)
from ichat_lifecycle.adapters.refusal import App
from ichat_lifecycle.config import WarmUp
from ichat_lifecycle.errors import StartError
from ichat_lifecycle.ports import Address, HealthCheck, Notice

log = structlog.get_logger("ichat_lifecycle.probe")

# vLLM's: which rank is to generate, counted among those of this process. With a load balancer
# before several hosts (--data-parallel-hybrid-lb) these do not begin with rank 0.
RANK_HEADER = "X-data-parallel-rank"
GENERATE = "generate"  # vLLM's name of the task
NO_HEADERS: Mapping[str, str] = {}
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask and how.

    Attributes:
        app: vLLM's app below its middleware; None while there is none.
        state: what the app's start-up has left for its requests.
        address: where the main port listens, for a look from outside.
        tokenizer: whether the engine has one; else prompts are given as token ids.
        tasks: those that vLLM's API serves.
        ranks: the numbers of the engine's data-parallel ranks, in the order of vLLM's client.
        check_workers: has each process of a rank answer, for an engine that refuses the request for
            a token; raises where one cannot.
    """

    app: App | None
    address: Address
    model: str
    tasks: Sequence[str]
    tokenizer: bool = True
    state: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[int] = (0,)
    check_workers: Callable[[int], Awaitable[None]] | None = None


class _Refused(StartError):
    """A question was answered, and the answer shows no output of the engine."""

    default_code = "warm_up_failed"


class SelfProbe:
    """The `Probe` port. Its first warm-up's output is the canary's expected answer.

    Args:
        target: asked before each question: the address is known after the bind, the app later.
    """

    def __init__(self, target: Callable[[], Target], warm_up: WarmUp) -> None:
        self._target = target
        self._warm_up = warm_up
        self._refused = ""  # why the last token was; logged once
        self.expected: Any = None

    async def health(self) -> HealthCheck:
        """Whether `/health` answers 200, and the main port answers at all."""
        target = self._target()
        if target.app is None:
            return HealthCheck("no app is attached")
        try:
            async with inner_client(target.app, target.state, HEALTH_TIMEOUT_S) as client:
                response = await client.get("/health")
        except TimeoutError:
            return HealthCheck(f"/health got no answer within {HEALTH_TIMEOUT_S:g} s")
        except Exception as error:
            return HealthCheck(f"/health failed: {error!r}")
        if response.status_code != httpx.codes.OK:
            return HealthCheck(f"/health got {_told(response)}")
        return HealthCheck(await knock(target.address))

    async def inspect(self) -> tuple[Notice, ...]:
        """Whether a chat of one user message can be rendered: else every chat is refused.

        Raises:
            StartError: vLLM did not answer.
        """
        target = self._target()
        if "generate" not in target.tasks or not target.tokenizer:
            return ()
        response = await _post(target, *chat_to_render(target.model))
        cause = broken_chat(response.status_code, response.text)
        if cause is None:
            return ()
        hint = "correct the file of --chat-template, or the model's own chat template"
        message = "a chat of one user message cannot be rendered: clients' chats are refused"
        return (Notice("chat_template_broken", message, cause, hint),)

    async def warm_up(self) -> None:
        """One greedy request, by whatever API this model has.

        Raises:
            StartError: the answer was not 200, or shows no output.
        """
        answer = await self._ask()
        if self.expected is None:
            self.expected = answer

    async def request(self, path: str, body: Mapping[str, Any]) -> None:
        """One request of the operator's.

        Raises:
            StartError: the answer was not 200.
        """
        target = self._target()
        response = await _post(target, path, {"model": target.model, **body})
        if response.status_code != httpx.codes.OK:
            raise _Refused(
                f"{path} answers {response.status_code}", root_cause=error_message(response.text)
            )

    async def canary(self) -> None:
        """One greedy request; an answer that differs is logged, not judged: batches change bits.

        Raises:
            StartError: the answer was not 200, or shows no output.
        """
        answer = await self._ask()
        if self.expected is not None and answer != self.expected:
            log.warning("canary_differs", expected=str(self.expected), got=str(answer))

    async def token(self, rank: int = 0) -> None:
        """Has a rank of the engine generate one token, or else has each of its processes answer.

        A refusal by the API proves nothing of the engine. Which request a model takes is up to its
        flags and plugins, so where this one is refused the processes are asked below the API; also
        where a rank cannot be chosen: vLLM routes other requests than those that generate by load.

        Raises:
            StartError: there was an error instead. It shows neither a hang nor a working engine.
        """
        target = self._target()
        several = len(target.ranks) > 1
        if several and GENERATE not in target.tasks and target.check_workers is not None:
            await target.check_workers(rank)
            return
        one_token = self._warm_up.model_copy(update={"max_tokens": 1})
        headers = {RANK_HEADER: str(target.ranks.index(rank))} if several else NO_HEADERS
        try:
            await self._output_of(target, one_token, headers)
        except _Refused as error:
            if target.check_workers is None:
                raise
            self._note_refusal(error)
            await target.check_workers(rank)
        else:
            self._refused = ""

    def _note_refusal(self, error: StartError) -> None:
        if self._refused != error.line():
            self._refused = error.line()
            log.warning("token_refused", error=error.message, cause=error.root_cause)

    async def _ask(self) -> Any:
        target = self._target()
        if not _request_for(target, self._warm_up):
            log.info("warm_up_skipped", tasks=list(target.tasks))
            return None
        return essence(await self._output_of(target, self._warm_up))

    async def _output_of(
        self, target: Target, warm_up: WarmUp, headers: Mapping[str, str] = NO_HEADERS
    ) -> Any:
        """The answer to the request of this model, which has to show output.

        The deadline is the caller's: a first request may compile for minutes.

        Raises:
            _Refused: an answer came, but no output.
            StartError: no answer came.
        """
        call = _request_for(target, warm_up)
        if call is None:
            raise _Refused("there is no small request for a model of this kind")
        path, body = call
        response = await _post(target, path, body, headers)
        answered = response.status_code == httpx.codes.OK
        document = _json(response) if answered else None
        if not shows_work(document):
            without = " without any output" if answered else ""
            raise _Refused(
                f"the warm-up request to {path} got {response.status_code}{without}",
                root_cause=response.text[:CAUSE_LIMIT],
            )
        return document


def _request_for(target: Target, warm_up: WarmUp) -> tuple[str, dict[str, Any]] | None:
    return request_for(target.tasks, target.model, warm_up, by_ids=not target.tokenizer)


async def _post(
    target: Target, path: str, body: Mapping[str, Any], headers: Mapping[str, str] = NO_HEADERS
) -> httpx.Response:
    try:
        if target.app is None:
            raise RuntimeError("no app is attached")
        async with inner_client(target.app, target.state, None) as client:
            return await client.post(path, json=dict(body), headers=dict(headers))
    except Exception as error:
        raise StartError(
            f"the request to {path} got no answer",
            code="warm_up_failed",
            root_cause=repr(error),
        ) from error


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _told(response: httpx.Response) -> str:
    text = " ".join(response.text[:CAUSE_LIMIT].split())
    return f"{response.status_code}: {text}" if text else str(response.status_code)
