"""Secrets in free text, found by what stands around them: nobody has to know them before.

Found are: what stands before the @ of a URL, a secret parameter of it, `name=value` and
`name: value` (also as JSON and as Python prints it) where the name is that of a secret, credentials
of a header, and what has the form of a well-known kind of token. Every pattern is linear in the
length of the text: the text may be a stranger's.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote

from ichat_lifecycle.secret_names import is_secret, is_secret_in_query, words_of

# Gets a secret, and returns what is shown in its place.
Hide = Callable[[str], str]

_URL = re.compile(r"(?<=://)[^\s\"'<>]++")
_AUTHORITY = re.compile(r"[^/?#\s]*+")
_WHOLE_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*+://")

# A name and what separates it from its value; both may be parts of an encoded URL.
_NAME = re.compile(
    r"(?:(?<![\w.%\[\]-])|(?<=%3[Dd]))(?P<name>(?:[\w.\[\]-]|%(?!3[Dd]))++)"
    r"(?P<quote>\\{0,7}[\"'])?\s{0,2}(?P<separator>=(?!=)|:|%3[Dd])\s{0,2}"
)
# To the quote that ends it, or the end of a line that was cut. Within other quotes both have
# backslashes of their own.
_QUOTED = (
    r"b?(?P<mark>[\"'])(?P<inner>(?:\\.|(?!(?P=mark)).)*+)(?:(?P=mark)|$)"
    r"|b?(?P<marks>\\{1,7}[\"'])(?P<within>(?:(?!(?<!\\)(?P=marks)).)*+)(?:(?P=marks)|$)"
)
_NESTED = r"\[[^\]]{0,1000}+\]|\[[^\]\n]*+|\{[^}]{0,1000}+\}|\{[^}\n]*+"
_SCHEME = r"(?:(?:ApiKey|Basic|Bearer|Digest|Token)\s{1,2})?"
_VALUE = re.compile(rf"{_QUOTED}|{_NESTED}|{_SCHEME}[^\s&;,\"'<>)\]}}\\]++", re.MULTILINE)
# These run on over spaces and commas to the end of the line.
_HEADER_VALUE = re.compile(rf"{_QUOTED}|{_NESTED}|[^\"'\r\n\\]++", re.MULTILINE)
_TO_THE_END = re.compile(r"(?:^|_)(?:authorization|cookies?)$")
_NOTHING = re.compile(r"[bu]?[\"']{0,2}(?:None|null|[Tt]rue|[Ff]alse|\*\*\*|\[\]|\{\})?[\"']{0,2}")
# Before a colon any other single word is prose: "unexpected token: x".
_ALONE = re.compile(r"(?:authorization|cookies?|passphrase|passwd|passwords?|pwd)")

_FLAG = re.compile(
    r"(?P<before>(?<![\w-])--(?P<flag>[A-Za-z][\w.-]*+)(?:\s{1,2}|[\"'],\s{0,2}[\"']))"
    r"(?P<value>[^\s\"',]++)"
)

# A quick look, whether there may be any: most lines of a log have none.
_MAYBE_CREDENTIALS = re.compile(
    r"[Bb](?:earer|EARER|asic|ASIC)\s|hf_|sk-|gh[opsru]_|github_pat_|glpat-|xox|AIza|AKIA|npm_|eyJ"
    r"|-----B"
)
_CREDENTIALS = re.compile(
    r"(?<![\w-])[Bb](?:earer|EARER)\s{1,2}(?P<bearer>[\w.~+/=-]{8,}+)"
    r"|(?<![\w-])[Bb](?:asic|ASIC)\s{1,2}(?P<basic>[\w+/=-]{4,}+)"
    # Hugging Face, OpenAI and its like, GitHub, GitLab, Slack, Google, any JWT.
    r"|(?<![\w-])(?P<token>hf_[A-Za-z0-9]{20,}+|sk-[\w-]{20,}+|gh[opsru]_[A-Za-z0-9]{20,}+"
    r"|github_pat_\w{20,}+|glpat-[\w-]{16,}+|xox[abeprs]-[\w-]{10,}+|AIza[\w-]{30,}+"
    r"|AKIA[0-9A-Z]{16}|npm_[A-Za-z0-9]{20,}+"
    r"|eyJ[\w-]{10,}+\.[\w-]{10,}+(?:\.[\w-]*+)?)"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?P<pem>(?:[^-]|-(?!----END))*+)"
)


def hide_in_text(text: str, hide: Hide) -> str:
    """A text with each secret in it replaced by what `hide` returns for it."""
    if "://" in text:
        text = _hide_passwords(text, hide)
    if _MAYBE_CREDENTIALS.search(text):
        text = _CREDENTIALS.sub(lambda match: _credential(match, hide), text)
    if "--" in text:
        text = _FLAG.sub(lambda match: _flagged(match, hide), text)
    return _hide_pairs(text, hide)


def _flagged(match: re.Match[str], hide: Hide) -> str:
    """A command line, or the list of its words as Python prints it."""
    known = is_secret(match["flag"]) and not match["value"].startswith("-")
    if not known or _NOTHING.fullmatch(match["value"]):
        return match[0]
    return match["before"] + hide(match["value"])


def hide_in_url(text: str, hide: Hide) -> str | None:
    """The same, of a text that is one URL, whatever its password is made of; None for others."""
    begin = _WHOLE_URL.match(text)
    if begin is None:
        return None
    rest = text[begin.end() :]
    first, *others = rest.split(maxsplit=1)[:2] or [""]
    if others and "@" in first:  # a text that begins with a URL
        return None
    end = _userinfo_end(rest)
    if not end:
        return None
    return begin[0] + hide(rest[:end]) + _hide_pairs(rest[end:], hide)


def _hide_passwords(text: str, hide: Hide) -> str:
    def hidden(match: re.Match[str]) -> str:
        end = _userinfo_end(match[0])
        return hide(match[0][:end]) + match[0][end:] if end else match[0]

    return _URL.sub(hidden, text)


def _userinfo_end(rest: str) -> int:
    """Where the @ stands that ends what is secret in a URL without its scheme; 0 for nowhere.

    A password may hold each of `/?#@`. After a colon that no port follows, or that a port may
    follow, all is taken for a password up to the last @.
    """
    match = _AUTHORITY.match(rest)
    authority = match[0] if match else ""
    if authority.startswith("[") and "@" not in authority:  # an address of IPv6
        return 0
    return max(0, (rest if ":" in authority else authority).rfind("@"))


def _credential(match: re.Match[str], hide: Hide) -> str:
    kind = match.lastgroup or ""
    secret = match[kind]
    if kind == "basic" and not _is_basic(secret):
        return match[0]
    at = match.start(kind) - match.start()
    return match[0][:at] + hide(secret)


def _is_basic(text: str) -> bool:
    """Whether it is a name and a password, and no word of a sentence."""
    try:
        return b":" in base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_")
    except (binascii.Error, ValueError):
        return False


def _hide_pairs(text: str, hide: Hide) -> str:
    pieces: list[str] = []
    end = 0
    for begin, until, shown in _pairs(text, hide):
        pieces += (text[end:begin], shown)
        end = until
    return "".join(pieces) + text[end:] if pieces else text


def _pairs(text: str, hide: Hide) -> Iterator[tuple[int, int, str]]:
    """Where each secret value begins and ends, and what is shown there."""
    place = 0
    while (name := _NAME.search(text, place)) is not None:
        place = name.end()
        if not _names_a_secret(name):
            continue
        value = _value_after(name)
        if value is None or _NOTHING.fullmatch(value[0]):
            continue
        place = value.end()
        inner = "inner" if value["mark"] else "within"
        if value[inner] is not None:
            yield *value.span(inner), hide(value[inner])
        else:  # in JSON a placeholder has to be text
            quote = name["quote"] or ""
            yield *value.span(), f"{quote}{hide(value[0])}{quote}"


def _value_after(name: re.Match[str]) -> re.Match[str] | None:
    to_the_end = _TO_THE_END.search(words_of(name["name"])) and name["separator"] == ":"
    return (_HEADER_VALUE if to_the_end else _VALUE).match(name.string, name.end())


def _names_a_secret(match: re.Match[str]) -> bool:
    name = match["name"]
    if "%" in name:
        name = unquote(name[-256:])
    before = match.string[max(0, match.start() - 1) : match.start()]
    if before in ("?", "&", ";") and match["separator"] != ":":
        return is_secret_in_query(name)
    if not is_secret(name):
        return False
    if match["separator"] != ":" or match["quote"]:
        return True
    words = words_of(name)
    return "_" in words or bool(_ALONE.fullmatch(words))
