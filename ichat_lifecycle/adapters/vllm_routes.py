"""Which of vLLM's routes administer an engine, as data: of 0.27 to 0.33.

All of them are off by default: those for development come with VLLM_SERVER_DEV_MODE, those of LoRA
adapters with VLLM_ALLOW_RUNTIME_LORA_UPDATING, those of profiles with a profiler's configuration,
those below /inference with --enable-scale-out. None of them takes a request for inference.
tests/test_vllm_routes.py compares them with those of the installed vLLM.
"""

from __future__ import annotations

from urllib.parse import parse_qs

# What brings an engine back that is paused or asleep.
WAKING = frozenset({"/wake_up", "/resume"})

# What is meant for an engine that is paused, asleep, or between two versions of its weights. The
# worker is DEGRADED then.
FOR_A_PAUSED_ENGINE = WAKING | {
    "/pause",  # in another mode
    "/abort_requests",
    "/inference/v1/abort_requests",  # the same, behind the API key
    "/sleep",  # to another level
    "/release_kv_cache_memory",
    "/collective_rpc",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_checker",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/stop_profile",
    "/fault_tolerance/apply",
    "/is_scaling_elastic_ep",  # a question, though a POST
}

# What may keep an engine silent for minutes.
_SILENCING = (FOR_A_PAUSED_ENGINE | {"/scale_elastic_ep"}) - {"/is_scaling_elastic_ep"}
_SLEEP = "/sleep"
DISCARDS_WEIGHTS = 2  # vLLM's sleep levels: 0 pauses, 1 keeps the weights in the host's memory
# What an operator gives an engine its weights with. What a /collective_rpc did is not known.
_GIVES_WEIGHTS = frozenset({"/collective_rpc", "/update_weights", "/finish_weight_update"})
_ADAPTERS = "/adapters"  # SageMaker's names for loading and unloading LoRA adapters


def passes_while_degraded(path: str) -> bool:
    """Whether a route, by its path without `--root-path`, is meant for a paused engine."""
    return path in FOR_A_PAUSED_ENGINE or _is_adapters(path)


def may_silence(path: str) -> bool:
    """Whether the engine may be silent for as long as a request to this route takes."""
    return path in _SILENCING or _is_adapters(path)


def has_weights_after(path: str, query: str) -> bool | None:
    """Whether the engine has its weights once this request has succeeded; None for as before."""
    if path == _SLEEP:
        (level,) = parse_qs(query).get("level", ["1"])[:1]
        return None if not level.isdecimal() or int(level) < DISCARDS_WEIGHTS else False
    return True if path in _GIVES_WEIGHTS else None


def _is_adapters(path: str) -> bool:
    return path == _ADAPTERS or path.startswith(f"{_ADAPTERS}/")
