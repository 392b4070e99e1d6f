"""Every flag of `vllm serve`, and every variable that vLLM's API server reads: who takes it.

Data only. tests/test_vllm_flags.py compares it with the parser of the installed vLLM, and
`make test-matrix` with those of other supported versions: a flag that nobody has looked at fails
there, as does a row that no supported version has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

VERSIONS = tuple(f"0.{minor}" for minor in range(27, 34))  # the supported ones


class Taker(StrEnum):
    """Who acts on a flag or a variable."""

    ENGINE = "engine"  # vLLM's engine, by the configuration that is made of the namespace
    APP = "app"  # vLLM's FastAPI app, which is built from the same namespace
    SERVER = "server"  # our HTTP server, with the options that `vllm serve` would give to its own
    OURS = "ours"  # this package, which gives it the meaning that it has for `vllm serve`
    REFUSED = "refused"  # nobody here: an error that says so
    WITHOUT_EFFECT = "without effect"  # nobody here, and harmless: a warning that says so


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        name: without the dashes.
        switch: it takes no value.
        versions: the supported versions that have it.
    """

    name: str
    taker: Taker
    switch: bool
    versions: tuple[str, ...]


_VALUES: Mapping[Taker, str] = {
    Taker.ENGINE: """
        additional-config all2all-backend allowed-local-media-path allowed-media-domains
        attention-backend attention-config aux-output-config block-size code-revision
        collect-detailed-traces compilation-config config-format convert cp-kv-cache-interleave-size
        cpu-distributed-timeout-seconds cpu-offload-gb cpu-offload-params cudagraph-capture-sizes
        custom-histogram-buckets data-parallel-address data-parallel-backend data-parallel-rank
        data-parallel-rpc-port data-parallel-size data-parallel-size-local data-parallel-start-rank
        dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend
        dcp-kv-cache-interleave-size decode-context-parallel-size default-mm-loras device-ids
        diffusion-config distributed-executor-backend distributed-timeout-seconds download-dir
        dp-sync-interval dtype ec-manager-config ec-transfer-config elastic-ep-max-dp-size
        engram-config eplb-config expert-placement-strategy fault-tolerance-config
        gdn-prefill-backend generation-config gpu-memory-utilization hf-config-path hf-overrides
        hf-token ignore-patterns io-processor-plugin ir-op-priority jit-monitor-mode
        kda-decode-backend kda-prefill-backend kernel-config kv-cache-dtype
        kv-cache-dtype-skip-layers kv-cache-memory-bytes kv-cache-metrics-sample kv-events-config
        kv-offloading-backend kv-offloading-size kv-transfer-config limit-mm-per-prompt
        linear-backend load-format logits-processors logprobs-mode long-prefill-token-threshold
        lora-dtype lora-target-modules mamba-backend mamba-block-size mamba-cache-dtype
        mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm
        master-addr master-port max-cpu-loras max-cudagraph-capture-size max-logprobs
        max-lora-cls-labels max-lora-rank max-loras max-model-len max-num-active-seqs
        max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens max-num-scheduled-tokens
        max-num-seqs max-parallel-loading-workers media-io-kwargs mm-encoder-attn-backend
        mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
        mm-encoder-fp8-scale-save-path mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb
        mm-processor-cache-gb mm-processor-cache-type mm-processor-device mm-processor-kwargs
        mm-shm-cache-max-object-size-mb mm-tensor-ipc model model-class-overrides model-impl
        model-loader-extra-config moe-backend nnodes node-rank num-gpu-blocks-override
        numa-bind-cpus numa-bind-nodes offload-backend offload-group-size offload-num-in-group
        offload-params offload-prefetch-step optimization-level otlp-traces-endpoint
        override-attention-dtype override-generation-config per-request-spec-decode-metrics
        performance-mode pipeline-parallel-size pooler-config prefill-context-parallel-size
        prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo
        prefix-match-unit profiler-config pt-load-map-location quantization quantization-config
        reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers
        replayssm-buffer-len revision runner safetensors-load-strategy
        safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls
        scheduling-policy seed served-model-name show-hidden-metrics-for-version sleep-mode-backend
        sleep-preserve-parameter-names sparse-indexer-topk-backend spec-method spec-model
        spec-tokens speculative-config stream-interval structured-outputs-config
        tensor-parallel-size tokenizer tokenizer-mode tokenizer-revision ubatch-size
        video-pruning-method video-pruning-rate watchdog-config watermark watermark-config
        weight-transfer-config worker-cls worker-extension-cls
    """,
    Taker.APP: """
        allowed-headers allowed-methods allowed-origins anthropic-disabled-thinking-effort api-key
        chat-template chat-template-content-format cohere-format default-chat-template-kwargs
        fingerprint-mode fingerprint-value lora-modules max-log-len middleware reasoning-effort-map
        response-role root-path sse-keep-alive-interval tool-call-parser tool-parser-plugin
        tool-server tool-strict-level
    """,
    Taker.SERVER: """
        disable-access-log-for-endpoints h11-max-header-count h11-max-incomplete-event-size host
        port ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile uds uvicorn-log-level
    """,
    Taker.OURS: "config log-config-file log-level logging-config shutdown-timeout",
    Taker.REFUSED: """
        api-server-count data-parallel-supervisor-port dp-supervisor-probe-failure-threshold
        dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s grpc-port
    """,
}
_SWITCHES: Mapping[Taker, str] = {
    Taker.ENGINE: """
        aggregate-engine-logging allow-deprecated-quantization async-scheduling calculate-kv-scales
        cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb dcp-q-replicate
        disable-cascade-attn disable-chunked-mm-input disable-custom-all-reduce
        disable-hybrid-kv-cache-manager disable-log-stats disable-nccl-for-dp-synchronization
        disable-sliding-window enable-batch-sharded-sampling enable-bf16x3-router-gemm
        enable-chunked-prefill enable-cumem-allocator enable-dbo enable-elastic-ep
        enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
        enable-flashinfer-autotune enable-hc-sp enable-layerwise-nvtx-tracing enable-log-requests
        enable-logging-iteration-details enable-lora enable-mamba-cache-stochastic-rounding
        enable-mamba-fine-grained-prefix-cache enable-mamba-shared-prefix-checkpoint
        enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras
        enable-nccl-comm-suspend enable-prefix-caching enable-prompt-embeds
        enable-return-routed-experts enable-shm-tensor-arena enable-sleep-mode
        enable-tower-connector-lora enable-trace-replay enforce-eager fail-on-environ-validation
        fully-sharded-loras interleave-mm-strings jit-monitor-verbose kv-cache-metrics
        kv-sharing-fast-prefill language-model-only long-prefill-token-threshold-adaptive
        mm-device-do-normalize mm-encoder-only monokernel numa-bind ray-workers-use-nsight
        return-sampling-mask scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init
        sleep-mode-offload-cudagraph specialize-active-lora swa-bounded-replay trust-remote-code
        use-fp64-gumbel use-replayssm use-tqdm-on-load
    """,
    Taker.APP: """
        allow-credentials cohere-is-reasoning-model disable-fastapi-docs enable-auto-tool-choice
        enable-flash-late-interaction enable-force-include-usage enable-log-deltas
        enable-log-outputs enable-offline-docs enable-per-request-metrics
        enable-prompt-tokens-details enable-request-id-headers enable-scale-out
        enable-server-load-tracking enable-tokenizer-info-endpoint
        exclude-tools-when-tool-choice-none log-error-stack return-tokens-as-token-ids tokens-only
        trust-request-chat-template trust-request-mm-kwargs
    """,
    Taker.SERVER: "disable-uvicorn-access-log enable-ssl-refresh",
    Taker.REFUSED: "data-parallel-multi-port-external-lb grpc headless",
}

