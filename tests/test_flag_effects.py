"""Each flag that the table gives to the app or to the server does something."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_uvicorn_server import Bench, run

from ichat_lifecycle.adapters import vllm_app
from ichat_lifecycle.adapters.logging_choice import configure
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments
from ichat_lifecycle.adapters.vllm_layout import Layout
from ichat_lifecycle.arguments import ParsedArguments, parse
from ichat_lifecycle.backend import Options, VLLMBackend
from ichat_lifecycle.cli import build_parser
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.vllm_flags import FLAGS, Taker

CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))
OTHER = str(Path(__file__).with_name("next_certificate.pem"))
TLS = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": CERTIFICATE}
# As vLLM's parser has them.
DEFAULTS: dict[str, Any] = {
    "host": None,
    "port": 8000,
    "uds": None,
    "uvicorn_log_level": "info",
    "disable_uvicorn_access_log": False,
    "disable_access_log_for_endpoints": None,
    "log_config_file": None,
    "ssl_keyfile": None,
    "ssl_certfile": None,
    "ssl_ca_certs": None,
    "enable_ssl_refresh": False,
    "ssl_cert_reqs": 0,
    "ssl_ciphers": None,
    "h11_max_incomplete_event_size": 4 * 2**20,
    "h11_max_header_count": 256,
    "root_path": None,
    "api_key": None,
}


class Refresher(SimpleNamespace):
    """vLLM's watcher of certificates."""


LAYOUT = Layout(
    "0",
    {
        "envs": SimpleNamespace(VLLM_HTTP_TIMEOUT_KEEP_ALIVE=5, VLLM_API_KEY=None),
        "ssl_refresher": Refresher,
    },
)


def flags(taker: Taker) -> set[str]:
    return {name for name, flag in FLAGS.items() if flag.taker is taker}


# --- the server


def options(args: Namespace) -> dict[str, Any]:
    choice = configure(args, None)
    return dict(vllm_app.uvicorn_options(LAYOUT, args, None, choice))


def address(args: Namespace) -> Any:
    """Where the socket is bound; see SocketBinder."""
    backend = VLLMBackend(Namespace(), ["m"], options=Options(defer_parsing=True))
    backend._arguments.parsed = ParsedArguments(args, None, {})
    return backend._address()


def config(args: Namespace) -> Any:
    """Uvicorn's configuration once it has loaded."""
    bench = Bench()
    bench.sock.close()
    return bench.server._config(_uvicorns(options(args)), bench.server._limits(None, None))


def _uvicorns(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if not name.startswith("h11_")}


def context(args: Namespace) -> ssl.SSLContext:
    found = config(args).ssl
    assert isinstance(found, ssl.SSLContext)
    return found


def fits(args: Namespace) -> bool:
    """Whether the key is that of the certificate."""
    try:
        return context(args) is not None
    except ArgumentsError:
        return False


def access_lines(path: str) -> Callable[[Namespace], bool]:
    """Whether a request for a path is logged."""

    def logged(args: Namespace) -> bool:
        config(args)
        logger = logging.getLogger("uvicorn.access")
        record = logger.makeRecord("", 20, "", 0, "", ("c", "GET", path, "1.1", 200), None)
        return bool(logger.hasHandlers() and logger.filter(record))

    return logged


def answer_to(head: bytes) -> Callable[[Namespace], bytes]:
    """The status of the answer to a request with such a head."""

    def ask(args: Namespace) -> bytes:
        lines: list[bytes] = []

        async def scenario(bench: Bench) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
            lines.append(await reader.readline())
            writer.close()
            await writer.wait_closed()

        run(scenario, **options(args))
        return lines[0].split(b" ")[1]

    return ask


def error_level(args: Namespace) -> int:
    config(args)
    return logging.getLogger("uvicorn.error").level


