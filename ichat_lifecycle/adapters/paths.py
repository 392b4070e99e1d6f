"""The path of a request as vLLM's app routes it, and other ways to write the same path."""

from __future__ import annotations

import posixpath


def route_path(path: str, root: str) -> str:
    """The part of a path that the app's router matches.

    It has to agree with Starlette's `get_route_path`, because what the gate decides about has to be
    what the app then answers. A path without the prefix stays as it is: the app answers that too.

    Args:
        path: decoded, without a query, as in `scope["path"]`.
        root: `--root-path`; "" for none.
    """
    if not root or not path.startswith(root):
        return path
    rest = path[len(root) :]
    return rest if not rest or rest.startswith("/") else path


def is_one_of(path: str, root: str, wanted: frozenset[str]) -> bool:
    """Whether a path may mean one of `wanted`, however it is written: `//health`, `/health/`,
    `/v1/../health`. For what is refused, never for what is let through."""
    spellings = (_plain(route_path(path, root)), route_path(_plain(path), root))
    return any(spelling in wanted for spelling in spellings)


def _plain(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))