# The versions of those that not every supported one has: first and last.
_VERSIONS = """
    anthropic-disabled-thinking-effort 0.31 0.33
    aux-output-config 0.31 0.33
    calculate-kv-scales 0.27 0.27
    custom-histogram-buckets 0.32 0.33
    dcp-q-replicate 0.29 0.33
    dp-sync-interval 0.30 0.33
    ec-manager-config 0.28 0.33
    elastic-ep-max-dp-size 0.30 0.33
    enable-batch-sharded-sampling 0.29 0.33
    enable-bf16x3-router-gemm 0.27 0.29
    enable-hc-sp 0.32 0.33
    enable-mamba-fine-grained-prefix-cache 0.30 0.30
    enable-mamba-shared-prefix-checkpoint 0.31 0.33
    enable-nccl-comm-suspend 0.30 0.33
    enable-scale-out 0.30 0.33
    enable-shm-tensor-arena 0.32 0.33
    enable-trace-replay 0.29 0.33
    engram-config 0.30 0.33
    grpc-port 0.32 0.33
    kda-decode-backend 0.30 0.33
    log-level 0.31 0.33
    logging-config 0.31 0.33
    long-prefill-token-threshold-adaptive 0.31 0.33
    max-lora-cls-labels 0.31 0.33
    max-num-active-seqs 0.31 0.33
    max-num-queued-reqs 0.29 0.33
    max-num-queued-tokens 0.29 0.33
    mm-device-do-normalize 0.28 0.33
    mm-processor-device 0.28 0.33
    monokernel 0.33 0.33
    override-attention-dtype 0.27 0.27
    per-request-spec-decode-metrics 0.29 0.33
    prefix-cache-retention-interval 0.29 0.33
    reasoning-effort-map 0.33 0.33
    return-sampling-mask 0.28 0.33
    sleep-mode-backend 0.33 0.33
    sleep-mode-offload-cudagraph 0.32 0.33
    sleep-preserve-parameter-names 0.31 0.33
    sparse-indexer-topk-backend 0.30 0.33
    sse-keep-alive-interval 0.29 0.33
    swa-bounded-replay 0.31 0.33
    tool-strict-level 0.31 0.33
    trust-request-mm-kwargs 0.31 0.33
    watchdog-config 0.33 0.33
    watermark-config 0.30 0.33
"""

