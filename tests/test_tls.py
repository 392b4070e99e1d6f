"""What TLS a server can speak, and which flag is named where it cannot."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import pytest

from ichat_lifecycle.adapters.tls import Tls
from ichat_lifecycle.errors import ArgumentsError, ExitCode

CERTIFICATE, OTHER, ENCRYPTED = (
    str(Path(__file__).with_name(f"{name}.pem"))
    for name in ("certificate", "next_certificate", "encrypted_certificate")
)


@pytest.mark.parametrize("key", [None, CERTIFICATE])
def test_a_certificate_and_its_key_are_in_one_file_or_two(key: str | None) -> None:
    tls = Tls(CERTIFICATE, key, ca_certs=OTHER, cert_reqs="2")
    assert tls.spoken
    tls.check()
    assert tls.context().verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("flags", "begins"),
    [
        ({"keyfile": CERTIFICATE}, f"--ssl-keyfile {CERTIFICATE}: a key without a certificate"),
        ({"certfile": "no.pem"}, "--ssl-certfile no.pem: cannot be used"),
        ({"keyfile": "no.pem"}, "--ssl-keyfile no.pem: cannot be used"),
        ({"keyfile": OTHER}, "--ssl-certfile/--ssl-keyfile: cannot be used"),
        ({"certfile": "a\0b"}, "--ssl-certfile"),
        ({"certfile": ENCRYPTED}, f"--ssl-certfile {ENCRYPTED}: the key has a passphrase"),
        ({"keyfile": ENCRYPTED}, f"--ssl-keyfile {ENCRYPTED}: the key has a passphrase"),
        ({"ca_certs": "no.pem"}, "--ssl-ca-certs no.pem: cannot be used"),
        ({"cert_reqs": 5}, "--ssl-cert-reqs 5: expected 0"),
        ({"cert_reqs": "required"}, "--ssl-cert-reqs required: expected 0"),
        ({"ciphers": "none"}, "--ssl-ciphers none: cannot be used"),
    ],
)
def test_what_cannot_be_is_an_error_of_its_flag(flags: dict[str, Any], begins: str) -> None:
    alone = {"certfile": None} if begins.endswith("certificate") else {}
    tls = Tls(**{"certfile": CERTIFICATE, **flags, **alone})
    for ask in (tls.check, tls.context):
        with pytest.raises(ArgumentsError) as caught:
            ask()
        assert caught.value.message.startswith(begins)
        assert caught.value.exit_code is ExitCode.BAD_ARGUMENTS


def test_a_context_that_is_loaded_anew_asks_nobody_either() -> None:
    """As vLLM's refresher does with the one that is served with."""
    context = Tls(CERTIFICATE).context()
    with pytest.raises(OSError, match="passphrase"):
        context.load_cert_chain(ENCRYPTED, ENCRYPTED)


def test_without_a_certificate_there_is_no_tls() -> None:
    Tls(cert_reqs=5).check()
    assert not Tls.of({"ssl_certfile": "", "ssl_cert_reqs": 0}.get).spoken


def test_what_can_be_read_once_is_left_for_the_server(tmp_path: Path) -> None:
    """As `--ssl-keyfile <(decrypt key)` is: a look would take it away, or wait for a writer."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    Tls(CERTIFICATE, str(pipe)).check()
