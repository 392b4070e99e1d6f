"""Variables that we or a library of ours read: what they are allowed to be."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from ichat_lifecycle import environment
from ichat_lifecycle.adapters import vllm_environment
from ichat_lifecycle.adapters.proxies import proxy_for
from ichat_lifecycle.adapters.vllm_arguments import VllmArguments
from ichat_lifecycle.config import TOKEN_VARIABLE
from ichat_lifecycle.credentials import check_flags, header_value
from ichat_lifecycle.errors import ArgumentsError, ExitCode
from ichat_lifecycle.redact import Secrets


def events_of(notes: tuple[environment.Note, ...]) -> list[str]:
    with structlog.testing.capture_logs() as logged:
        environment.log_all(notes)
    return [entry["event"] for entry in logged]


# Keys and tokens


@pytest.mark.parametrize("text", ["s3cret", "two words", "a~!@#$%^&*()_+", ""])
def test_a_key_that_fits_a_header_stays(text: str) -> None:
    assert header_value("KEY", text) == text


@pytest.mark.parametrize("text", ["s3cret\n", " s3cret", "s3cret\r\n", "\ts3cret  \n\n", "s3cret "])
def test_white_space_around_a_key_is_stripped(text: str) -> None:
    assert header_value("KEY", text) == "s3cret"


@pytest.mark.parametrize("text", ["ключ", "schlüssel", "a\nb", "a\tb", "a\0b", "a\x7fb", "\n", " "])
def test_a_key_that_no_header_can_have_is_refused_by_its_name_and_not_shown(text: str) -> None:
    with pytest.raises(ArgumentsError, match="THE_KEY") as caught:
        header_value("THE_KEY", text)
    assert caught.value.exit_code == ExitCode.BAD_ARGUMENTS
    assert not text.strip() or text.strip() not in caught.value.line()


@pytest.mark.parametrize("name", [*environment.KEYS, *environment.HUB_KEYS])
def test_a_keys_variable_is_stripped_where_vllm_reads_it_itself(name: str) -> None:
    environ = {"HOME": "/root", name: "s3cret\n"}
    notes = environment.prepare(environ)
    assert environ[name] == "s3cret"
    assert "key_stripped" in events_of(notes)
    with pytest.raises(ArgumentsError, match=name):
        environment.prepare({"HOME": "/root", name: "ключ"})


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", "ключ"],
        ["--api-key=ключ"],
        ["--api_key", "fine", "ключ", "--port", "1"],
    ],
)
def test_the_keys_of_a_command_line_are_checked_before_the_import(argv: list[str]) -> None:
    with pytest.raises(ArgumentsError, match="--api-key"):
        check_flags(None, argv)
    with pytest.raises(ArgumentsError, match="--control-token"):
        check_flags("ключ", [])
    check_flags("fine", ["--api-key", "fine", "--served-model-name", "мост"])


def test_a_key_is_hidden_as_it_is_used() -> None:
    secrets = Secrets()
    secrets.collect_environment({"VLLM_API_KEY": "s3cret-key\n"})
    assert secrets.scrub("Bearer s3cret-key!") == "Bearer ***!"


def test_the_token_of_a_control_plane_is_among_them() -> None:
    assert TOKEN_VARIABLE in environment.KEYS


# vLLM's own


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM whose package cannot be imported, as none may be to check its variables."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "envs.py").write_text(
        "import os\n"
        "def port():\n    return int(os.environ['VLLM_MASTER_PORT'])\n"
        "def costly():\n    import torch, vllm\n"
        "def odd():\n    raise KeyError('of its own')\n"
        "environment_variables = {'VLLM_MASTER_PORT': port, 'VLLM_COSTLY': costly,\n"
        "    'VLLM_ODD': odd, 'VLLM_API_KEY': lambda: int(os.environ['VLLM_API_KEY'])}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # its place would be asked for
    monkeypatch.setattr(vllm_environment, "_EXPENSIVE", ("vllm", "torch"))
    return package


@pytest.mark.parametrize("name", ["VLLM_PORT", "VLLM_MASTER_PORT"])
@pytest.mark.usefixtures("installed")
def test_a_link_to_a_service_is_named_with_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes sets NAME_PORT for each Service; one called `vllm` hits VLLM_PORT."""
    monkeypatch.setenv(name, "tcp://10.96.0.1:8000")
    with pytest.raises(ArgumentsError, match=name) as caught:
        vllm_environment.check({name: "tcp://10.96.0.1:8000"})
    assert caught.value.exit_code == ExitCode.BAD_ARGUMENTS
    assert "enableServiceLinks: false" in str(caught.value.hint)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["VLLM_PORT", "VLLM_MASTER_PORT"])
