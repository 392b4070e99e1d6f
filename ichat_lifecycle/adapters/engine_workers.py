"""The deaths of the engine's worker processes, which are EngineCore's children and not ours.

EngineCore notices them too, and then ends itself; on a busy machine that takes seconds, in which
everything that is asked hangs. Here the kernel tells at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping

import psutil

from ichat_lifecycle.adapters.engine_processes import with_descendants

# What vLLM has in the titles of its workers ("VLLM::Worker_TP0"), whatever the prefix is set to.
# Other children come and go: compilers, for example.
_TITLE = "::Worker"


def workers_of(cores: Mapping[int, str]) -> dict[int, str]:
    """The worker processes below these, by pid, with their titles.

    Args:
        cores: the names of the EngineCores by pid. Where there are several, one for each
            data-parallel rank, a worker's title is followed by the name of its own.
    """
    found: dict[int, str] = {}
    for core, name in cores.items():
        of = f" of {name}" if len(cores) > 1 else ""
        for process in with_descendants(core):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline()[:1])
                if _TITLE in title:
                    found[process.pid] = f"{title.strip()}{of}"
    return found


class DeathWatch:
    """Tells the death of each process once, on the loop, until it is stopped.

    Args:
        on_death: gets the pid and the name.
    """

    def __init__(self, on_death: Callable[[int, str], None]) -> None:
        self._on_death = on_death
        self._fds: dict[int, int] = {}
        self._gone: list[asyncio.Handle] = []

    def watch(self, processes: dict[int, str]) -> None:
        """A process that has ended already is told too; one that cannot be watched is not."""
        loop = asyncio.get_running_loop()
        for pid, name in processes.items():
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone.append(loop.call_soon(self._on_death, pid, name))
                continue
            except OSError:  # a kernel or a sandbox without it: EngineCore's own notice remains
                continue
            self._fds[pid] = fd
            loop.add_reader(fd, self._ended, pid, name)

    def _ended(self, pid: int, name: str) -> None:
        self._forget(pid)
        self._on_death(pid, name)

    def stop(self) -> None:
        for pid in tuple(self._fds):
            self._forget(pid)
        for handle in self._gone:
            handle.cancel()

    def _forget(self, pid: int) -> None:
        fd = self._fds.pop(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
