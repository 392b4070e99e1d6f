"""Secrets that are known, struck out of texts in each form in which somebody may print them."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote

LENGTH_MIN = 4  # characters; shorter ones would hide half of a log
LINE_MIN = 16  # characters of a line of a secret that has several, which is one itself
# A secret that was cut is known by so much of its beginning or end, if it is long enough.
SEED, SEEDED_MIN = 12, 20
LONG = 8192  # characters; a longer one is a file, and nobody prints that in a URL

_HEADER = re.compile(r"(?i)(?:ApiKey|Basic|Bearer|Digest|Token)\s+(\S+)")
_SPACES = re.compile(r"\s+")


MATCHES_MAX = 300  # in one text


class KnownValues:
    """A set of secrets. Immutable: it may be used from any thread."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = frozenset(secrets)
        self._forms: _Forms | None = None  # once they are asked for

    def __contains__(self, secret: object) -> bool:
        return secret in self._secrets

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def with_(self, secrets: Iterable[str]) -> KnownValues:
        """These and more."""
        more = {part for secret in secrets for part in _parts(secret) if len(part) >= LENGTH_MIN}
        return self if more <= self._secrets else KnownValues(self._secrets | more)

    def scrub(self, text: str, placeholder: str) -> str:
        """`text` with each secret, and what is left of one that was cut, replaced."""
        if not self._secrets:
            return text
        # Not before: secrets are added one by one, and most sets are never looked for. No lock:
        # two threads at most do the same twice, and one that is forked finds none held.
        forms = self._forms
        if forms is None:
            forms = self._forms = _Forms(self._secrets)
        pieces: list[str] = []
        end = 0
        for begin, until in forms.found(text):
            pieces += (text[end:begin], placeholder)
            end = until
        return "".join(pieces) + text[end:] if pieces else text


class _Forms:
    """One pattern of all forms of secrets, and how those go on of which it has only the ends."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._seeds: dict[str, list[str]] = defaultdict(list)
        self._tails: dict[str, list[str]] = defaultdict(list)
        forms = {form for secret in secrets for form in _forms(secret)}
        self._search = self._compiled(sorted(forms, key=len, reverse=True)).search

    def _compiled(self, forms: list[str]) -> re.Pattern[str]:
        """The longest first, so that one that begins with another is hidden whole."""
        whole, short = [], []
        for form in forms:
            if len(form) < SEED:
                short.append(re.escape(form))
            elif not _has_own_start(form):
                whole.append(_loosely(form))
            else:
                self._seeds[form[:SEED]].append(form)
                if len(form) >= SEEDED_MIN:
                    self._tails[form[-SEED:]].append(form)
                else:
                    whole.append(re.escape(form))
        seeds = [re.escape(seed) for seed, of in self._seeds.items() if len(of[0]) >= SEEDED_MIN]
        tails = map(re.escape, self._tails)
        alternatives = [*whole, *seeds, *tails, *map(_spaces_loosely, short)]
        return re.compile(_branched(alternatives))

    def found(self, text: str) -> Iterator[tuple[int, int]]:
        """Where secrets begin and end; those that overlap are one."""
        now: tuple[int, int] | None = None
        count = 0
        match = self._search(text)
        while match is not None:
            count += 1
            if count > MATCHES_MAX:  # a text that is made to match everywhere is hidden to its end
                yield (now[0] if now else match.start()), len(text)
                return
            begin, until = self._whole(text, *match.span())
            if now is None:
                now = begin, until
            elif begin < now[1]:
                now = min(begin, now[0]), max(until, now[1])
            else:
                yield now
                now = begin, until
            match = self._search(text, match.start() + 1)
        if now is not None:
            yield now

    def _whole(self, text: str, begin: int, until: int) -> tuple[int, int]:
        """As much of a secret as stands around its beginning or its end."""
        found = text[begin:until]
        for form in self._seeds.get(text[begin : begin + SEED], ()):
            until = max(until, begin + _alike(form, text[begin : begin + len(form)]))
        for form in self._tails.get(found, ()):
            before = text[max(0, until - len(form)) : until][::-1]
            begin = min(begin, until - _alike(form[::-1], before))
        return begin, until


def _alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _branched(patterns: list[str], depth: int = 2) -> str:
    """All alternatives in their order, those that begin alike together: few are looked at then."""
    if not depth or len(patterns) == 1:
        return "|".join(patterns)
    groups: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        first = pattern[: 2 if pattern.startswith("\\") else 1]
        groups[first].append(pattern[len(first) :])
    return "|".join(f"{first}(?:{_branched(of, depth - 1)})" for first, of in groups.items())


def _has_own_start(form: str) -> bool:
    """Whether its first characters are no others': those of `redis://` and `Bearer …` are."""
    return "://" not in form and not form.startswith("/") and not _SPACES.search(form)


def _loosely(form: str) -> str:
    return _spaces_loosely(re.escape(form))


def _spaces_loosely(pattern: str) -> str:
    """Any white space will do: lines for people are wrapped where words end."""
    return re.sub(r"(?:\\?\s)+", r"\\s+", pattern)


def _parts(secret: str) -> set[str]:
    """A secret, and what of it is one alone: a password of a URL, a token after its scheme."""
    # Without the white space around it, as it is used (see credentials).
    bare = secret.strip()
    parts = {bare, unquote(bare)}
    if (header := _HEADER.fullmatch(bare)) is not None:
        parts |= _parts(header[1])
    if "\n" in bare:
        lines = map(str.strip, bare.splitlines())
        parts |= {one for one in lines if len(one) >= LINE_MIN and not one.startswith("-----")}
    return parts


def _json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _json_in_utf8(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _bytes(text: str) -> str:
    return repr(text.encode(errors="replace"))[2:-1]


def _python(text: str) -> str:
    return repr(text)[1:-1]


def _lower_percent(text: str) -> str:
    return re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), _percent(text))


def _percent(text: str) -> str:
    return quote(text, safe="", errors="replace")


_ENCODINGS: tuple[Callable[[str], str], ...] = (
    _json,
    _json_in_utf8,
    _bytes,
    _python,
    _percent,
    _lower_percent,
    functools.partial(quote, errors="replace"),
    functools.partial(quote_plus, errors="replace"),
    html.escape,
    lambda text: shlex.quote(text).strip("'"),
)


def _forms(secret: str) -> set[str]:
    """How a secret may stand in a text: encoded not at all, once or twice, or as Base64."""
    if len(secret) > LONG:
        return {secret, _json(secret), _json_in_utf8(secret), _python(secret)}
    once = {encode(secret) for encode in _ENCODINGS}
    twice = {encode(form) for form in once - {secret} for encode in _ENCODINGS}
    found = {secret, *once, *twice, *_in_base64(secret)}
    return {form for form in found if len(form) >= LENGTH_MIN}


def _in_base64(secret: str) -> Iterator[str]:
    """The middle of its three forms, one for each place in a group: `Basic` has a name before."""
    data = secret.encode(errors="replace")
    for offset, cut in enumerate((0, 2, 3)):
        filled = bytes(offset) + data
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(filled).decode()[cut:]
            form = whole.rstrip("=")
            form = form[:-1] if len(filled) % 3 else form
            if len(form) >= SEED:
                yield form
