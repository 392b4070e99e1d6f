"""GPUs: how they are named, and how many of them a worker's arguments ask for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

# A number counts the devices that the driver shows. The others are what `nvidia-smi -L` and
# `rocm-smi` print; the driver also takes the beginning of one, if that is unique.
GpuId = int | str

UUID = r"(GPU|MIG)-[0-9A-Za-z][0-9A-Za-z/_-]*"
NUMBER_MAX = 1023  # more than any machine has
_HINT = "GPU numbers or UUIDs, all different, such as [0,1] or 0,1 or GPU-8932f937"

# What multiplies to the number of processes with a GPU each, and what these are spread over.
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
_ELSEWHERE = ("ray", "external_launcher")  # executors whose processes others place


def parse_gpu_ids(value: Any) -> tuple[GpuId, ...]:
    """Device names in the order given; an empty list means no GPU.

    Args:
        value: a list; or text, as JSON or with commas or spaces between the names.

    Raises:
        ValueError: it is something else, or names a device twice; the message says what is wanted.
    """
    try:
        found = tuple(_gpu_id(item) for item in _items(value))
    except (ValueError, RecursionError):
        raise ValueError(f"expected {_HINT}") from None
    if len({str(one).lower() for one in found}) != len(found):
        raise ValueError(f"expected {_HINT}")
    return found


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        value = value.strip()
        value = json.loads(value) if value.startswith(("[", "{")) else re.split(r"[\s,]+", value)
    elif isinstance(value, int):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return value


def _gpu_id(item: object) -> GpuId:
    if isinstance(item, str):
        item = item.strip()
        if re.fullmatch(UUID, item):
            return item
        if item.isascii() and item.isdecimal():
            item = int(item)
    if isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= NUMBER_MAX:
        return item
    raise ValueError(item)


def gpus_needed(value_of: Callable[[str], Any]) -> tuple[int, str] | None:
    """How many GPUs of this machine vLLM's arguments ask for, and by which sizes.

    Args:
        value_of: the value of a flag by its name with underscores, as a number or as text; None
            where it is not given.

    Returns:
        None where it is not known: a size is not a number, or others place the processes.
    """
    if str(value_of("distributed_executor_backend")) in _ELSEWHERE:
        return None
    if str(value_of("data_parallel_backend")) in _ELSEWHERE:
        return None
    try:
        sizes = {name: _size(value_of(name)) for name in _SIZES}
        nodes = _size(value_of("nnodes"))
        replicas = _size(value_of("data_parallel_size"))
        local = value_of("data_parallel_size_local")
        # One rank, where others balance the load between this process and its peers.
        alone = value_of("data_parallel_rank") is not None
        sizes["data_parallel_size"] = 1 if alone else replicas if local is None else _size(local)
    except ValueError:
        return None
    needed = -(-math.prod(sizes.values()) // nodes)  # exact, however large they are
    return needed, " times ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)


def _size(value: Any) -> int:
    size = 1 if value is None else int(str(value))
    if size < 1:
        raise ValueError(value)
    return size
