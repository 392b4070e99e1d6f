"""The list of vLLM's administrative routes, beside vLLM's own routers: nobody is overlooked."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_arguments import vllm_parser
from test_flag_effects import app_of

from ichat_lifecycle.adapters.vllm_routes import (
    FOR_A_PAUSED_ENGINE,
    WAKING,
    may_silence,
    passes_while_degraded,
)

SAFE = {"GET", "HEAD", "OPTIONS"}  # these pass anyway
# What a client asks a model for, with what belongs to that. DEGRADED refuses it, and an engine that
# is silent meanwhile is hung.
_FOR_CLIENTS = """
    /classify /cohere/v2/chat /cohere/v2/chat/render /detokenize /generative_scoring
    /inference/v1/generate /invocations /ping /pooling /rerank /score /tokenize
    /v1/audio/transcriptions /v1/audio/translations /v1/chat/completions /v1/chat/completions/batch
    /v1/chat/completions/derender /v1/chat/completions/render /v1/completions
    /v1/completions/derender /v1/completions/render /v1/embeddings /v1/messages
    /v1/messages/count_tokens /v1/messages/render /v1/rerank /v1/responses /v1/responses/render
    /v1/responses/{response_id}/cancel /v1/score /v1/systemone /v2/embed /v2/rerank
"""
FOR_CLIENTS = set(_FOR_CLIENTS.split())
# vLLM leaves some routers out unless something switches them on.
SWITCHES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
FLAGS = ["--enable-fault-tolerance", "--enable-scale-out"]
PROFILER = ["--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/tmp"}']


def changing(routes: Iterable[Any]) -> set[str]:
    """The paths of routes that ask for more than an answer."""
    return {r.path for r in routes if (getattr(r, "methods", None) or set()) - SAFE}


def routers() -> Iterator[Any]:
    """Those of all the modules of vLLM's entry points that are named for it, switched on or not."""
    import vllm
    from fastapi import APIRouter

    root = Path(vllm.__file__).parent
    for file in sorted((root / "entrypoints").rglob("*router*.py")):
        name = ".".join(file.relative_to(root.parent).with_suffix("").parts)
        found = vars(importlib.import_module(name)).values()
        yield from (one for one in found if isinstance(one, APIRouter))


@pytest.fixture(scope="module")
def vllms() -> set[str]:
    """Of the routers, and of an app with most switched on: some are made while it is built."""
    vllm_parser()  # a default of its flags is what such a variable is at the import
    with pytest.MonkeyPatch.context() as patch:
        for name in SWITCHES:
            patch.setenv(name, "1")
        app = app_of([*FLAGS, *PROFILER]).app
    return changing(app.routes).union(*(changing(router.routes) for router in routers()))


@pytest.mark.engine
def test_every_route_of_this_vllm_has_been_looked_at(vllms: set[str]) -> None:
    """A new one is for a paused engine, may keep the engine silent, or is one for clients."""
    ours = {path for path in vllms if passes_while_degraded(path) or may_silence(path)}
    assert vllms - ours == vllms & FOR_CLIENTS
    assert not ours & FOR_CLIENTS


@pytest.mark.engine
def test_every_route_of_the_list_is_one_of_vllms(vllms: set[str]) -> None:
    """Else it is a mistake in writing: 0.32 has them all."""
    assert FOR_A_PAUSED_ENGINE | {"/scale_elastic_ep", "/adapters"} <= vllms


def test_what_passes_may_also_silence_except_for_a_question() -> None:
    """An engine that loads weights answers nothing else; see the watchdog."""
    assert WAKING <= FOR_A_PAUSED_ENGINE
    quick = {path for path in FOR_A_PAUSED_ENGINE if not may_silence(path)}
    assert quick == {"/is_scaling_elastic_ep"}
    assert may_silence("/scale_elastic_ep") and not passes_while_degraded("/scale_elastic_ep")


@pytest.mark.parametrize("path", ["/adapters", "/adapters/mine"])
def test_adapters_are_administered_by_any_name(path: str) -> None:
    assert passes_while_degraded(path) and may_silence(path)


@pytest.mark.parametrize("path", sorted(FOR_CLIENTS))
def test_what_clients_ask_for_does_neither(path: str) -> None:
    assert not passes_while_degraded(path) and not may_silence(path)
