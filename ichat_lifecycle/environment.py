"""The environment of a process, checked before anything else reads it: its home, its temporary
directory, and the variables that this package or one of its libraries reads."""

from __future__ import annotations

import codecs
import locale
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

import structlog

from ichat_lifecycle import certificates
from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.config import TOKEN_VARIABLE
from ichat_lifecycle.credentials import HINT, header_value
from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.home import known_home, private_home, provide_home
from ichat_lifecycle.private_files import restrict_umask
from ichat_lifecycle.redact import is_secret

log = structlog.get_logger("ichat_lifecycle")

# A warning that waits until there is a log.
Note = Callable[[], None]

KEYS = ("VLLM_API_KEY", TOKEN_VARIABLE, FLEET_TOKEN_VARIABLE)
HUB_KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the library strips them, and takes "" for none
METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
UTF8_HINT = "set PYTHONUTF8=1, or a locale of UTF-8: libraries read their own files in it"
UMASK_HINT = "set a umask of 002 or 022: what is written is kept from all others here"
VISIBLE_HINT = (
    "every user of this machine can read them in the process list: use VLLM_API_KEY, HF_TOKEN and "
    f"{TOKEN_VARIABLE}, or a file of --config that only this user can read"
)
HOME_HINT = (
    "set HOME, or XDG_CACHE_HOME, VLLM_CACHE_ROOT and HF_HOME, to a directory that this user can"
    " write, and that lasts"
)


def prepare(environ: MutableMapping[str, str]) -> tuple[Note, ...]:
    """Makes of a process' environment what vLLM and its libraries can start in.

    Keeps files from being writable for everybody. Sets HOME and USER where this user has none, and
    strips white space from keys: vLLM reads them itself, and both sides have to agree. Anything
    else that is set stays as it is.

    Returns:
        warnings, to be called once there is a log.

    Raises:
        ArgumentsError: a key cannot be sent, or a directory that a variable names is not there.
        LimitError: there is no directory that can be written, not even a temporary one.
    """
    notes = [*_umask(), *_home(environ), *_temporary(environ), *_encoding()]
    notes += _certificates(environ)
    notes += [note for name in (*KEYS, *HUB_KEYS) for note in _key(environ, name)]
    _check_metrics_directory(environ)
    return tuple(notes)


def _umask() -> Iterator[Note]:
    given = restrict_umask()
    if given is not None:
        yield lambda: log.warning("umask_open", umask=f"{given:03o}", hint=UMASK_HINT)


def _home(environ: MutableMapping[str, str]) -> Iterator[Note]:
    provided = provide_home(environ)
    if provided is not None:
        yield lambda: log.warning("no_home", instead=str(provided), hint=HOME_HINT)
        return
    home, named = known_home(), _named_cache(environ)
    if named is None:
        if home is not None and not can_make(home / ".cache" / "vllm"):
            yield lambda: log.warning("home_unwritable", path=str(home), hint=HOME_HINT)
    elif not can_make(Path(named[1]).expanduser()):
        name, path = named
        hint = f"set {name} to a directory that this user can write, and that lasts"
        yield lambda: log.warning("cache_unwritable", name=name, path=path, hint=hint)


def _encoding() -> Iterator[Note]:
    """torch cannot even be imported where files are read as ASCII."""
    name = locale.getpreferredencoding(do_setlocale=False)
    if codecs.lookup(name).name != "utf-8":
        yield lambda: log.warning("locale_not_utf8", encoding=name, hint=UTF8_HINT)


def _certificates(environ: Mapping[str, str]) -> Iterator[Note]:
    """A local model needs none: whoever needs them fails later, without a name in its error."""
    yield from map(_unusable, certificates.unusable(environ))


def _unusable(given: str) -> Note:
    name, _, path = given.partition("=")
    hint = certificates.HINT
    return lambda: log.warning("certificates_unusable", name=name, path=path, hint=hint)


def _named_cache(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The variable that says where vLLM keeps what it compiles, and its value."""
    names = ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME")
    return next(((name, environ[name]) for name in names if environ.get(name)), None)


def can_make(directory: Path) -> bool:
    """Whether a directory can be written, or made where it is missing."""
    for path in (directory, *directory.parents):
        try:
            path.stat()
        except FileNotFoundError:
            continue
        except OSError:
            return False
        return os.access(path, os.W_OK | os.X_OK)
    return False


def _temporary(environ: Mapping[str, str]) -> Iterator[Note]:
    """Python and compilers alike pass over a TMPDIR that cannot be used, without a word."""
    wanted = environ.get("TMPDIR")
    try:
        taken = tempfile.gettempdir()
    except OSError:
        private_home()  # raises, and describes it
        return
    if wanted and Path(wanted).absolute() != Path(taken).absolute():
        hint = "make it, and let this user write there"
        yield lambda: log.warning("tmpdir_unusable", path=wanted, instead=taken, hint=hint)


def _key(environ: MutableMapping[str, str], name: str) -> Iterator[Note]:
    given = environ.get(name, "")
    if name in HUB_KEYS and not given.strip():
        return
    key = header_value(name, given)
    if key != given:
        environ[name] = key
        yield stripped(name)


def visible(flags: Sequence[str]) -> Iterator[Note]:
    """The warning that all users of this machine can read the secrets of a command line."""
    if flags:
        yield lambda: log.warning("secrets_visible", flags=list(flags), hint=VISIBLE_HINT)


def stripped(name: str) -> Note:
    """The warning that a key had white space around it."""
    return lambda: log.warning("key_stripped", name=name, hint=HINT)


def _check_metrics_directory(environ: Mapping[str, str]) -> None:
    """Where prometheus_client cannot make its files, vLLM ends with an error about a file."""
    given = environ.get(METRICS_DIRECTORY)
    if given and not (Path(given).is_dir() and os.access(given, os.W_OK | os.X_OK)):
        raise ArgumentsError(
            f"{METRICS_DIRECTORY}={given}: no directory that can be written",
            hint="make it, or unset the variable: one process needs none",
        )


def blamed(text: str, environ: Mapping[str, str]) -> str | None:
    """The variable whose value an error quotes, as `int()` and its kin do; None for none.

    Any library may read a variable while it is imported, and complain without its name.
    """
    suspects = (
        name
        for name, value in environ.items()
        if value and not is_secret(name) and repr(value) in text
    )
    return min(suspects, default=None)


def log_all(notes: Sequence[Note]) -> None:
    """Logs warnings that have waited."""
    for note in notes:
        note()
