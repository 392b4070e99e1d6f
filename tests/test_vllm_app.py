"""What is read of vLLM's app beside its routes, by an app of the same shape."""

from __future__ import annotations

import argparse
import asyncio
import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

from ichat_lifecycle.adapters.vllm_app import VllmAppBuilder
from ichat_lifecycle.adapters.vllm_engine import VllmEngine
from ichat_lifecycle.adapters.vllm_layout import Layout


class Responses:
    """vLLM's OpenAIServingResponses as far as it matters here."""

    def __init__(self) -> None:
        self.background_tasks: dict[str, asyncio.Task[Any]] = {}


async def built(responses: object) -> tuple[VllmAppBuilder, Any]:
    app = SimpleNamespace(
        state=SimpleNamespace(openai_serving_responses=responses),
        build_middleware_stack=lambda: None,
    )

    async def init_app_state(*_: object) -> None:
        pass

    layout = SimpleNamespace(build_app=lambda *_, **__: app, init_app_state=init_app_state)
    client = SimpleNamespace(model_config=None)
    engine = SimpleNamespace(client=client, namespace=argparse.Namespace(), tasks=(), loras=list)
    builder = VllmAppBuilder(
        cast(VllmEngine, engine),
        lambda: cast(Layout, layout),
        lambda fault: None,
    )
    assert builder.background_tasks() == ()
    await builder.build()
    return builder, app


def test_responses_in_the_background_are_known_until_they_are_done() -> None:
    async def scenario() -> None:
        responses = Responses()
        builder, _ = await built(responses)
        assert builder.background_tasks() == ()
        ends = asyncio.Event()
        running, done = asyncio.create_task(ends.wait()), asyncio.create_task(asyncio.sleep(0))
        responses.background_tasks = {"resp_1": running, "resp_2": done}
        await done
        assert builder.background_tasks() == (running,)
        ends.set()
        await running
        assert builder.background_tasks() == ()

    asyncio.run(scenario())


def test_an_app_without_them_has_none() -> None:
    """A pooling model's state is None, and a later version may keep them elsewhere."""

    async def scenario() -> None:
        for responses in (None, type("Other", (), {})()):
            builder, _ = await built(responses)
            assert builder.background_tasks() == ()

    asyncio.run(scenario())


def test_the_app_of_a_replaced_engine_is_not_kept() -> None:
    async def scenario() -> None:
        responses = Responses()
        builder, app = await built(responses)
        gone = weakref.ref(responses)
        del responses
        app.state.openai_serving_responses = None
        gc.collect()
        assert gone() is None
        assert builder.background_tasks() == ()

    asyncio.run(scenario())
