"""Which requests a main port answers, by their `Host`, and which are told more than a status.

vLLM's API on a main port is for whoever reaches it, as under `vllm serve`: a proxy on the same host
sends on the name that its clients use, and by default any page may read the answers
(`--allowed-origins`). What else there is on a loopback port is for its own names. A page that has
its name resolve to 127.0.0.1, or asks 127.0.0.1 itself, reads no more than vLLM would show it. The
supervisor, at the port of a worker that is absent, decides as the worker does.
"""

from __future__ import annotations

from collections.abc import Iterable

from ichat_lifecycle.adapters.host_names import HostNames
from ichat_lifecycle.adapters.refusal import CLOSE, Scope, Send, error_document, send_json

MISDIRECTED = 421
OWN_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/lifecycle"})


def is_own_path(path: str) -> bool:
    """Whether a path, without the root path, is the lifecycle's and not vLLM's."""
    return path in OWN_PATHS or path.startswith("/lifecycle/")


class MainPortNames:
    """The names of one main port.

    Args:
        bound: the address of the port; None for a Unix socket.
        names: those of `http.hosts`. With any, vLLM's routes ask for them, too.
        origins: those of `--allowed-origins`. Pages of these are trusted; "*" names none of them.
    """

    def __init__(
        self, bound: str | None, names: Iterable[str] = (), origins: Iterable[str] = ()
    ) -> None:
        given = tuple(names)
        self._hosts = HostNames(bound, given)
        self._for_all = bool(given)
        self._origins = {origin.encode() for origin in origins}

    def refuse(self, scope: Scope, path: str, *, keyed: bool = False) -> bool:
        """Whether the request is for a name, or of a page, that may not ask for this path.

        Args:
            path: without the root path.
            keyed: the lifecycle's routes ask for a key, which no page has: names do not matter.
        """
        if is_own_path(path) and not keyed:
            return not self.trust(scope)
        return self._for_all and not self._hosts.allow(scope["headers"])

    def trust(self, scope: Scope) -> bool:
        """Whether it may be told why the worker is not ready, which is not vLLM's to say."""
        headers = scope["headers"]
        others = [(k, v) for k, v in headers if k != b"origin" or v not in self._origins]
        return self._hosts.allow(headers) and self._hosts.allow_page(others)


async def misdirect(send: Send) -> None:
    """Answer 421."""
    message = "The request's Host, or its Origin, is no name of this worker; see http.hosts."
    await send_json(send, MISDIRECTED, error_document(message, MISDIRECTED, None), [CLOSE])
