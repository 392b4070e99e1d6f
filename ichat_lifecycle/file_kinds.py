"""Recognizes a file that was given in place of another kind: three kinds are ours, all YAML."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from ichat_lifecycle.config import Settings
from ichat_lifecycle.vllm_flags import find


class Kind(Enum):
    """A kind of file: what it is, and what takes it."""

    FLEET = "a configs.yaml, the file of a fleet", "ichat-lifecycle up FILE, or check FILE"
    SETTINGS = (
        "a file of settings",
        "ichat-lifecycle serve --lifecycle-config FILE; for a fleet, put it below `lifecycle:`",
    )
    FLAGS = "a file of vLLM's flags", "ichat-lifecycle serve --config FILE"
    KUBERNETES = "a manifest of Kubernetes", "kubectl apply -f FILE"

    @property
    def what(self) -> str:
        return str(self.value[0])

    @property
    def hint(self) -> str:
        return str(self.value[1])


_FLEET = ("managed_workers", "server_settings", "fleet")


def kind_of(content: Any) -> Kind | None:
    """Return the kind of a file by its top-level keys; None if it is not clear."""
    if not isinstance(content, Mapping):
        return None
    keys = {str(key) for key in content}
    if keys & set(_FLEET):
        return Kind.FLEET
    if {"apiVersion", "kind"} <= keys:
        return Kind.KUBERNETES
    if _most(keys, keys & set(Settings.model_fields)):
        return Kind.SETTINGS
    if _most(keys, {key for key in keys if find(f"--{key}") or key.startswith("model")}):
        return Kind.FLAGS
    return None


def _most(keys: Collection[str], known: Collection[str]) -> bool:
    return len(known) > len(keys) / 2
