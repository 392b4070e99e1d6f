"""The demo model: the same each time, never half there, and fit to be served."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from ichat_lifecycle.demo_model import MARKERS, VOCABULARY, make_demo_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "missing parent" / "model"
    make_demo_model(directory)
    return directory


def fingerprints(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.mark.engine
def test_two_models_are_the_same_to_the_byte(model: Path, tmp_path: Path) -> None:
    make_demo_model(tmp_path / "other")
    assert fingerprints(tmp_path / "other") == fingerprints(model)
    assert set(MARKERS) <= set(fingerprints(model))


@pytest.mark.engine
def test_the_callers_random_numbers_stay_theirs(tmp_path: Path) -> None:
    import torch

    before = torch.get_rng_state()
    make_demo_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.engine
def test_an_empty_directory_is_filled_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    make_demo_model(directory)
    assert set(MARKERS) <= {path.name for path in directory.iterdir()}
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.engine
def test_a_chat_is_answered_with_printable_text_that_goes_on(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == VOCABULARY
    llama: Any = AutoModelForCausalLM.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "状态? ☂"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    asked = prompt["input_ids"].shape[1]
    assert tokenizer.decode(prompt["input_ids"][0]) == "<s>user: 状态? ☂\nassistant: "
    answer = llama.generate(**prompt, do_sample=False, max_new_tokens=256)[0][asked:]
    assert len(answer) == 256
    assert all(tokenizer.decode([token]).isprintable() for token in answer)


def test_a_complete_model_is_left_as_it_is(tmp_path: Path) -> None:
    for name in MARKERS:
        (tmp_path / name).write_text("mine")
    before = fingerprints(tmp_path)
    make_demo_model(tmp_path)
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", *MARKERS])
def test_a_directory_with_other_things_is_refused_and_unchanged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="is not a demo model"):
        make_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a demo model"):
        make_demo_model(tmp_path / "model")


def test_without_transformers_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    with pytest.raises(RuntimeError, match=r"pip install ichat-lifecycle\[cpu\]"):
        make_demo_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
