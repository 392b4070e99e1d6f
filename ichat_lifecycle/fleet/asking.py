"""How the supervisor asks its workers: whatever one of them answers, it costs that worker's part.

There is no pool of connections that one worker, or one stranger's streams, could use up: each
question has a connection of its own. How many there are is bounded by whoever asks: one question
for the document of a worker at a time, and one for each client connection of the fleet's port.
There are no cookies, redirects, proxies, or compressed answers either.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from ichat_lifecycle.nesting import is_flat
from ichat_lifecycle.redact import Secrets
from ichat_lifecycle.short_heads import ShortHeads
from ichat_lifecycle.strict_json import parse_object

# A worker's own document: 20 KB with many arguments. What is larger, or slower, is no answer.
DOCUMENT_BYTES = 256 * 1024
DOCUMENT_CHUNKS = 1000  # each costs some microseconds, whatever its size is
DOCUMENT_DEPTH = 16  # `/fleet` has it within others, and its readers have limits of their own
ASK_TIMEOUT_S = 2.0
FRESH_S = 0.2
SHARE = 0.1  # of a core at most, to read what one worker answers: then it stays fresh for longer
SILENCE_S = 40.0  # a stream says something each 15 s (control/events.py)

_PATH = "/:@!$&'()*+,;=~-._"  # what may stand in a path as it is
_OK = 200
_STATUSES = range(200, 600)


_Key = tuple[str, str]  # a worker's name, and the URL of its control plane


class UnaskableError(Exception):
    """There is no such URL, or the worker does not answer."""


class WorkerClients:
    """Asks the control planes of workers, which speak plain HTTP on this machine.

    Args:
        hidden: what is taken out of their documents; default: nothing.
    """

    def __init__(self, hidden: Secrets | None = None) -> None:
        self._hidden = hidden or Secrets()
        # TLS is never used: a context of no certificates is cheap to make.
        self._transport = ShortHeads(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), keep=False)
        self._questions: dict[_Key, asyncio.Task[Mapping[str, Any] | None]] = {}
        self._read_s: dict[_Key, float] = {}  # of a core, for the newest document

    async def lifecycle(self, name: str, url: str) -> Mapping[str, Any] | None:
        """The worker's own `/lifecycle` document; None where it gives none within 2 s.

        Who asks while somebody else does, or soon after that, gets the same answer: many clients
        cost a worker, and the supervisor, some questions a second.
        """
        key = name, url
        question = self._questions.get(key)
        if question is None:
            question = asyncio.create_task(self._lifecycle(key), name=f"{name} is asked")
            self._questions[key] = question
            question.add_done_callback(lambda _: self._keep_fresh(key))
        return await asyncio.shield(question)

    def _keep_fresh(self, key: _Key) -> None:
        fresh_s = max(FRESH_S, self._read_s.pop(key, 0.0) / SHARE)
        asyncio.get_running_loop().call_later(fresh_s, self._questions.pop, key, None)

    async def _lifecycle(self, key: _Key) -> Mapping[str, Any] | None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                body = await self._body(key[1])
        except (UnaskableError, httpx.HTTPError, OSError):  # also a TimeoutError
            return None
        began_s = time.thread_time()
        try:
            return self._clean(body)
        except ValueError:
            return None
        finally:
            self._read_s[key] = time.thread_time() - began_s

    async def _body(self, url: str) -> bytes:
        """Raises UnaskableError, httpx.HTTPError, OSError."""
        answer = await self.send("GET", url, "lifecycle")
        body, chunks = bytearray(), 0
        try:
            async for chunk in answer.aiter_raw():
                body += chunk
                chunks += 1
                if len(body) > DOCUMENT_BYTES or chunks > DOCUMENT_CHUNKS:
                    raise UnaskableError(f"it answers with more than {DOCUMENT_BYTES} bytes")
        finally:
            await answer.aclose()
        if answer.status_code != _OK:
            raise UnaskableError(f"it answers with {answer.status_code}")
        return bytes(body)

    def _clean(self, body: bytes) -> Mapping[str, Any] | None:
        """The document without secrets, which is looked through only if there are some."""
        document = document_in(body)
        text = body.decode(errors="replace")
        if self._hidden.without_known(text) == text:
            return document
        clean: Mapping[str, Any] | None = self._hidden.without_known(document)
        return clean

    async def send(
        self,
        method: str,
        url: str,
        path: str,
        *,
        query: bytes = b"",
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """The worker's answer, of which nothing but the head has come; close it.

        Args:
            url: of its control plane.
            path: below that, not encoded. No part of it can leave the worker.
            query: as it came.

        Raises:
            UnaskableError: the URL is none, or nobody answers there.
        """
        target = b"/" + quote(path, safe=_PATH).encode() + (b"?" + query if query else b"")
        try:
            where = httpx.URL(url).copy_with(raw_path=target)
            if where.scheme != "http" or where.userinfo:
                raise UnaskableError(f"{url!r} is no control plane's")
            request = httpx.Request(
                method,
                where,
                headers=headers,
                content=content,
                extensions={"timeout": _timeout(method)},
            )
            answer = await self._transport.handle_async_request(request)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UnaskableError(str(error) or type(error).__name__) from error
        if answer.status_code not in _STATUSES:
            await answer.aclose()
            raise UnaskableError(f"it answers with {answer.status_code}, which is no status")
        return answer

    async def aclose(self) -> None:
        """Ends what is asked now. Idempotent."""
        questions = tuple(self._questions.values())
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        await self._transport.aclose()


def _timeout(method: str) -> dict[str, float]:
    """A command may take its time, and who waits for it has shown a token."""
    silence = {} if method == "POST" else {"read": SILENCE_S}
    return {"connect": ASK_TIMEOUT_S, "write": ASK_TIMEOUT_S, **silence}


def document_in(body: bytes) -> Mapping[str, Any] | None:
    """A JSON object that can be sent on to any reader; None for anything else."""
    try:
        document = parse_object(body)
    except ValueError:
        return None
    return document if is_flat(document, DOCUMENT_DEPTH) else None