# A second name that begins with two dashes; `--no-NAME` and `--disable-…` for `--enable-…` aside.
ALSO_CALLED = {"device-memory-utilization": "gpu-memory-utilization"}

SHORT: Mapping[str, str] = {
    "-ac": "attention-config",
    "-asc": "api-server-count",
    "-cc": "compilation-config",
    "-dc": "diffusion-config",
    "-dcp": "decode-context-parallel-size",
    "-dp": "data-parallel-size",
    "-dpa": "data-parallel-address",
    "-dpb": "data-parallel-backend",
    "-dpe": "data-parallel-external-lb",
    "-dph": "data-parallel-hybrid-lb",
    "-dpl": "data-parallel-size-local",
    "-dpm": "data-parallel-multi-port-external-lb",
    "-dpn": "data-parallel-rank",
    "-dpp": "data-parallel-rpc-port",
    "-dpr": "data-parallel-start-rank",
    "-ep": "enable-expert-parallel",
    "-n": "nnodes",
    "-pcp": "prefill-context-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-q": "quantization",
    "-r": "node-rank",
    "-sc": "speculative-config",
    "-tp": "tensor-parallel-size",
}


def _flags() -> Iterator[Flag]:
    span = {
        name: VERSIONS[VERSIONS.index(first) : VERSIONS.index(last) + 1]
        for name, first, last in (line.split() for line in _VERSIONS.split("\n") if line.strip())
    }
    for switch, table in ((False, _VALUES), (True, _SWITCHES)):
        for taker, names in table.items():
            for name in names.split():
                yield Flag(name, taker, switch, span.get(name, VERSIONS))


FLAGS: Mapping[str, Flag] = {flag.name: flag for flag in _flags()}