# The flag → what it is set to, with what else, and where that is seen.
SERVER: Mapping[str, tuple[dict[str, Any], Callable[[Namespace], Any]]] = {
    "host": ({"host": "127.0.0.2"}, address),
    "port": ({"port": 9}, address),
    "uds": ({"uds": "/run/a.sock"}, address),
    "uvicorn-log-level": ({"uvicorn_log_level": "error"}, error_level),
    "disable-uvicorn-access-log": ({"disable_uvicorn_access_log": True}, access_lines("/a")),
    "disable-access-log-for-endpoints": (
        {"disable_access_log_for_endpoints": "/health,/a"},
        access_lines("/a"),
    ),
    "ssl-keyfile": ({"ssl_keyfile": OTHER}, fits),
    "ssl-certfile": ({"ssl_certfile": CERTIFICATE}, fits),
    "ssl-ca-certs": ({"ssl_ca_certs": OTHER}, lambda args: context(args).cert_store_stats()),
    "ssl-cert-reqs": ({"ssl_cert_reqs": 2}, lambda args: context(args).verify_mode),
    "ssl-ciphers": (
        {"ssl_ciphers": "ECDHE-RSA-AES256-GCM-SHA384"},
        lambda args: [cipher["name"] for cipher in context(args).get_ciphers()],
    ),
    "enable-ssl-refresh": (
        {"enable_ssl_refresh": True},
        lambda args: type(vllm_app.ssl_refresher(LAYOUT, args, config(args))),
    ),
    "h11-max-header-count": ({"h11_max_header_count": 3}, answer_to(b"A: b\r\n" * 10)),
    "h11-max-incomplete-event-size": (
        {"h11_max_incomplete_event_size": 500},
        answer_to(b"A: " + b"b" * 2**20 + b"\r\n"),  # more than is read at a time
    ),
}


@pytest.fixture(autouse=True)
def uvicorns_loggers_are_put_back() -> Iterator[None]:
    loggers = [logging.getLogger(f"uvicorn{name}") for name in ("", ".error", ".access", ".asgi")]
    before = [(lg, lg.level, lg.handlers[:], lg.propagate, lg.filters[:]) for lg in loggers]
    yield
    for lg, level, handlers, propagate, filters in before:
        lg.setLevel(level)
        lg.handlers[:], lg.propagate, lg.filters[:] = handlers, propagate, filters


def test_a_certificate_with_its_key_is_tls() -> None:
    """So Uvicorn has it. Who looks at the port from outside has to speak the same."""
    assert not address(Namespace(**DEFAULTS)).tls
    assert address(Namespace(**{**DEFAULTS, "ssl_certfile": CERTIFICATE})).tls
    assert address(Namespace(**{**DEFAULTS, **TLS})).tls


def test_the_refresher_watches_a_certificate_with_its_key() -> None:
    """vLLM's own watches nothing where no file of a key is given."""
    args = Namespace(**{**DEFAULTS, "ssl_certfile": CERTIFICATE, "enable_ssl_refresh": True})
    found = vllm_app.ssl_refresher(LAYOUT, args, config(args))
    assert found is not None
    assert (found.cert_path, found.key_path) == (CERTIFICATE, CERTIFICATE)


def test_the_servers_flags_are_all_tried() -> None:
    assert set(SERVER) == flags(Taker.SERVER)


@pytest.mark.parametrize("flag", SERVER)
def test_a_flag_of_the_server_has_its_effect(flag: str) -> None:
    values, seen = SERVER[flag]
    base = dict(DEFAULTS)
    if flag.startswith(("ssl-", "enable-ssl")):
        base |= {name: value for name, value in TLS.items() if name not in values}
    assert seen(Namespace(**base)) != seen(Namespace(**{**base, **values}))


# --- the app


class Engine:
    """An engine that is up."""

    tasks = ("generate",)
    client = SimpleNamespace(model_config="a configuration")

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace


def test_the_app_is_built_of_its_engines_own_namespace() -> None:
    """And so is its state: whatever vLLM reads there is what the user gave."""
    given, seen = Namespace(), []

    def build_app(args: Namespace, supported_tasks: Any, model_config: Any) -> Any:
        seen.append((args, supported_tasks, model_config))
        return SimpleNamespace(state=SimpleNamespace(), build_middleware_stack=lambda: None)

    async def init_app_state(client: Any, state: Any, args: Namespace, tasks: Any) -> None:
        seen.append((args, tasks, client.model_config))

    layout = Layout("0", {"build_app": build_app, "init_app_state": init_app_state})
    engine: Any = Engine(given)
    builder = vllm_app.VllmAppBuilder(engine, lambda: layout, lambda fault: None)
    asyncio.run(builder.build())
    assert [args is given for args, *_ in seen] == [True, True]
    assert seen[0][1:] == seen[1][1:] == (("generate",), "a configuration")


