"""What may stand in configs.yaml: iChat's `server_settings` and `managed_workers`, and our `fleet`.

A worker's keys that are not listed here are arguments of vLLM (see argv).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from ichat_lifecycle.adapters.advertise import advertisable
from ichat_lifecycle.adapters.parent import SUPERVISOR_VARIABLE
from ichat_lifecycle.adapters.sd_notify import (
    SOCKET_VARIABLE,
    WATCHDOG_PID_VARIABLE,
    WATCHDOG_VARIABLE,
)
from ichat_lifecycle.adapters.sockets import UDS_PATH_MAX
from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.config import WINDOW_MIN, HostList, Period, Seconds, off_or_from
from ichat_lifecycle.fleet.ports import Listener
from ichat_lifecycle.gpus import UUID, GpuId, parse_gpu_ids
from ichat_lifecycle.slept import LAG_S

PORT_MAX = 65_535
CONTROL_OFFSET = 10_000
DEFAULT_GATEWAY_PORT = 4000


def _number(value: Any) -> Any:
    """A number that stands in quotes, as a variable has to in `{…}`; not 010, which has two."""
    is_number = isinstance(value, str) and re.fullmatch("0|[1-9][0-9]*", value)
    return int(value) if is_number else value


Port = Annotated[int, Field(ge=1, le=PORT_MAX, strict=True), BeforeValidator(_number)]
AnyPort = Annotated[int, Field(ge=0, le=PORT_MAX, strict=True), BeforeValidator(_number)]
# Characters. Linux has 4096 for a path and 255 for a host; names are parts of paths and of lines.
NAME_MAX, PATH_MAX, HOST_MAX, MODEL_NAME_MAX, ADDRESS_MAX = 100, 4095, 255, 1000, 2000
PARALLEL_MAX = 1000
TOKENS_MAX = 2**31 - 1
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _one_line(text: str) -> str:
    found = _CONTROL.search(text)
    if found:
        raise ValueError(f"character {found.start() + 1} is a control character")
    return text


_LINE = AfterValidator(_one_line)
Name = Annotated[str, Field(max_length=NAME_MAX), _LINE]
Host = Annotated[str, Field(max_length=HOST_MAX), _LINE]
PathName = Annotated[str, Field(min_length=1, max_length=PATH_MAX), _LINE]
ModelName = Annotated[str, Field(min_length=1, max_length=MODEL_NAME_MAX), _LINE]
GatewayAddress = Annotated[str, Field(max_length=ADDRESS_MAX), _LINE]


def _socket_path(path: str) -> str:
    if len(path.encode()) > UDS_PATH_MAX:
        raise ValueError(f"the path of a Unix socket has at most {UDS_PATH_MAX} bytes")
    return path


SocketPath = Annotated[str, AfterValidator(_socket_path), _LINE]
_ONE_GPU = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": UUID}]}
GpuIds = Annotated[
    list[GpuId],
    BeforeValidator(lambda value: list(parse_gpu_ids(value))),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _ONE_GPU}, *_ONE_GPU["anyOf"]]}),
]
# What the supervisor sets for each worker, or keeps for itself.
OWN_VARIABLES = (
    SOCKET_VARIABLE,
    WATCHDOG_VARIABLE,
    WATCHDOG_PID_VARIABLE,
    SUPERVISOR_VARIABLE,
    FLEET_TOKEN_VARIABLE,
)


def _free_variable(name: str) -> str:
    if name in OWN_VARIABLES:
        raise ValueError("the supervisor sets this variable itself")
    return name


Variables = dict[
    Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_free_variable)], str
]


class _Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ServerSettings(BaseModel):
    """iChat's Gateway. It has keys of its own that are nobody's business here."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    host: Host = Field("0.0.0.0", description="where the Gateway listens")
    port: Port = Field(DEFAULT_GATEWAY_PORT, description="where the Gateway listens")
    log_level: Name = Field("info", description="the Gateway's, and its workers'")
    heartbeat_timeout: Seconds = Field(
        30, gt=0, description="after which the Gateway takes a silent worker for dead"
    )
    gateway_address: GatewayAddress | None = Field(
        None, description="of a Gateway that runs: every worker registers there"
    )


