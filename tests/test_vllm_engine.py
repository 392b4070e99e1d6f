"""What `VllmEngine` makes of its client's answers, on a client that is a fake."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import weakref
from functools import cache, lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from ichat_lifecycle.adapters import vllm_caches
from ichat_lifecycle.adapters.load_phases import CAPTURING, LoadPhases
from ichat_lifecycle.adapters.vllm_engine import VllmEngine
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.adapters.vllm_ranks import EngineRanks
from ichat_lifecycle.errors import EngineNotUp, TransitionRefused


class Client:
    """Records what it is asked; `answers` by method, an exception is raised."""

    errored = False

    def __init__(self, **answers: Any) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers = answers

    def _answer(self, name: str, argument: Any = None) -> Any:
        self.asked.append((name, argument))
        answer = self.answers.get(name)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, level: int) -> Any:
        return self._answer("sleep", level)

    async def wake_up(self, tags: list[str] | None) -> Any:
        return self._answer("wake_up", tags)

    async def collective_rpc(self, method: str) -> Any:
        return self._answer("collective_rpc", method)

    async def reset_prefix_cache(self) -> Any:
        return self._answer("reset_prefix_cache")

    async def is_sleeping(self) -> Any:
        return self._answer("is_sleeping")


def engine_with(client: Client | None) -> VllmEngine:
    engine = VllmEngine(argparse.Namespace, lambda: cast(Layout, None), lambda: None)
    engine.client = client
    engine.ranks = EngineRanks(client)
    return engine


def test_what_the_engine_reports_as_not_done_is_refused() -> None:
    """vLLM answers False where running requests hold blocks of the cache."""
    with pytest.raises(TransitionRefused, match="hold blocks"):
        asyncio.run(engine_with(Client(reset_prefix_cache=False)).reset_prefix_cache())
    with pytest.raises(TransitionRefused, match="still asleep"):
        asyncio.run(engine_with(Client(wake_up=False)).wake_up())


@pytest.mark.parametrize("answer", [True, None], ids=["done", "an older version"])
def test_what_the_engine_has_done_is_done(answer: Any) -> None:
    asyncio.run(engine_with(Client(reset_prefix_cache=answer)).reset_prefix_cache())
    asyncio.run(engine_with(Client(wake_up=answer)).wake_up())


@pytest.mark.parametrize("level", [0, 1])
def test_weights_that_were_kept_are_not_loaded_again(level: int) -> None:
    client = Client()
    engine = engine_with(client)

    async def script() -> None:
        await engine.sleep(level)
        await engine.wake_up()

    asyncio.run(script())
    assert client.asked == [("sleep", level), ("wake_up", None)]


@pytest.mark.parametrize("given", ["/update_weights", "/collective_rpc", "/finish_weight_update"])
def test_an_engine_that_vllms_own_routes_woke_without_weights_counts_as_asleep(given: str) -> None:
    """It would answer, with anything; until it has got weights, by whatever way."""
    client = Client(is_sleeping=False)
    engine = engine_with(client)

    async def script() -> None:
        engine.administrated("/sleep", "level=2&mode=abort")
        engine.administrated("/wake_up", "")
        assert await engine.is_sleeping()
        engine.administrated(given, "")
        assert not await engine.is_sleeping()
        engine.administrated("/sleep", "level=2")
        await engine.wake_up()
        assert ("collective_rpc", "reload_weights") in client.asked
        assert not await engine.is_sleeping()
        for query in ("", "level=1", "level=x"):
            engine.administrated("/sleep", query)
            assert not await engine.is_sleeping(), "the weights are kept"

    asyncio.run(script())


def test_a_sleep_that_the_engine_refuses_leaves_it_awake() -> None:
    engine = engine_with(Client(sleep=ValueError("no sleep mode"), is_sleeping=False))

    async def script() -> None:
        with pytest.raises(ValueError, match="no sleep mode"):
            await engine.sleep(2)
        assert not await engine.is_sleeping()

    asyncio.run(script())


def test_discarded_weights_are_loaded_before_the_engine_counts_as_awake() -> None:
    """Where that fails it stays asleep, and the next wake loads them."""
    client = Client(collective_rpc=[OSError("the disk is gone"), None])
    engine = engine_with(client)
    loading = [("wake_up", ["weights"]), ("collective_rpc", "reload_weights")]

    async def script() -> None:
        await engine.sleep(2)
        with pytest.raises(OSError, match="the disk is gone"):
            await engine.wake_up()
        assert client.asked == [("sleep", 2), *loading]
        await engine.wake_up()
        assert client.asked[3:] == [*loading, ("wake_up", ["kv_cache"])]
        await engine.wake_up()
        assert client.asked[-1] == ("wake_up", None)

    asyncio.run(script())


def test_a_description_of_an_engine_that_is_gone_or_goes_is_an_error_of_its_own() -> None:
    with pytest.raises(EngineNotUp):
        asyncio.run(engine_with(None).describe())

    class Leaving(Client):
        async def is_sleeping(self) -> Any:
            engine.client = None
            raise AttributeError("'NoneType' object has no attribute 'is_sleeping_async'")

    engine = engine_with(Leaving())
    with pytest.raises(EngineNotUp):
        asyncio.run(engine.describe())


@pytest.mark.parametrize("ask", ["describe", "reset_prefix_cache", "wake_up"])
def test_a_question_that_vllm_cancels_is_no_cancellation_of_ours(ask: str) -> None:
    """ZeroMQ cancels what waits on a socket that is closed; a real cancellation stays one."""

    class Waiting(Client):
        def __init__(self) -> None:
            super().__init__()
            self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def is_sleeping(self) -> Any:
            return await self.future

        async def reset_prefix_cache(self) -> Any:
            return await self.future

        async def wake_up(self, tags: list[str] | None) -> Any:
            return await self.future

    async def outcome(cancel: str) -> BaseException | None:
        client = Waiting()
        asking = asyncio.create_task(getattr(engine_with(client), ask)())
        await asyncio.sleep(0)
        (client.future if cancel == "socket" else asking).cancel()
        await asyncio.wait({asking})
        return asyncio.CancelledError() if asking.cancelled() else asking.exception()

    assert isinstance(asyncio.run(outcome("socket")), EngineNotUp)
    assert isinstance(asyncio.run(outcome("caller")), asyncio.CancelledError)


@pytest.mark.parametrize(
    ("tasks", "chosen", "served"),
    [
        (("embed", "token_embed"), "token_embed", ("token_embed",)),
        (("embed", "embed&token_classify"), "embed&token_classify", ("embed&token_classify",)),
        (("generate", "render"), None, ("generate", "render")),
        (("embed",), RuntimeError("Unsupported task: 'classify'"), ("embed",)),
    ],
)
def test_of_several_tasks_for_pooling_the_chosen_one_is_served(
    tasks: tuple[str, ...], chosen: Any, served: tuple[str, ...]
) -> None:
    """By --pooler-config or by the model: the API of the others refuses every request."""

    class Config:
        def get_pooling_task(self, supported: tuple[str, ...]) -> Any:
            assert supported == tasks
            if isinstance(chosen, Exception):
                raise chosen
            return chosen

    engine = engine_with(Client())
    engine.tasks = tasks
    assert engine.served_tasks == tasks, "a vLLM that has no such choice"
    engine.client.model_config = Config()
    assert engine.served_tasks == served


def test_only_living_children_are_the_engines_processes() -> None:
    """The number of one that has been reaped may be another process's by now."""

    class Child:
        def __init__(self, *, alive: bool) -> None:
            self.is_alive = lambda: alive

    engine = engine_with(Client())
    engine._children = {os.getpid(): Child(alive=False)}
    assert engine.processes() == ()
    engine._children = {os.getpid(): Child(alive=True)}
    assert os.getpid() in engine.processes()