def test_so_is_one_that_a_fleet_gives_to_a_worker(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a program embeds the worker: with its arguments, before the import."""
    monkeypatch.setenv(name, "tcp://10.96.0.1:8000")
    with pytest.raises(ArgumentsError, match=f"{name}=tcp"):
        VllmArguments(Namespace(), ["m"]).parse_now()


@pytest.mark.usefixtures("installed")
def test_what_vllms_own_reader_refuses_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MASTER_PORT", "many")
    with pytest.raises(ArgumentsError, match="VLLM_MASTER_PORT=many"):
        vllm_environment.check({"VLLM_MASTER_PORT": "many"})
    monkeypatch.setenv("VLLM_MASTER_PORT", "29500")
    # A Service's other variables, and readers that need what is not imported yet.
    vllm_environment.check(
        {
            "VLLM_MASTER_PORT": "29500",
            "VLLM_SERVICE_HOST": "10.96.0.1",
            "VLLM_PORT_8000_TCP": "tcp://10.96.0.1:8000",
            "VLLM_COSTLY": "1",
            "VLLM_ODD": "1",
        }
    )


@pytest.mark.usefixtures("installed")
def test_a_secret_that_cannot_be_read_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with pytest.raises(ArgumentsError) as caught:
        vllm_environment.check({"VLLM_API_KEY": "s3cret"})
    assert "VLLM_API_KEY=***" in caught.value.message


def test_without_vllm_only_its_port_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    vllm_environment.check({"VLLM_USE_SOMETHING": "x", "VLLM_PORT": "8000"})
    with pytest.raises(ArgumentsError, match="VLLM_PORT=x"):
        vllm_environment.check({"VLLM_PORT": "x"})


# Libraries'


def test_a_variable_is_blamed_for_the_value_that_an_error_quotes() -> None:
    text = "ValueError: invalid literal for int() with base 10: 'soon'"
    assert environment.blamed(text, {"HF_HUB_ETAG_TIMEOUT": "soon"}) == "HF_HUB_ETAG_TIMEOUT"
    assert environment.blamed(text, {"A": "", "MY_TOKEN": "soon"}) is None


def test_a_locale_that_is_not_of_utf_8_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.prepare({}) == ()
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale: "GBK")
    with capture_logs() as logs:
        environment.log_all(environment.prepare({}))
    (log,) = logs
    assert (log["event"], log["encoding"]) == ("locale_not_utf8", "GBK")
    assert "PYTHONUTF8" in log["hint"]


def test_a_directory_for_metrics_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    name = environment.METRICS_DIRECTORY
    with pytest.raises(ArgumentsError, match=name):
        environment.prepare({"HOME": "/root", name: str(tmp_path / "none")})
    environment.prepare({"HOME": "/root", name: str(tmp_path)})


@pytest.mark.parametrize(
    "name", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
)
def test_certificates_that_are_not_there_are_told_by_name(name: str, tmp_path: Path) -> None:
    """A warning: a local model needs none."""
    with capture_logs() as logs:
        environment.log_all(environment.prepare({name: "/no/such"}))
    (log,) = logs
    assert (log["event"], log["name"], log["path"]) == ("certificates_unusable", name, "/no/such")
    assert log["hint"]
    assert environment.prepare({name: str(tmp_path)}) == ()
    assert environment.prepare({name: ""}) == ()
    if name == "SSL_CERT_DIR":
        assert environment.prepare({name: f"/no/such:{tmp_path}"}) == ()


def test_a_tmpdir_that_cannot_be_used_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {"HOME": "/root", "TMPDIR": str(tmp_path / "none")}
    assert events_of(environment.prepare(environ)) == ["tmpdir_unusable"]
    assert environment.prepare({"HOME": "/root", "TMPDIR": str(tmp_path)}) == ()


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        ("http://gateway:4000", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://gateway:4000", {"http_proxy": "p:1"}, "http://p:1"),
        (
            "https://gateway:4000",
            {"http_proxy": "http://p:1", "all_proxy": "http://q:1"},
            "http://q:1",
        ),
        ("http://gateway:4000", {}, None),
        ("http://127.0.0.1:4000", {"http_proxy": "http://p:1"}, None),
        ("http://[::1]:4000", {"http_proxy": "http://p:1"}, None),
        ("http://localhost:4000", {"all_proxy": "http://p:1"}, None),
        ("http://gw.svc:4000", {"http_proxy": "http://p:1", "no_proxy": "fd00::/8,.svc"}, None),
        ("http://gw:4000", {"http_proxy": "http://p:1", "no_proxy": "fd00::/8"}, "http://p:1"),
    ],
)
def test_the_proxy_to_a_gateway(
    url: str, variables: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url) == proxy


@pytest.mark.parametrize(
    ("address", "no_proxy", "direct"),
    [
        ("10.96.3.4:4000", "10.0.0.0/8,.svc", True),
        ("10.96.3.4:4000", "127.0.0.1 10.96.3.5/8", True),
        ("10.96.3.4:4000", "10.96.3.4:4000", True),
        ("10.96.3.4:4000", "10.96.3.4:80, 11.0.0.0/8, fd00::/8", False),
        ("10.96.3.4", "10.96.3.4:80", True),
        ("[fd00::1]:4000", "[fd00::1]", True),
        ("[fd00::1]:4000", "fd00::1", True),
        ("[fd00::1]:4000", "[fd00::1]:4000", True),
        ("[fd00::1]:4000", "[fd00::1]:80", False),
        ("[fd00::1]:4000", "fd00::/8", True),
        ("gw.svc:4000", "gw.svc:4000", True),
        ("gw.svc:4000", "gw.svc:80", False),
        ("a.gw.svc:4000", "SVC:4000", True),
        ("gw.corp:4000", "*.corp", True),
        ("gwcorp:4000", "*.corp,corp,.,:4000,*.", False),
        ("gw.corp:4000", "*", True),
        ("gw.corp:4000", "", False),
    ],
)
def test_no_proxy_is_understood_as_by_curl_and_go(
    address: str, no_proxy: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://p:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_for(f"http://{address}") == (None if direct else "http://p:3128")


def test_none_of_our_servers_reads_uvicorns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEB_CONCURRENCY=auto, as some platforms set it, is an error for Uvicorn."""
    from ichat_lifecycle.control.server import ControlPlane

    async def app(scope: object, receive: object, send: object) -> None: ...

    async def start_and_stop() -> str:
        plane = ControlPlane(lambda: app, "127.0.0.1", 0, None, lambda url: None)
        await plane.start()
        await plane.stop()
        return plane.url

    monkeypatch.setenv("WEB_CONCURRENCY", "auto")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    assert asyncio.run(start_and_stop()).startswith("http://127.0.0.1:")
