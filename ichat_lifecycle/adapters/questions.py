"""The requests that a worker makes to itself, and what their answers prove. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ichat_lifecycle.config import WarmUp

# What a prompt of token ids is made of. Small ones, which every vocabulary has: vLLM 0.32 without a
# tokenizer does not check them, and one beyond the vocabulary ends the engine.
TOKEN_IDS = (1, 2, 3)

OK = 200
CAUSE_LIMIT = 500  # characters of an answer in an error


def request_for(
    tasks: Sequence[str], model: str, warm_up: WarmUp, *, by_ids: bool = False
) -> tuple[str, dict[str, Any]] | None:
    """The path and body that exercise a model with these tasks; None for others, such as speech.

    Of a pooling model's tasks vLLM serves one, where it lets one be chosen: `tasks` is that alone.

    Args:
        by_ids: give the prompt as token ids, for an engine without a tokenizer.
    """
    prompt: Any = list(TOKEN_IDS) if by_ids else warm_up.prompt
    if "generate" in tasks:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": warm_up.max_tokens,
            "temperature": 0.0,
            "seed": 0,
        }
        # Without a tokenizer the text of the answer is empty: its ids are what can be compared.
        return "/v1/completions", {**body, **({"return_token_ids": True} if by_ids else {})}
    if "embed" in tasks:
        return "/v1/embeddings", {"model": model, "input": prompt}
    if "classify" in tasks:
        return "/classify", {"model": model, "input": prompt}
    if any(task in tasks for task in ("score", "token_classify", "token_embed", "encode")):
        task = next(t for t in ("token_embed", "token_classify", "encode", "score") if t in tasks)
        if task == "score":
            return "/score", {"model": model, "text_1": prompt, "text_2": prompt}
        return "/pooling", {"model": model, "input": prompt}
    return None


def chat_to_render(model: str) -> tuple[str, dict[str, Any]]:
    """The path and body that have vLLM render a chat of one user message, without the engine."""
    return "/tokenize", {"model": model, "messages": [{"role": "user", "content": "Hello"}]}


# The words of vLLM and transformers for a model that has no chat template at all.
_NO_TEMPLATE = ("you must provide a chat template", "chat_template is not set")

# vLLM's answers where it does not offer to render: not there, another method, not for this model.
_NOT_OFFERED = frozenset({404, 405, 501})


def broken_chat(status: int, text: str) -> str | None:
    """Why a chat cannot be rendered, by vLLM's answer to `chat_to_render`.

    None where it can be, where that cannot be known, and for a model without a template, which
    completes texts and was not made for chats.
    """
    if status == OK or status in _NOT_OFFERED or any(words in text for words in _NO_TEMPLATE):
        return None
    return error_message(text) or f"vLLM answers {status}"


def error_message(text: str) -> str:
    """The message in an error of OpenAI's form, or else the text; "" for an empty one."""
    try:
        error = json.loads(text)["error"]
        found = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        found = text
    return " ".join(str(found).split())[:CAUSE_LIMIT]


def essence(document: Any) -> Any:
    """The part of an answer that is the same for the same question, without ids and times."""
    if not isinstance(document, dict):
        return None
    if "choices" in document:
        return [choice.get("text") or choice.get("token_ids") for choice in _choices(document)]
    return document.get("data")


def shows_work(document: Any) -> bool:
    """Whether an answer shows that the engine has computed something: a token, or a vector.

    A request that was aborted, or refused by the API, is answered as well; neither needs an engine.
    """
    if not isinstance(document, dict):
        return False
    usage = document.get("usage")
    if isinstance(usage, dict) and usage.get("completion_tokens"):
        return True
    if any(choice.get("text") or choice.get("token_ids") for choice in _choices(document)):
        return True
    return bool(document.get("data"))


def _choices(document: dict[str, Any]) -> list[dict[str, Any]]:
    choices = document.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