def test_a_line_begins_a_phase_only_while_the_engine_loads() -> None:
    """Later a client's text may be in it."""
    engine = engine_with(Client())
    seen: list[tuple[str, float | None]] = []
    engine._on_phase = lambda *phase: seen.append(phase)
    line = "no such pattern: (?=a)x Capturing CUDA graphs: 50%"
    for loading in (None, SimpleNamespace(running=False)):
        engine._loading = cast(Any, loading)
        engine._read_phase(LoadPhases(), line)
    assert seen == []
    engine._loading = cast(Any, SimpleNamespace(running=True))
    engine._read_phase(LoadPhases(), line)
    assert seen == [(CAPTURING, 0.5)]


def test_an_engines_tokenizer_is_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what is not keyed by an engine forgotten."""

    class Tokenizer:
        pass

    class NotInstalled(type):
        """As transformers' stand-in for a class whose library is not there."""

        def __getattribute__(cls, name: str) -> Any:
            raise ImportError("it requires the Torchvision library")

    module, other = ModuleType("likevllm.renderers.hf"), ModuleType("likevllm.platform")
    vars(module)["kwargs_of"] = kwargs_of = lru_cache(id)
    vars(module)["Processor"] = NotInstalled("Processor", (), {})
    vars(other)["cores"] = cores = cache(lambda: 2)
    for each in (module, other):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    tokenizer = Tokenizer()
    kwargs_of(tokenizer)
    cores()
    gone = weakref.ref(tokenizer)
    del tokenizer
    vllm_caches.forget(("likevllm.renderers",))
    gc.collect()
    assert gone() is None
    assert cores.cache_info().currsize == 1
