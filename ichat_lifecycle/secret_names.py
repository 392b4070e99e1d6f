"""The one list of what is secret by its name: of flags, keys, variables, headers and parameters."""

from __future__ import annotations

import functools
import re

NAME_LIMIT = 128  # characters of a name that are looked at: its end says what it holds

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of snake_case, kebab-case and camelCase
_KEYS = (
    "access|account|admin|aes|api|app|application|auth|cipher|consumer|deploy|encryption|function"
    "|hmac|jwt|license|master|private|rsa|secret|service|session|shared|signing|ssh|storage"
    "|subscription|webhook"
)
# Names end with these. Plain `tokens` are counted, a plain `key` sorts.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:auth|authorization|bearer|cookies?|credentials?|dsn|jwt|passphrase|passwd"
    r"|passwords?|pat|pwd|sas|secrets?|token|apikeys?|conn(?:ection)?_?str(?:ing)?s?"
    rf"|(?:{_KEYS})_keys?|(?:access|api|auth|bearer|hf|hub|refresh)_tokens"
    r"|(?:secret|role_secret)_id|shared_access_signature|docker_auth_config"
    r"|otlp(?:_[a-z]+)?_headers"
    r"|(?:^|admin|db|database|ftp|http|ldap|mail|mysql|pg|postgres|proxy|redis|root|smtp|user)_pass"
    # What is written as one word.
    r"|[a-z]*(?:password|passwd|passphrase|apikey|authtoken|accesstoken|hftoken|secretkey"
    r"|accesskey|accountkey|privatekey|sessionkey|connectionstring))"
    r"(?:_(?:base|hash|new|old|primary|secondary|value))?$"
    r"|^pass$"
)
# A `token` is a secret, but not those that models read and write; CORS has a switch, Google's
# variable the path of a file, and every shell the directory that it is in.
_INNOCENT_NAME = re.compile(
    r"(?:^|_)(?:audio|begin|bos|by|cls|decode|end|eos|first|image|input|last|mask|max|min|next|num"
    r"|output|pad|per|prefill|prompt|sep|special|start|stop|think|time|to|unk|video)_token$"
    r"|^allow_credentials$|_application_credentials$"
)
_WORKING_DIRECTORY = "PWD"
# Parameters of a URL that are secret there alone: signatures of links, and the keys of web APIs.
_IN_A_QUERY = re.compile(r"(?:^|_)(?:code|key|sig|signature)$")


def is_secret(name: str) -> bool:
    """Whether a key or flag of this name holds a secret: `hf_token` does, `max_tokens` does not."""
    return _is_secret(name[-NAME_LIMIT:])


def is_secret_in_query(name: str) -> bool:
    """The same of a parameter of a URL: `key` and `sig` are secrets there, too."""
    return is_secret(name) or bool(_IN_A_QUERY.search(words_of(name[-NAME_LIMIT:])))


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    if name == _WORKING_DIRECTORY:
        return False
    words = words_of(name)
    return bool(_SECRET_NAME.search(words)) and not _INNOCENT_NAME.search(words)


def words_of(name: str) -> str:
    """A name's words in lower case, such as `api_key` for `--apiKey2`."""
    return "_".join(_WORD.findall(name)).lower()