PLUGIN = "a_tool_parser_of_the_tests"
# The flag → words that give it another value than its default. Only what the namespace has matters
# here, so all of them are given together, with whatever they would mean to each other.
GIVEN: Mapping[str, list[str]] = {
    "allow-credentials": ["--allow-credentials"],
    "allowed-headers": ["--allowed-headers", '["X-C"]'],
    "allowed-methods": ["--allowed-methods", '["PUT"]'],
    "allowed-origins": ["--allowed-origins", '["http://a"]'],
    "anthropic-disabled-thinking-effort": ["--anthropic-disabled-thinking-effort", "low"],
    "api-key": ["--api-key", "one", "another"],
    "chat-template": ["--chat-template", "{{ messages }}"],  # as text, so that no file is needed
    "chat-template-content-format": ["--chat-template-content-format", "openai"],
    "cohere-format": ["--cohere-format", "cmd3"],
    "cohere-is-reasoning-model": ["--no-cohere-is-reasoning-model"],
    "default-chat-template-kwargs": ["--default-chat-template-kwargs", '{"a": false}'],
    "disable-fastapi-docs": ["--disable-fastapi-docs"],
    "enable-auto-tool-choice": ["--enable-auto-tool-choice"],
    "enable-flash-late-interaction": ["--no-enable-flash-late-interaction"],
    "enable-force-include-usage": ["--enable-force-include-usage"],
    "enable-log-deltas": ["--no-enable-log-deltas"],
    "enable-log-outputs": ["--enable-log-outputs", "--enable-log-requests"],  # wants that one
    "enable-offline-docs": ["--enable-offline-docs"],
    "enable-per-request-metrics": ["--enable-per-request-metrics"],
    "enable-prompt-tokens-details": ["--enable-prompt-tokens-details"],
    "enable-request-id-headers": ["--enable-request-id-headers"],
    "enable-scale-out": ["--enable-scale-out"],
    "enable-server-load-tracking": ["--enable-server-load-tracking"],
    "enable-tokenizer-info-endpoint": ["--enable-tokenizer-info-endpoint"],
    "exclude-tools-when-tool-choice-none": ["--exclude-tools-when-tool-choice-none"],
    "fingerprint-mode": ["--fingerprint-mode", "custom"],
    "fingerprint-value": ["--fingerprint-value", "mine"],
    "log-error-stack": ["--log-error-stack"],
    "lora-modules": ["--lora-modules", "mine=/adapters/mine", '{"name": "b", "path": "/b"}'],
    "max-log-len": ["--max-log-len", "10"],
    "middleware": ["--middleware", f"{__name__}.teapot", "--middleware", f"{__name__}.other"],
    "reasoning-effort-map": ["--reasoning-effort-map", '{"high": "max"}'],  # of 0.33: not run here
    "response-role": ["--response-role", "bot"],
    "return-tokens-as-token-ids": ["--return-tokens-as-token-ids"],
    "root-path": ["--root-path", "/api"],
    "sse-keep-alive-interval": ["--sse-keep-alive-interval", "5"],
    "tokens-only": ["--tokens-only"],
    "tool-call-parser": ["--tool-call-parser", "hermes"],  # one of vLLM's, as is validated
    "tool-parser-plugin": ["--tool-parser-plugin", PLUGIN],  # a module, and imported
    "tool-server": ["--tool-server", "127.0.0.1:1"],
    "tool-strict-level": ["--tool-strict-level", "function"],
    "trust-request-chat-template": ["--trust-request-chat-template"],
    "trust-request-mm-kwargs": ["--trust-request-mm-kwargs"],
}


def test_the_apps_flags_are_all_given() -> None:
    """A new one fails here until somebody has looked what it does."""
    assert set(GIVEN) == flags(Taker.APP)


@pytest.fixture(scope="module")
def sources() -> str:
    """The text of vLLM's entry points."""
    import vllm

    root = Path(vllm.__file__).parent / "entrypoints"
    files = root.rglob("*.py")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.fixture(scope="module")