class CrashLoop(_Strict):
    """When a worker that ends again and again is given up."""

    backoff: Period = Field(1, description="before the second start; then it doubles")
    backoff_max: Period = Field(60, description="what it doubles up to")
    max: int = Field(
        5, ge=1, le=1000, description="ends within the window after which it is given up"
    )
    window: Seconds = Field(600, ge=WINDOW_MIN, description="in which ends count")


class FleetSettings(_Strict):
    """The supervisor."""

    host: Host = Field("127.0.0.1", description="where it listens")
    port: AnyPort | None = Field(
        None,
        description="default: the Gateway's port + 10000, or any free one where that is taken; "
        "0: any free one",
    )
    uds: SocketPath | None = Field(None, description="a Unix socket instead of host and port")
    hosts: HostList = Field(
        (),
        description="names besides localhost that a request's Host may have; '*': any name",
    )
    token: str | None = Field(None, description="what changes something has to show it")
    max_parallel_starts: int = Field(
        2, ge=1, le=PARALLEL_MAX, description="workers that load at the same time"
    )
    # A pause of the supervisor itself is told from a silence by its length.
    watchdog: Annotated[Seconds, off_or_from(LAG_S)] = Field(
        60, ge=0, description="a worker that tells nothing for so long is killed; 0: none is"
    )
    restart: CrashLoop = CrashLoop()


class WorkerConfig(BaseModel):
    """One worker."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str | None = Field(
        None,
        max_length=NAME_MAX,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="what it is called in the fleet; default: model_name",
    )
    model_name: ModelName = Field(description="what requests call the model")
    model_path: PathName = Field(description="a local directory, or ORG/NAME of a hub")
    backend: Literal["vllm"] = Field("vllm", description="the only one there is")
    host: Host = Field("127.0.0.1", description="where its main port listens")
    port: Port = Field(description="its main port")
    control_host: Host = Field("127.0.0.1", description="where its control plane listens")
    control_port: AnyPort | None = Field(
        None,
        description="default: port + 10000, or any free one where that is taken; 0: any free one",
    )
    gpu_ids: GpuIds | None = Field(
        None, description="the GPUs it sees, by number or UUID; default: all"
    )
    share_gpus: bool = Field(False, description="it may share them whatever the memory adds up to")
    tokenizer_path: PathName | None = Field(None, description="default: the model's own")
    context_length: int | None = Field(
        None, ge=1, le=TOKENS_MAX, description="tokens; vLLM's --max-model-len"
    )
    gateway_address: GatewayAddress | None = Field(
        None, description="default: that of server_settings"
    )
    worker_id: Name | None = Field(None, description="default: the host's name and its own")
    advertise_host: Annotated[Host, AfterValidator(advertisable)] | None = Field(
        None,
        description="where the Gateway reaches it; default: host, or the address of the interface "
        "that leads to the Gateway",
    )
    advertise_port: Port | None = Field(None, description="default: port")
    heartbeat_interval: Period = Field(10, description="between two heartbeats")
    lifecycle: dict[str, Any] = Field({}, description="deadlines and budgets of this worker")
    env: Variables = Field({}, description="its environment, besides the supervisor's")
    replace: Literal["after", "before"] = Field(
        "after",
        description="on a change: start the new one after the old one has ended, or have it READY "
        "before that (both need room at the same time)",
    )

    @property
    def shown_name(self) -> str:
        """What it is called in the fleet: a part of paths."""
        plain = re.sub(r"[^\w.-]+", "-", self.model_name).lstrip("-.")
        return self.name or plain[:NAME_MAX] or "model"

    @property
    def vllm(self) -> Mapping[str, Any]:
        """The keys that are vLLM's."""
        return self.model_extra or {}

    @property
    def control(self) -> Listener:
        """Where its control plane listens, unless that is taken; port 0 is any free one."""
        wanted = self.control_port
        if wanted is None:
            wanted = 0 if "uds" in self.vllm else self.port + CONTROL_OFFSET
        return Listener(self.control_host, wanted if wanted <= PORT_MAX else 0)
