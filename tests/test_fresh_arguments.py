"""No engine meets what the build of a former one has written into its arguments."""

from __future__ import annotations

import argparse
import json
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest

from ichat_lifecycle.adapters.fresh_arguments import fresh, generated_ids, has_ids
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments


@dataclass
class Transfer:
    """As vLLM's KVTransferConfig, which makes up what was not given."""

    engine_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine_id is None:
            self.engine_id = str(uuid.uuid4())


def build(namespace: argparse.Namespace) -> None:
    """As vLLM's: adapters for modalities are appended, and the configuration object is kept."""
    namespace.lora_modules += ["image"]
    namespace.transfer.extra["port"] = 1
    namespace.transfer.engine_id += "_dp0"


def test_each_engine_gets_arguments_of_its_own() -> None:
    parsed = argparse.Namespace(lora_modules=["mine"], transfer=Transfer("given"))
    for _ in range(3):
        namespace = fresh(parsed)
        assert namespace.lora_modules == ["mine"]
        assert namespace.transfer == Transfer("given")
        build(namespace)
    assert parsed.lora_modules == ["mine"]


def test_what_cannot_be_copied_is_shared_and_the_rest_is_copied() -> None:
    lock = threading.Lock()
    parsed = argparse.Namespace(lock=lock, names=["a"])
    namespace = fresh(parsed)
    assert namespace.lock is lock
    assert namespace.names is not parsed.names


def parse(kv: str | None = None, ec: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(model="demo", kv=Transfer(kv), ec=Transfer(ec), no=None)


def test_an_id_that_was_made_up_is_made_anew_and_a_given_one_stays() -> None:
    parsed = parse(ec="given")
    assert has_ids(parsed)
    generated = generated_ids(parsed, parse(ec="given"))
    assert generated == {"kv"}
    engines = [fresh(parsed, generated) for _ in range(3)]
    assert len({engine.kv.engine_id for engine in engines} | {parsed.kv.engine_id}) == 4
    assert {engine.ec.engine_id for engine in engines} == {"given"}
    assert generated_ids(parse("a", "b"), parse("a", "b")) == frozenset()
    assert not has_ids(argparse.Namespace(model="demo"))


ADAPTERS = (
    "--lora-modules",
    "mine=/adapters/mine",
    "--default-mm-loras",
    '{"image": "/adapters/i"}',
)


@pytest.mark.engine
@pytest.mark.parametrize("given", [None, "given"])
def test_what_vllms_own_parser_makes_is_fresh_for_each_engine(given: str | None) -> None:
    """Its configuration objects make up an id while they are parsed, and can be copied."""
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    transfer |= {"engine_id": given} if given else {}
    argv = ["m", "--enable-lora", *ADAPTERS, "--kv-transfer-config", json.dumps(transfer)]
    arguments = VllmArguments(argparse.Namespace(), argv)
    arguments.parsed = arguments.parse_now()
    one, other = arguments.for_engine(), arguments.for_engine()
    ids = {each.kv_transfer_config.engine_id for each in (one, other)}
    assert ids == {given} if given else len(ids) == 2
    # As vLLM does with the adapters of --default-mm-loras, when it builds the app.
    one.lora_modules.append("image")
    one.default_mm_loras["audio"] = "/adapters/a"
    for later in (other, arguments.for_engine()):
        assert [module.name for module in later.lora_modules] == ["mine"]
        assert later.default_mm_loras == {"image": "/adapters/i"}
