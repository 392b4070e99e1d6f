"""Every error of ours: a code for machines, an exit code, the root cause and a hint for people.

Exit codes are those of the README ("Exit codes"); 66 to 75 are sysexits.h's.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from ichat_lifecycle.printable import one_line


class ExitCode(enum.IntEnum):
    """What the process ends with."""

    OK = 0
    BAD_ARGUMENTS = 2
    INPUT_MISSING = 66
    ADDRESS_UNAVAILABLE = 69
    ENGINE_START_FAILED = 70
    SYSTEM_LIMIT = 71
    ENGINE_DIED = 75
    STOP_OUTRAN_DEADLINE = 124


# The same again would end the same way, until somebody changes something.
PERMANENT = frozenset(
    {ExitCode.BAD_ARGUMENTS, ExitCode.INPUT_MISSING, ExitCode.ADDRESS_UNAVAILABLE}
)


# Too many open files: nobody's fault, and over once others have closed theirs.
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})
OPEN_FILES_HINT = "raise the limit on open files (ulimit -n)"


class Category(enum.StrEnum):
    """What kind of thing keeps an engine from running, for alerts and for people."""

    MEMORY = "memory"
    PORT = "port"
    MODEL = "model"
    CONFIGURATION = "configuration"
    PERMISSION = "permission"
    KERNEL = "kernel"
    UNKNOWN = "unknown"


class LifecycleError(Exception):
    """Base of all errors a user can meet.

    Args:
        message: what is wrong and where, one line.
        code: stable identifier in snake_case for logs and `/lifecycle`.
        hint: what to do about it, or None.
        root_cause: the deepest cause known (for example the engine's own words), or None.
        category: one of Category where an engine failed to start or died, else None.
    """

    exit_code: ExitCode = ExitCode.ENGINE_START_FAILED
    default_code = "lifecycle_error"
    told: Sequence[str] = ()  # lines that say more, for before the last one of a failed run

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        root_cause: str | None = None,
        category: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.root_cause = root_cause
        self.category = category

    def scrub(self, scrub: Callable[[str], str]) -> None:
        """Takes secrets out of each of its texts."""
        self.message = scrub(self.message)
        self.args = (self.message,)
        self.hint = self.hint and scrub(self.hint)
        self.root_cause = self.root_cause and scrub(self.root_cause)
        self.told = [scrub(line) for line in self.told]

    def line(self) -> str:
        """The error as the one line that ends a failed run."""
        parts = [self.message]
        if self.root_cause and self.root_cause not in self.message:
            parts.append(f"cause: {self.root_cause}")
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "; ".join(map(one_line, parts))


class ArgumentsError(LifecycleError):
    """A flag or a configuration value is wrong, unknown or in conflict (exit 2)."""

    exit_code = ExitCode.BAD_ARGUMENTS
    default_code = "bad_arguments"


class InputMissingError(LifecycleError):
    """The model or another input is not there or cannot be read (exit 66)."""

    exit_code = ExitCode.INPUT_MISSING
    default_code = "input_missing"


class AddressError(LifecycleError):
    """An address is taken or not allowed, or the model's name is taken at the gateway (exit 69)."""

    exit_code = ExitCode.ADDRESS_UNAVAILABLE
    default_code = "address_unavailable"


class StartError(LifecycleError):
    """The engine or its API could not start, cause not among the others (exit 70)."""

    exit_code = ExitCode.ENGINE_START_FAILED
    default_code = "engine_start_failed"


class LimitError(StartError):
    """Not enough memory, or another limit of the system (exit 71)."""

    exit_code = ExitCode.SYSTEM_LIMIT
    default_code = "system_limit"


class EngineDiedError(LifecycleError):
    """The engine died or hung after READY and no restart is left (exit 75)."""

    exit_code = ExitCode.ENGINE_DIED
    default_code = "engine_died"


class DeadlineError(LifecycleError):
    """An action outran its deadline. The exit code is that of a failed start."""

    default_code = "deadline_exceeded"


class StopDeadlineError(LifecycleError):
    """The stop outran its deadline: something of ours could not be released (exit 124)."""

    exit_code = ExitCode.STOP_OUTRAN_DEADLINE
    default_code = "stop_outran_deadline"


class TransitionRefused(LifecycleError):
    """A trigger has no row from this state, or a guard does not hold. Nothing has changed."""

    default_code = "transition_refused"


class EngineNotUp(LifecycleError):
    """There is no engine to ask, or it went away before it answered."""

    default_code = "engine_not_up"


class CommandFailed(LifecycleError):
    """An operator's command was tried and failed. The worker lives on."""

    default_code = "command_failed"


def exit_code_of(error: BaseException) -> ExitCode:
    """What a process ends with that this error ends."""
    if isinstance(error, LifecycleError):
        return error.exit_code
    return ExitCode.ENGINE_START_FAILED


def report(
    error: BaseException,
    stream: TextIO | None = None,
    scrub: Callable[[str], str] = str,
) -> int:
    """Prints the one line that ends a failed run; returns the exit code.

    Args:
        stream: where to; default: stderr.
        scrub: takes secrets out of each line; by default nothing is.
    """
    if isinstance(error, LifecycleError):
        text = error.line()
    else:
        text = f"{type(error).__name__}: {one_line(str(error))}"
    # Where it cannot be said (a full disk, a closed pipe), the exit code still tells.
    with contextlib.suppress(OSError, ValueError):
        for line in error.told if isinstance(error, LifecycleError) else ():
            print(one_line(scrub(line)), file=stream or sys.stderr)
        print(f"ichat-lifecycle: error: {scrub(text)}", file=stream or sys.stderr, flush=True)
    return int(exit_code_of(error))
