"""The Gateway that workers register at: the one that is named, or the one that runs."""

from __future__ import annotations

import socket

from ichat_lifecycle.fleet.models import ServerSettings

CONNECT_TIMEOUT_S = 0.5
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class RunningGateway:
    """Looks once where `server_settings` has the Gateway listen, and remembers what it has found.

    Once, because workers whose arguments change are replaced: a Gateway that is being started again
    during a reload must not have all of them replaced.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], bool] = {}

    def address(self, server: ServerSettings) -> str | None:
        """HOST:PORT of the Gateway; None where none is named and none runs. May take 0.5 s."""
        if server.gateway_address is not None:
            return server.gateway_address
        if "port" not in server.model_fields_set:
            return None
        host, port = _LOOPBACK.get(server.host, server.host), server.port
        if (host, port) not in self._found:
            self._found[host, port] = _listens(host, port)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return where if self._found[host, port] else None


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
