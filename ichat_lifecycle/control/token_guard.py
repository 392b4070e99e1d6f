"""The token of routes that change something: who knows it passes, who guesses is slowed."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

import structlog
from fastapi import Request

from ichat_lifecycle.control.http import HttpError

log = structlog.get_logger("ichat_lifecycle")

# Of one client, after which each further guess is held back.
WRONG_AT_MOST = 10
WRONG_WINDOW_S = 10.0
HOLD_S = 1.0
# Clients that are remembered; the one that has not guessed for longest is forgotten first.
CLIENTS_MAX = 1024
# An IPv6 client has a whole network of addresses.
_IPV6_NETWORK = 64

_Times = deque[float]


class TokenGuard:
    """Lets through who knows the token, whatever others try; without a token, nobody.

    After 10 wrong tokens within 10 s, each further wrong one of the same client is answered after
    1 s, with 429. The right one is never held back: a stranger cannot lock anybody out. What keeps
    a token from being guessed is its length; see credentials.is_weak().

    Args:
        hold_s: seconds for which a guess is held back.
    """

    def __init__(
        self,
        token: str | None,
        clock: Callable[[], float] = time.monotonic,
        hold_s: float = HOLD_S,
    ) -> None:
        self._token = token.encode() if token else None
        self._clock = clock
        self._hold_s = hold_s
        self._wrong: OrderedDict[str, _Times] = OrderedDict()
        self._logged: _Times = deque(maxlen=WRONG_AT_MOST)

    async def check(self, request: Request) -> None:
        """Raises HttpError: 403 without a configured token, 401 without the right one, 429."""
        if self._token is None:
            raise HttpError(
                403,
                "control_token_not_set",
                "this worker takes no commands: it was started without a control token",
                "start it with --control-token",
            )
        given = _bearer_token(request)
        if given is None:
            raise _unauthorized("this route needs the control token")
        if hmac.compare_digest(given, self._token):
            return
        client = request.client.host if request.client else ""
        self._log(client, request.url.path)
        if self._is_guessing(client):
            await asyncio.sleep(self._hold_s)
            raise HttpError(
                429,
                "too_many_wrong_tokens",
                "too many wrong control tokens from this client; the right one passes at any time",
                "SIGTERM stops the worker without a token",
                headers={"Retry-After": "1"},
            )
        raise _unauthorized("the control token is wrong")

    def _is_guessing(self, client: str) -> bool:
        """Counts one more wrong token of this client's."""
        name = _network_of(client)
        times = self._wrong.setdefault(name, deque(maxlen=WRONG_AT_MOST))
        self._wrong.move_to_end(name)
        if len(self._wrong) > CLIENTS_MAX:
            self._wrong.popitem(last=False)
        return _is_one_too_many(times, self._clock())

    def _log(self, client: str, path: str) -> None:
        """All clients together cannot make a log grow faster than one of them."""
        if not _is_one_too_many(self._logged, self._clock()):
            log.warning("control_token_wrong", client=client or None, path=path)


def _is_one_too_many(times: _Times, now_s: float) -> bool:
    """Whether there were as many within the window as may be; else counts this one."""
    if len(times) == times.maxlen and now_s - times[0] < WRONG_WINDOW_S:
        return True
    times.append(now_s)
    return False


def _network_of(client: str) -> str:
    try:
        address = ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return address.exploded[: _IPV6_NETWORK // 16 * 5]
    return client


def _bearer_token(request: Request) -> bytes | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    # Starlette decodes headers as latin-1; the same way back gives the bytes that were sent.
    return value.strip().encode("latin-1") if scheme.lower() == "bearer" and value else None


def _unauthorized(message: str) -> HttpError:
    return HttpError(
        401,
        "unauthorized",
        message,
        "send it as Authorization: Bearer TOKEN",
        headers={"WWW-Authenticate": "Bearer"},
    )
