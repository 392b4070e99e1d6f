"""What can be wrong between a command and a worker: each is one line with a hint."""

from __future__ import annotations

from ichat_lifecycle.errors import ArgumentsError, ExitCode, LifecycleError


class UnreachableError(LifecycleError):
    """No worker was found, or none answers (exit 69). It may help to ask again."""

    exit_code = ExitCode.ADDRESS_UNAVAILABLE
    default_code = "worker_unreachable"


class GoneError(UnreachableError):
    """The address refuses connections: nothing listens there."""

    default_code = "worker_gone"


class ForeignError(LifecycleError):
    """What answers is no worker, or not one that this version understands (exit 69)."""

    exit_code = ExitCode.ADDRESS_UNAVAILABLE
    default_code = "not_a_worker"


class SeveralWorkersError(ArgumentsError):
    """A command for one worker has found several (exit 2)."""

    default_code = "several_workers"
