"""A tiny random model, made in seconds, so that tests and `make serve` need no download.

Its text means nothing, but it behaves: every token it prefers is printable, and its greedy text
never ends by itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ichat_lifecycle.private_files import make_directory

VOCABULARY = 512
SEED = 20260101
_MODE = 0o755
MARKERS = ("config.json", "model.safetensors", "tokenizer.json")

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CORPUS = (
    "system: You are a helpful assistant. user: What is the state of the engine? assistant: ",
    "A worker parses its arguments, binds its socket, starts its engine, serves, and is ready.",
    "A gateway routes each request to a ready worker; a degraded worker gets none until it is well",
    "again. Asked to stop, it refuses new work, finishes what it has accepted, and releases the",
    "server, the engine and the socket in reverse order. Then nothing of it is left.",
    "The quick brown fox jumps over the lazy dog while seven wizards mix black quartz potions.",
    "Count with me: one, two, three, four, five, six, seven, eight, nine, ten; 0123456789.",
)


def make_demo_model(directory: Path) -> None:
    """Make a tiny Llama with a tokenizer and a chat template in `directory`.

    512 tokens, 2048 positions, 2 layers, bfloat16, about 1 MB; the weights are the same each time.
    The directory appears whole or not at all; one that already holds a model is left as it is.

    Args:
        directory: where to; missing parents are made.

    Raises:
        FileExistsError: `directory` exists and is neither empty nor a demo model.
        RuntimeError: transformers, tokenizers or torch is not installed.
        OSError: `directory` cannot be written.
    """
    if _is_complete(directory):
        return
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists and is not a demo model: remove it, or name another directory"
        )
    make_directory(directory.parent, _MODE)
    with tempfile.TemporaryDirectory(prefix=".demo-model-", dir=directory.parent) as beside:
        # One level down, so that cleaning up is the same with and without the rename.
        unfinished = Path(beside) / "model"
        unfinished.mkdir(mode=_MODE)
        _write(unfinished)
        for path in unfinished.iterdir():  # for others to read, whatever the umask is
            path.chmod(path.stat().st_mode & _MODE)
        try:
            unfinished.rename(directory)
        except OSError:
            # Another process may have finished first; its model is the same as ours.
            if not _is_complete(directory):
                raise


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in MARKERS)


def _write(directory: Path) -> None:
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise RuntimeError(
            f"the demo model needs {error.name}: pip install ichat-lifecycle[cpu]"
        ) from error

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Ten times the default: logits differ enough that the text depends on the prompt.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay theirs
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    # A zero row gives a logit of 0, which hundreds of others beat: streams then carry text with
    # every token, and do not end at once.
    with torch.no_grad():
        model.lm_head.weight[_silent_tokens(tokenizer)] = 0
    logging.disable_progress_bar()  # a bar for one small file is noise
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer, trained on CORPUS: it encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def _silent_tokens(tokenizer: Any) -> list[int]:
    """Ids of special tokens, control characters and incomplete UTF-8, and those without a token."""
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCABULARY)]
    return [
        token
        for token, text in enumerate(texts)
        if not (text and text.isascii() and text.isprintable())
    ]
