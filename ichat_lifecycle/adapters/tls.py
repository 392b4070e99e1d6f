"""TLS as `--ssl-certfile` and its companions ask for it, with the flag named where it cannot be.

Uvicorn would make the same of them, but for what is wrong: there an assertion fails, or OpenSSL
asks for the passphrase of a key at the terminal, for ever where nobody sits at it.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ichat_lifecycle.errors import ArgumentsError

CERTFILE, KEYFILE, CA_CERTS = "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs"
_HINT = "give a certificate and its key, both readable PEM files"
_CIPHERS_HINT = "give names as `openssl ciphers` lists them, with colons between them"


class _EncryptedKey(OSError):
    """A key with a passphrase, which vLLM has no flag for."""


class _Context(ssl.SSLContext):
    """One that asks nobody for a passphrase, also when its files are read anew."""

    def load_cert_chain(self, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
        super().load_cert_chain(certfile, keyfile, password or _refuse_to_ask)


def _refuse_to_ask() -> NoReturn:
    raise _EncryptedKey("the key has a passphrase, which cannot be given here")


@dataclass(frozen=True, slots=True)
class Tls:
    """The values of vLLM's flags of the same names; empty ones are not given."""

    certfile: str | None = None
    keyfile: str | None = None
    ca_certs: str | None = None
    cert_reqs: str | int = ssl.CERT_NONE
    ciphers: str | None = None

    @classmethod
    def of(cls, value_of: Callable[[str], Any]) -> Tls:
        """Those that `value_of` gives by vLLM's names, such as `ssl_certfile`."""

        def text(name: str) -> str | None:
            value = value_of(name)
            return None if value in (None, "") else str(value)

        return cls(
            text("ssl_certfile"),
            text("ssl_keyfile"),
            text("ssl_ca_certs"),
            text("ssl_cert_reqs") or ssl.CERT_NONE,
            text("ssl_ciphers"),
        )

    @property
    def spoken(self) -> bool:
        """As Uvicorn has it: the key may stand in the file of the certificate."""
        return bool(self.certfile or self.keyfile)

    def check(self) -> None:
        """Looks whether a server can speak it.

        Raises:
            ArgumentsError: it cannot.
        """
        # What is no file, as a shell's <(…), can be read once only.
        if self.spoken and not any(_is_read_once(path) for _, path in self._files()):
            self.context()

    def context(self) -> ssl.SSLContext:
        """A new one, with what is in the files now.

        Raises:
            ArgumentsError: a value is wrong, or a file cannot be used.
        """
        if self.certfile is None:
            raise ArgumentsError(
                f"{KEYFILE} {self.keyfile}: a key without a certificate",
                hint=f"give the certificate by {CERTFILE}",
            )
        context = _Context(ssl.PROTOCOL_TLS_SERVER)
        self._load_chain(context)
        context.verify_mode = self._verify_mode()
        if self.ca_certs:
            with _naming(f"{CA_CERTS} {self.ca_certs}", "give a readable PEM file of certificates"):
                context.load_verify_locations(self.ca_certs)
        if self.ciphers:
            with _naming(f"--ssl-ciphers {self.ciphers}", _CIPHERS_HINT):
                context.set_ciphers(self.ciphers)
        return context

    def _load_chain(self, context: ssl.SSLContext) -> None:
        assert self.certfile is not None
        try:
            context.load_cert_chain(self.certfile, self.keyfile)
        except _EncryptedKey as error:
            flag, path = (KEYFILE, self.keyfile) if self.keyfile else (CERTFILE, self.certfile)
            hint = f"give a key without one, as `openssl pkey -in {path}` prints it"
            raise ArgumentsError(f"{flag} {path}: {error}", hint=hint) from error
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError, too
            flags = f"{CERTFILE}/{KEYFILE}" if self.keyfile else CERTFILE
            unreadable = (
                f"{flag} {path}" for flag, path in self._files() if not _is_readable(path)
            )
            flags = next(unreadable, flags)
            raise ArgumentsError(f"{flags}: cannot be used: {error}", hint=_HINT) from error

    def _verify_mode(self) -> ssl.VerifyMode:
        try:
            return ssl.VerifyMode(int(self.cert_reqs))
        except ValueError:
            raise ArgumentsError(
                f"--ssl-cert-reqs {self.cert_reqs}: expected 0 (no certificate of the client's is "
                "asked for), 1 (it is optional), or 2 (it is required)"
            ) from None

    def _files(self) -> Iterator[tuple[str, str]]:
        for flag, path in (
            (CERTFILE, self.certfile),
            (KEYFILE, self.keyfile),
            (CA_CERTS, self.ca_certs),
        ):
            if path is not None:
                yield flag, path


@contextlib.contextmanager
def _naming(given: str, hint: str) -> Iterator[None]:
    """What OpenSSL refuses, with the flag that gave it. ssl.SSLError is an OSError, too."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"{given}: cannot be used: {error}", hint=hint) from error


def _is_readable(path: str) -> bool:
    try:
        return os.access(path, os.R_OK)
    except ValueError:  # a null character, as a file of YAML can have
        return False


def _is_read_once(path: str) -> bool:
    try:
        found = Path(path)
        return found.exists() and not found.is_file()
    except (OSError, ValueError):
        return False
