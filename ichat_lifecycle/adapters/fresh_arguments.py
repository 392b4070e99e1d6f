"""vLLM's namespace, copied for each engine: no build meets what a former one has written into it.

vLLM treats its arguments as its own: a build appends adapters to a list, and configuration objects
of the namespace become part of the engine's configuration, with all that is set in there later.
"""

from __future__ import annotations

import argparse
import copy
import uuid
from collections.abc import Collection
from typing import Any

# By which an engine is known to its peers, as of --kv-transfer-config and --ec-transfer-config.
_ID = "engine_id"


def generated_ids(one: argparse.Namespace, other: argparse.Namespace) -> frozenset[str]:
    """The arguments whose engine_id vLLM has made up, out of two parses of the same command line.

    A configuration object does not show whether its engine_id was given; a given one stays.
    """
    return frozenset(
        name
        for name, value in vars(one).items()
        if (known := _id_of(value)) and known != _id_of(getattr(other, name, None))
    )


def has_ids(namespace: argparse.Namespace) -> bool:
    """Whether there is an engine_id at all."""
    return any(_id_of(value) for value in vars(namespace).values())


def fresh(namespace: argparse.Namespace, generated: Collection[str] = ()) -> argparse.Namespace:
    """A copy that shares nothing that can change; `generated` get a new engine_id.

    A value that cannot be copied, such as a lock that a plugin has put there, is shared.
    """
    copied = argparse.Namespace(**{name: _copied(v) for name, v in vars(namespace).items()})
    for name in generated:
        setattr(getattr(copied, name), _ID, str(uuid.uuid4()))
    return copied


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _id_of(value: Any) -> str:
    found = getattr(value, _ID, None)
    return found if isinstance(found, str) else ""
