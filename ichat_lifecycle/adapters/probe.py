"""Requests to ourselves over the real socket: `/health`, the warm-up, the canary."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import structlog

from ichat_lifecycle.adapters.gate import PASS_HEADER
from ichat_lifecycle.config import WarmUp
from ichat_lifecycle.errors import StartError
from ichat_lifecycle.ports import Address

log = structlog.get_logger("ichat_lifecycle.probe")


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask and how. `client_cert` is a (certificate, key) pair for a server that asks for
    one: our own, since we are our own client."""

    address: Address
    model: str
    tasks: Sequence[str]
    pass_token: str
    api_key: str | None = None
    client_cert: tuple[str, str] | None = None


class HttpProbe:
    """The `Probe` port. Its first warm-up's output is the canary's expected answer."""

    def __init__(self, target: Callable[[], Target], warm_up: WarmUp) -> None:
        self._target = target
        self._warm_up = warm_up
        self.expected: Any = None

    async def health(self) -> bool:
        """Whether `/health` answered 200; not being answered at all is no."""
        try:
            async with self._client(timeout_s=5.0) as client:
                return (await client.get("/health")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    async def warm_up(self) -> None:
        """One greedy request, by whatever API this model has.

        Raises:
            StartError: the request was not answered with 200.
        """
        answer = await self._ask(self._warm_up)
        if self.expected is None:
            self.expected = answer

    async def canary(self) -> None:
        """One greedy request; an answer that differs is logged, not judged: batches change bits.

        Raises:
            StartError: the request was not answered with 200.
        """
        answer = await self._ask(self._warm_up)
        if self.expected is not None and answer != self.expected:
            log.warning("canary_differs", expected=str(self.expected), got=str(answer))

    async def token(self) -> None:
        """A request for one token, without our pass: refused where any client's would be.

        Raises:
            StartError: the request was not answered with 200.
        """
        await self._ask(self._warm_up.model_copy(update={"max_tokens": 1}), passing=False)

    async def _ask(self, warm_up: WarmUp, *, passing: bool = True) -> Any:
        target = self._target()
        call = request_for(target.tasks, target.model, warm_up)
        if call is None:
            log.info("warm_up_skipped", tasks=list(target.tasks))
            return None
        path, body = call
        # The deadline is the lifecycle's: a first request may compile for minutes.
        try:
            async with self._client(timeout_s=None, passing=passing) as client:
                response = await client.post(path, json=body)
        except httpx.TransportError as error:
            raise StartError(
                f"the warm-up request to {path} got no answer",
                code="warm_up_failed",
                root_cause=repr(error),
            ) from error
        if response.status_code != httpx.codes.OK:
            raise StartError(
                f"the warm-up request to {path} got {response.status_code}",
                code="warm_up_failed",
                root_cause=response.text[:500],
            )
        return _essence(response.json())

    def _client(self, timeout_s: float | None, *, passing: bool = True) -> httpx.AsyncClient:
        target = self._target()
        headers = {PASS_HEADER.decode(): target.pass_token} if passing else {}
        if target.api_key:
            headers["Authorization"] = f"Bearer {target.api_key}"
        uds = target.address.uds
        transport = httpx.AsyncHTTPTransport(uds=uds, verify=_tls(target))
        scheme = "https" if target.address.tls else "http"
        base = f"{scheme}://localhost" if uds else target.address.url
        return httpx.AsyncClient(
            transport=transport, base_url=base, headers=headers, timeout=timeout_s
        )


def _tls(target: Target) -> ssl.SSLContext | bool:
    if not target.address.tls:
        return False  # the default context would cost 40 ms of the loop, for nothing
    # We talk to our own socket by an address that its certificate need not name.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if target.client_cert is not None:
        context.load_cert_chain(*target.client_cert)
    return context


def request_for(
    tasks: Sequence[str], model: str, warm_up: WarmUp
) -> tuple[str, dict[str, Any]] | None:
    """The request that exercises a model with these tasks; None where there is none (speech)."""
    if "generate" in tasks:
        return "/v1/completions", {
            "model": model,
            "prompt": warm_up.prompt,
            "max_tokens": warm_up.max_tokens,
            "temperature": 0.0,
            "seed": 0,
        }
    if "embed" in tasks:
        return "/v1/embeddings", {"model": model, "input": warm_up.prompt}
    if "classify" in tasks:
        return "/classify", {"model": model, "input": warm_up.prompt}
    if any(task in tasks for task in ("score", "token_classify", "token_embed", "encode")):
        task = next(t for t in ("token_embed", "token_classify", "encode", "score") if t in tasks)
        if task == "score":
            body = {"model": model, "text_1": warm_up.prompt, "text_2": warm_up.prompt}
            return "/score", body
        return "/pooling", {"model": model, "input": warm_up.prompt}
    return None


def _essence(document: dict[str, Any]) -> Any:
    """What of an answer is the same for the same question: not ids, times or log fields."""
    if "choices" in document:
        return [choice.get("text") for choice in document["choices"]]
    return document.get("data")
