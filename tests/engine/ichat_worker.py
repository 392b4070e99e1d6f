"""An iChat worker as it was before this package, with a ticker that measures its event loop.

Run by test_ichat_worker.py. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
from typing import Any

import httpx

from ichat_lifecycle import VLLMBackend


async def tick(worst: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(0.01)
        worst[0] = max(worst[0], loop.time() - before - 0.01)


async def one_life(framework: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    ready, worst = asyncio.Event(), [0.0]
    backend = VLLMBackend(framework, argv, ready)
    ticker = asyncio.create_task(tick(worst))
    task = asyncio.create_task(backend.run())
    await asyncio.wait(
        {task, asyncio.create_task(backend.wait_for_server_ready())},
        return_when=asyncio.FIRST_COMPLETED,
    )
    seen: dict[str, Any] = {
        "ready": ready.is_set() and backend.is_server_ready() and backend.server_ready is ready,
        "max_model_len": backend.get_backend_args().max_model_len,
        "worst_lag_s": round(worst[0], 3),
    }
    async with httpx.AsyncClient(base_url=f"http://[::1]:{framework.port}") as client:
        body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
        seen["status"] = (await client.post("/v1/completions", json=body, timeout=60)).status_code
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    backend.cleanup()
    ticker.cancel()
    await asyncio.sleep(0)
    own = asyncio.current_task()
    seen |= {
        "cancelled": task.cancelled(),
        "ready_after": ready.is_set(),
        "state": backend.lifecycle.snapshot.state.value,
        "tasks": [t.get_name() for t in asyncio.all_tasks() if t is not own and not t.done()],
        "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread()],
    }
    return seen


async def main() -> list[dict[str, Any]]:
    model, port = sys.argv[1], int(sys.argv[2])
    framework = argparse.Namespace(
        host="::1",
        port=port,
        served_model_name="demo",
        model_path=model,
        gpu_ids=[0],
        control_port=0,
    )
    # An iChat worker repeats its own arguments here.
    argv = ["--host", "::1", "--port", str(port), "--served-model-name", "demo"]
    argv += ["--model-path", model, "--gpu-ids", "[0]", "--context-length", "512"]
    argv += ["--enforce-eager", "--dtype", "bfloat16"]
    return [await one_life(framework, list(argv)) for _ in range(2)]


if __name__ == "__main__":
    print("RESULT " + json.dumps(asyncio.run(main())), flush=True)
