"""The phases of a load, read off what vLLM prints; the lines are real ones."""

from __future__ import annotations

import json

import pytest

from ichat_lifecycle.adapters.load_phases import LoadPhases

CORE = "(EngineCore pid=7) INFO 11-22 17:19:17 "
WORKER = "(Worker_TP0 pid=8) INFO 11-22 17:19:17 "

ON_CPU = f"""\
INFO 11-22 17:19:10 [vllm.py:42] Enforce eager set, disabling torch.compile, CUDAGraphs, and more
{CORE}[core.py:98] Initializing a V1 LLM engine (v0.32.0) with config: model='/m', speculative=None
{WORKER}[cpu_model_runner.py:68] Starting to load model /m...
Loading safetensors checkpoint shards:   0% Completed | 0/2 [00:00<?, ?it/s]
Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 109.53it/s]
Loading safetensors checkpoint shards: 100% Completed | 2/2 [00:00<00:00, 109.53it/s]
{WORKER}[default_loader.py:502] Loading weights took 0.01 seconds
{CORE}[utils.py:347] Using LBHNC KV cache layout.
{WORKER}[cpu_worker.py:260] Explicitly set (1.0/18.34) GiB for KV cache on node 0.
{CORE}[kv_cache_utils.py:2327] CPU KV cache size: 2,097,152 tokens, Maximum concurrency for 1x
{CORE}[core.py:402] init engine (profile, create kv cache, warmup model) took 0.68 s"""

ON_GPU = f"""\
{WORKER}[gpu_model_runner.py:5040] Starting to load model meta-llama/Llama...
(Worker_TP0 pid=8) \rLoading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03]
{WORKER}[default_loader.py:502] Loading weights took 4.20 seconds
{WORKER}[gpu_model_runner.py:5150] Model loading took 14.9 GiB memory and 5.1 seconds
{WORKER}[backends.py:1105] Using cache directory: /c/torch_compile_cache/ab for vLLM's torch.compile
{WORKER}[backends.py:1167] Dynamo bytecode transform time: 5.23 s
{WORKER}[backends.py:399] Compiling a graph for compile range (1, 2048) takes 21.30 s
{WORKER}[monitor.py:20] torch.compile took 27.44 s in total
{WORKER}[gpu_worker.py:760] Available KV cache memory: 55.61 GiB
{CORE}[kv_cache_utils.py:2328] GPU KV cache size: 455,536 tokens, Maximum concurrency for 8,192: 9x
Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|█████     | 34/67 [00:02<00:02]
Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|██████████| 67/67 [00:04<00:00]
{WORKER}[gpu_model_runner.py:6582] Graph capturing finished in 5 secs, took 0.61 GiB"""


def read(text: str) -> list[tuple[str, float | None]]:
    phases = LoadPhases()
    return [found for line in text.splitlines() if (found := phases.read(line)) is not None]


def test_a_phase_is_read_in_each_form_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_PREFIX", "[n1] ")
    said = "Starting to load model /m..."
    record = {"levelname": "INFO", "name": "vllm.x", "processName": "Worker", "process": 8}
    for line in (f"[n1] {WORKER}[x.py:68] {said}", json.dumps(record | {"message": said})):
        assert read(line) == [("loading_weights", None)]


def test_a_load_on_cpu() -> None:
    assert read(ON_CPU) == [
        ("loading_weights", None),
        ("loading_weights", 0.0),
        ("loading_weights", 0.5),
        ("loading_weights", 1.0),
        ("profiling", None),
        ("allocating_kv_cache", None),
        ("finishing_engine", None),
    ]


def test_a_load_on_a_gpu() -> None:
    assert read(ON_GPU) == [
        ("loading_weights", None),
        ("loading_weights", 0.25),
        ("profiling", None),
        ("compiling", None),
        ("allocating_kv_cache", None),
        ("capturing_graphs", 0.5),
        ("capturing_graphs", 1.0),
        ("finishing_engine", None),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "Multi-thread loading shards:  30% Completed | 3/10 [00:01<00:02]",
        "Multi-thread loading pt checkpoint shards:  30% Completed | 3/10 [00:01<00:02]",
        "Loading pt checkpoint shards:  30% Completed | 3/10 [00:01<00:02]",
    ],
)
def test_every_loader_tells_how_far_it_is(line: str) -> None:
    assert read(line) == [("loading_weights", 0.3)]


def test_another_rank_does_not_lead_back() -> None:
    late = f"{WORKER}[gpu_model_runner.py:1] Starting to load model /m..."
    assert [phase for phase, _ in read(f"{ON_GPU}\n{late}")][-1] == "finishing_engine"


def test_what_only_speaks_of_a_phase_is_none() -> None:
    """Among the arguments, or in a prompt that is logged."""
    assert (
        read("INFO 11-22 17:19:10 [utils.py:1] args: {'kv_cache_dtype': 'KV cache size: 1'}") == []
    )
    assert read("INFO 11-22 17:19:10 [x.py:1] Enforce eager set, disabling torch.compile") == []
