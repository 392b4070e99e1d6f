"""A home for a process that has none: containers run under arbitrary UIDs, without an entry in
/etc/passwd and without HOME.

vLLM and its libraries would then write to a directory called `~` wherever they were started, and
Python has no answer at all to where the home is.
"""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path

import platformdirs

from ichat_lifecycle.errors import LimitError

NAME = "ichat-lifecycle"
_PRIVATE = 0o700


def cache_directory() -> Path:
    """Where this user's caches of ours are: `ichat-lifecycle` in XDG_CACHE_HOME or ~/.cache.

    Raises:
        LimitError: there is no directory at all that this process can write.
    """
    return _directory("XDG_CACHE_HOME", ".cache", platformdirs.user_cache_path)


def state_directory() -> Path:
    """Where what this user keeps is: `ichat-lifecycle` in XDG_STATE_HOME or ~/.local/state.

    Raises:
        LimitError: as cache_directory().
    """
    return _directory("XDG_STATE_HOME", ".local/state", platformdirs.user_state_path)


def _directory(variable: str, below_home: str, of_platform: Callable[[str], Path]) -> Path:
    if os.environ.get(variable, "").strip() or known_home() is not None:
        return of_platform(NAME)
    return private_home() / below_home / NAME


def known_home() -> Path | None:
    """The home by HOME or /etc/passwd; None where neither knows one."""
    # os.path, because pathlib raises where it is not known.
    home = os.path.expanduser("~")  # noqa: PTH111
    return Path(home) if home.startswith("/") else None


def private_home() -> Path:
    """A directory of this user's below the temporary one, the same each time; made where missing.

    Only this user may read it. Where somebody else was faster to take its name, it is a new one.

    Raises:
        LimitError: no directory can be made.
    """
    try:
        path = Path(tempfile.gettempdir()) / f"ichat-lifecycle-{os.geteuid()}"
        try:
            path.mkdir(mode=_PRIVATE)
        except FileExistsError:
            found = path.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if not ours or stat.S_IMODE(found.st_mode) & ~_PRIVATE:
                path = Path(tempfile.mkdtemp(prefix=f"ichat-lifecycle-{os.geteuid()}-"))
    except OSError as error:
        raise LimitError(
            f"there is no home directory, and no temporary one: {error}",
            code="no_temporary_directory",
            hint="set TMPDIR to a directory that can be written; in Kubernetes mount an emptyDir"
            " at /tmp",
        ) from error
    return path


def provide_home(environ: MutableMapping[str, str]) -> Path | None:
    """Sets HOME and USER where this user has none; what is set is never changed.

    Returns:
        the home that was provided; None where there is one already.

    Raises:
        LimitError: no directory can be made.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # as different Pythons have it
        environ["USER"] = f"uid-{os.geteuid()}"
    if known_home() is not None:
        return None
    home = private_home()
    environ["HOME"] = str(home)
    return home
