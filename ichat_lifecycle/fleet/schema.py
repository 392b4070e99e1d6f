"""The JSON Schema of configs.yaml, for editors that complete and check as one types."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ichat_lifecycle.config import Settings
from ichat_lifecycle.fleet.models import FleetSettings, ServerSettings, WorkerConfig


class _Worker(WorkerConfig):
    model_config = ConfigDict(title="Worker")

    lifecycle: Settings = Settings()  # type: ignore[assignment]  # keys only, here


class _Defaults(BaseModel):
    """What every worker has, unless it says otherwise."""

    model_config = ConfigDict(extra="allow", title="Defaults")


class _File(BaseModel):
    """configs.yaml: iChat's Gateway, and the workers that it routes to."""

    model_config = ConfigDict(extra="forbid", title="configs.yaml")

    server_settings: ServerSettings = ServerSettings()
    managed_workers: list[_Worker] = Field(min_length=1, description="the workers")
    defaults: _Defaults = _Defaults()
    lifecycle: Settings = Settings()
    fleet: FleetSettings = FleetSettings()


_SAID = ("title", "description", "default")
_INSTEAD = ({"type": "null"}, {"type": "string", "pattern": r"\$\{"})


def file_schema() -> dict[str, Any]:
    """The schema; a worker's keys that are vLLM's are not in it.

    What a worker has to have may stand in `defaults`. Instead of any value there may be a variable,
    or null, which takes a default back.
    """
    found = _File.model_json_schema()
    for part in found["$defs"].values():
        part["properties"] = {k: _or_instead(v) for k, v in part.get("properties", {}).items()}
    found["$defs"]["_Worker"]["required"] = ["model_name", "port"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _or_instead(value: dict[str, Any]) -> dict[str, Any]:
    """Also a variable or null; with what is said of the value for people around both."""
    said: dict[str, Any] = {key: of_it for key, of_it in value.items() if key in _SAID}
    rest = {key: of_it for key, of_it in value.items() if key not in _SAID}
    return {**said, "anyOf": [rest, *_INSTEAD]}
