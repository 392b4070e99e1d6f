"""The certificates that the environment names, for whom this process asks over TLS.

A variable often outlives what it names (an environment of conda that was left), and the error of
OpenSSL for that names neither the file nor the variable.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ichat_lifecycle.errors import ArgumentsError

if TYPE_CHECKING:
    import ssl

READ = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # by httpx, ours and the hub's; the first that is set
VARIABLES = (*READ, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # these by requests, and curl
HINT = "name a file (of SSL_CERT_DIR a directory) that this user can read, or unset the variable"


def unusable(environ: Mapping[str, str]) -> list[str]:
    """NAME=PATH of each variable whose path is not there or cannot be read."""
    named = {name: environ[name] for name in VARIABLES if environ.get(name)}
    return [f"{name}={path}" for name, path in named.items() if not _readable(name, path)]


def _readable(name: str, path: str) -> bool:
    # OpenSSL takes several directories, and passes over those that are not there.
    paths = path.split(os.pathsep) if name == "SSL_CERT_DIR" else [path]
    return any(os.access(one, os.R_OK) for one in paths)


def client_context() -> ssl.SSLContext:
    """What a client trusts: SSL_CERT_FILE or SSL_CERT_DIR, else what httpx brings.

    For a client that does not trust its environment otherwise, because of the proxies in it.

    Raises:
        ArgumentsError: what the variable names cannot be loaded.
    """
    import httpx

    read = next((f"{name}={os.environ[name]}" for name in READ if os.environ.get(name)), None)
    try:
        if read in unusable(os.environ):  # a directory that is not there trusts nobody, silently
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return httpx.create_ssl_context()
    except OSError as error:  # an ssl.SSLError is one
        what = read or "the certificates of this machine"
        raise ArgumentsError(f"{what} cannot be loaded: {error.strerror}", hint=HINT) from error
