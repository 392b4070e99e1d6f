"""A private directory for the run of an engine, of which everybody can see whether it is in use.

A file in it is locked by its owner and the owner's guardian. The kernel ends the lock with the last
of them, whatever ends them, and across containers that share a directory: a pid proves neither.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from pathlib import Path

from ichat_lifecycle import private_files
from ichat_lifecycle.adapters import guardian

PREFIX = "ichat-engine-"
_PRIVATE = 0o700
_BEGUN_S = 60.0  # a directory without the file is being made by somebody, or he was killed then


class RunDirectory:
    """A new one.

    Args:
        parent: where to; default: the temporary directory.
        note: what the next start has to know should all of this one be killed.

    Attributes:
        fd: of the locked file; to be given to the guardian.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: str | None, note: str) -> None:
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        life = Path(self.path) / guardian.LIFE
        self.fd = -1
        try:
            self.fd = private_files.claimed(life, new=True)
            os.write(self.fd, note.encode())
        except OSError:
            self.remove()
            raise

    def text(self) -> str:
        """What is in the file by now."""
        return _text(self.fd)

    def remove(self) -> None:
        """Removes it with its sockets, and gives up the lock. Idempotent."""
        guardian.remove_directory(self.path)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DeadDirectory:
    """One whose owner and guardian are gone, and which is this process's to remove now.

    Attributes:
        text: what its owner and the guardian have written.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.text = _text(fd)
        self._fd = fd

    def remove(self) -> None:
        guardian.remove_directory(self.path)

    def close(self) -> None:
        os.close(self._fd)


def dead_directories(parent: str) -> list[DeadDirectory]:
    """Those of this user in there. To be closed; until then nobody else gets them."""
    found: list[DeadDirectory] = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    fd = _claimed(entry.path)
                    if fd is not None:
                        found.append(DeadDirectory(entry.path, fd))
    return found


def _claimed(path: str) -> int | None:
    """The locked file of a dead one; None where it is alive, or not ours. Raises OSError."""
    directory = Path(path).lstat()
    ours = stat.S_ISDIR(directory.st_mode) and directory.st_uid == os.geteuid()
    if not ours or stat.S_IMODE(directory.st_mode) & ~_PRIVATE:
        return None
    try:
        return private_files.claimed(Path(path) / guardian.LIFE)
    except FileNotFoundError:
        if time.time() - directory.st_mtime > _BEGUN_S:
            Path(path).rmdir()  # only where it is empty
        return None


def _text(fd: int) -> str:
    return os.pread(fd, guardian.RECORD_LIMIT, 0).decode(errors="replace")