def version() -> str:
    import vllm

    return ".".join(vllm.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def handed_over(version: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Namespace]:
    """What vLLM's functions get of an engine for which `serve` was called with all of these words.

    All of it is ours and vLLM's but the two functions, and the load of the engine itself.
    """
    given = [w for name, words in GIVEN.items() if version in FLAGS[name].versions for w in words]
    seen: dict[str, Namespace] = {}

    def build_app(args: Namespace, supported_tasks: Any, model_config: Any) -> Any:
        seen["build_app"] = args
        return SimpleNamespace(state=SimpleNamespace(), build_middleware_stack=lambda: None)

    async def init_app_state(client: Any, state: Any, args: Namespace, tasks: Any) -> None:
        seen["init_app_state"] = args

    with pytest.MonkeyPatch.context() as patch:
        plugin = tmp_path_factory.mktemp("plugins") / f"{PLUGIN}.py"
        plugin.write_text("# registers nothing")
        patch.syspath_prepend(plugin.parent)
        ours, theirs = build_parser().parse_known_args(["serve", "m", *given])
        arguments = VllmArguments(ours, theirs)
        arguments.parsed = arguments.parse_now()
    layout = arguments.layout
    assert layout is not None
    spies = {"build_app": build_app, "init_app_state": init_app_state}
    engine: Any = Engine(arguments.for_engine())  # as VllmEngine takes it for each load
    watched = Layout(layout.version, {**layout.functions, **spies})
    asyncio.run(vllm_app.VllmAppBuilder(engine, lambda: watched, lambda fault: None).build())
    return seen


@pytest.mark.engine
@pytest.mark.parametrize("flag", GIVEN)
def test_a_flag_of_the_app_arrives_there(
    flag: str, version: str, handed_over: dict[str, Namespace]
) -> None:
    """With the value that vLLM's own parser makes of the same words, and not with the default."""
    from test_arguments import vllm_parser

    if version not in FLAGS[flag].versions:
        pytest.skip(f"vLLM {version} has no --{flag}")
    dest = flag.replace("-", "_")
    meant, default = (vllm_parser().parse_args(["m", *words]) for words in (GIVEN[flag], []))
    assert getattr(meant, dest) != getattr(default, dest)
    for taker in ("build_app", "init_app_state"):
        assert getattr(handed_over[taker], dest) == getattr(meant, dest), taker


@pytest.mark.engine
def test_the_apps_flags_are_read_by_vllms_app(sources: str, version: str) -> None:
    """So the namespace's value is their effect."""
    for name in flags(Taker.APP):
        dest = name.replace("-", "_")
        if version in FLAGS[name].versions:
            assert re.search(rf'args\.{dest}\b|args, "{dest}"', sources), name


def app_of(argv: list[str]) -> Any:
    """vLLM's own app for arguments, without an engine."""
    from starlette.testclient import TestClient
    from test_arguments import vllm_parser

    try:
        from vllm.entrypoints.launchers.app import build_app
    except ImportError:
        from vllm.entrypoints.openai.api_server import build_app
    namespace = parse(Namespace(), ["m", *argv], vllm_parser()).vllm
    app = build_app(namespace, ("generate",), None)
    return TestClient(app, raise_server_exceptions=False)


def status(path: str) -> Callable[[Any], int]:
    return lambda client: int(client.get(path).status_code)


def preflight(header: str) -> Callable[[Any], str | None]:
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "GET"}
    asked["Access-Control-Request-Headers"] = "X-B"

    def ask(client: Any) -> str | None:
        found: str | None = client.options("/version", headers=asked).headers.get(header)
        return found

    return ask


ORIGIN = ["--allowed-origins", '["http://a"]']
APP: Mapping[str, tuple[list[str], list[str], Callable[[Any], Any]]] = {
    "root-path": ([], ["--root-path", "/api"], status("/api/version")),
    "api-key": ([], ["--api-key", "k"], status("/v1/none")),
    "enable-request-id-headers": (
        [],
        ["--enable-request-id-headers"],
        lambda client: "x-request-id" in client.get("/version").headers,
    ),
    "disable-fastapi-docs": ([], ["--disable-fastapi-docs"], status("/openapi.json")),
    "enable-offline-docs": ([], ["--enable-offline-docs"], lambda c: c.get("/docs").text),
    "allowed-origins": ([], ORIGIN, preflight("access-control-allow-origin")),
    "allowed-methods": (
        ORIGIN,
        ["--allowed-methods", '["PUT"]'],
        preflight("access-control-allow-methods"),
    ),
    "allowed-headers": (
        ORIGIN,
        ["--allowed-headers", '["X-C"]'],
        preflight("access-control-allow-headers"),
    ),
    "allow-credentials": (
        ORIGIN,
        ["--allow-credentials"],
        preflight("access-control-allow-credentials"),
    ),
    "middleware": ([], ["--middleware", f"{__name__}.teapot"], status("/version")),
}


async def teapot(request: Any, call_next: Any) -> Any:
    """A middleware of the user's."""
    from starlette.responses import PlainTextResponse

    return PlainTextResponse("short and stout", 418)


@pytest.mark.engine
@pytest.mark.parametrize("flag", APP)
def test_a_flag_of_the_app_has_its_effect(flag: str) -> None:
    base, words, seen = APP[flag]
    assert seen(app_of(base)) != seen(app_of([*base, *words]))


@pytest.mark.engine
def test_the_gate_takes_the_root_path_as_the_app_does() -> None:
    """vLLM's app answers with the prefix and without it: so both have to be guarded."""
    client = app_of(["--root-path", "/api"])
    assert status("/api/version")(client) == status("/version")(client) == 200