def find(flag: str) -> Flag | None:
    """The row of a flag as it is written (`--no-enable-lora`, `--max_model_len`, `-tp`); None for
    one that is not in the table."""
    if not flag.startswith("--"):
        return FLAGS.get(SHORT.get(flag, ""))
    name = flag.removeprefix("--").replace("_", "-").partition(".")[0]
    name = ALSO_CALLED.get(name, name)
    swapped = (
        name.removeprefix("no-"),
        name.replace("disable-", "enable-", 1),
        name.replace("enable-", "disable-", 1),
    )
    if name in FLAGS:
        return FLAGS[name]
    return next((FLAGS[n] for n in swapped if n in FLAGS and FLAGS[n].switch), None)


# Variables that vLLM's API server reads, in its entry points or for its logs. All others that vLLM
# has are the engine's, and are left to it.
_APP_VARIABLES = """
    EXA_API_KEY OPENAI_API_KEY VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_API_KEY
    VLLM_DEBUG_LOG_API_SERVER_RESPONSE VLLM_ENABLE_COHERE_API VLLM_ENABLE_RESPONSES_API_STORE
    VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS
    VLLM_LOG_STATS_INTERVAL VLLM_MAX_AUDIO_CLIP_FILESIZE_MB VLLM_MAX_AUDIO_DECODE_BYTES
    VLLM_MAX_AUDIO_DECODE_DURATION_S VLLM_MAX_AUDIO_PREPROCESS_WORKERS
    VLLM_MAX_COMPLETION_PROMPTS VLLM_MAX_N_SEQUENCES VLLM_MAX_STOP_STRINGS VLLM_MEDIA_CONNECTOR
    VLLM_MEDIA_URL_ALLOW_REDIRECTS VLLM_REQUEST_BODY_LOG_LEVEL VLLM_SERVER_DEV_MODE
    VLLM_SKIP_MODEL_NAME_VALIDATION VLLM_SYSTEM_START_DATE VLLM_TOOL_JSON_ERROR_AUTOMATIC_RETRY
    VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT VLLM_VIDEO_FETCH_TIMEOUT
"""
VARIABLES: Mapping[str, Taker] = {
    **dict.fromkeys(_APP_VARIABLES.split(), Taker.APP),
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": Taker.SERVER,
    "VLLM_CPU_KVCACHE_SPACE": Taker.ENGINE,
    # Whether this process forks or spawns is chosen with it; the value itself is the engine's.
    "VLLM_WORKER_MULTIPROC_METHOD": Taker.OURS,
    # Only what a dictConfig file says replaces our handlers; levels hold in either case.
    "VLLM_CONFIGURE_LOGGING": Taker.OURS,
    "VLLM_LOGGING_CONFIG_PATH": Taker.OURS,
    "VLLM_LOGGING_LEVEL": Taker.OURS,
    "VLLM_USE_RUST_FRONTEND": Taker.REFUSED,
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": Taker.WITHOUT_EFFECT,
    "VLLM_LOGGING_STREAM": Taker.WITHOUT_EFFECT,
    # How vLLM's own lines look, which the engine's processes still print.
    "VLLM_LOGGING_PREFIX": Taker.ENGINE,
    "VLLM_LOGGING_COLOR": Taker.ENGINE,
    "NO_COLOR": Taker.ENGINE,
    "FORCE_COLOR": Taker.ENGINE,
    # Of commands other than `serve`; the path and the logo have no meaning without what they
    # belong to, and vLLM itself warns about the path.
    "VLLM_USE_RUST_BENCH": Taker.ENGINE,
    "VLLM_RUST_FRONTEND_PATH": Taker.ENGINE,
    "VLLM_DISABLE_LOG_LOGO": Taker.ENGINE,
}

# What is logged as a warning where one of these is set to something.
WITHOUT_EFFECT: Mapping[str, str] = {
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "a dead engine is replaced, and the process ends with exit "
    "code 75 once no restart is left (restart.max)",
    "VLLM_LOGGING_STREAM": "all lines go to stderr; a file of --log-config-file or "
    "VLLM_LOGGING_CONFIG_PATH names other handlers",
}
