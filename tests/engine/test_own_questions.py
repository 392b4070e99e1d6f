"""A worker whose clients are let in by what the worker itself does not have, on the real engine."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import httpx
import pytest
from harness import wait_for, worker

pytestmark = pytest.mark.engine

CERTIFICATE = str(Path(__file__).parent.parent / "certificate.pem")
MIDDLEWARE = """
from starlette.responses import JSONResponse

class WantsTeam:
    def __init__(self, app):
        self.app = app
    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and not any(key == b"x-team" for key, _ in scope["headers"]):
            return await JSONResponse({"error": "which team?"}, 401)(scope, receive, send)
        await self.app(scope, receive, send)

async def refuse_guests(request, call_next):
    if request.headers.get("x-team") == "guests":
        return JSONResponse({"error": "not for guests"}, 403)
    return await call_next(request)
"""


def test_ready_behind_client_certificates_middleware_and_a_template_that_cannot_render(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "at_the_door.py").write_text(MIDDLEWARE)
    template = tmp_path / "refuses.jinja"
    template.write_text("{{ raise_exception('no chats here') }}")
    tls = {"certfile": CERTIFICATE, "ca-certs": CERTIFICATE}  # the key is in the same file
    with worker(
        *("--model-path", model, "--served-model-name", "demo"),
        *(word for name, path in tls.items() for word in (f"--ssl-{name}", path)),
        *("--ssl-cert-reqs", "2", "--api-key", "one", "another"),
        *("--middleware", "at_the_door.WantsTeam", "--middleware", "at_the_door.refuse_guests"),
        *("--chat-template", str(template)),
        *("--set", "warm_up.extra=[{path: /v1/completions, body: {prompt: Hi, max_tokens: 1}}]"),
        PYTHONPATH=str(tmp_path),
    ) as served:
        served.wait_for_state("READY")
        (warning,) = served.get("/lifecycle").json()["warnings"]
        assert (warning["code"], warning["root_cause"]) == ("chat_template_broken", "no chats here")

        context = ssl.create_default_context(cafile=CERTIFICATE)
        context.load_cert_chain(CERTIFICATE)
        headers = {"Authorization": "Bearer another", "x-team": "research"}
        url = f"https://127.0.0.1:{served.port}/v1/completions"
        body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
        with httpx.Client(verify=context, timeout=60) as client:
            assert client.post(url, json=body, headers=headers).status_code == 200
            assert client.post(url, json=body).status_code == 401
        lines = served.log.read_text()
        assert '"event": "ready"' in lines
        assert f"https://127.0.0.1:{served.port}/v1" in lines

        served.signal()
        assert served.wait() == 0
        assert '"event": "ended"' in served.log.read_text()


def test_an_engine_without_a_tokenizer_is_asked_by_ids_and_its_hang_is_found(
    model: str,
) -> None:
    """By text each question is a 400, which vLLM's API gives over a stuck engine as well."""
    with worker(
        *("--model-path", model, "--served-model-name", "demo"),
        "--skip-tokenizer-init",
        *("--set", "health.token_interval=1", "--set", "health.timeout=4"),
    ) as served:
        served.wait_for_state("READY")
        wait_for(
            lambda: any(
                verdict["progressed"]
                for verdict in served.get("/lifecycle/history").json()["verdicts"]
            ),
            "a token that the watchdog has asked for",
        )
        assert "token_refused" not in served.log.read_text()
        (stuck,) = served.engine_pids("Worker")[:1]
        stuck.send_signal(signal.SIGSTOP)
        served.wait_for_state("DEGRADED")
        assert served.get("/lifecycle").json()["reason"]["code"] == "engine_unresponsive"
        stuck.send_signal(signal.SIGCONT)
        served.wait_for_state("READY")
        served.signal()
        assert served.wait() == 0
