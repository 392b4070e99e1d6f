"""vLLM's own variables, checked in a twentieth of a second, without importing vLLM.

vLLM reads each of them when it needs it: a bad one ends a start after the imports, or an engine's
process in the middle of a load.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ichat_lifecycle.errors import ArgumentsError
from ichat_lifecycle.redact import is_secret

# What Kubernetes puts into NAME_PORT for a Service called `name`.
_SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://\S+:\d+")
LINK_HINT = (
    "Kubernetes sets it for a Service of this name: set enableServiceLinks: false in the Pod's"
    " spec, or rename the Service"
)
# In place of these a reader that wants to import them finds nothing: that takes seconds.
_EXPENSIVE = ("vllm", "torch")


def check(environ: Mapping[str, str]) -> None:
    """Has vLLM's own readers read those of its variables that are set.

    Where vLLM is not there, or keeps its readers elsewhere, only VLLM_PORT is looked at.

    Raises:
        ArgumentsError: one of them cannot be read; vLLM's reason, and what to do.
    """
    _check_port(environ)
    for name, read in _readers().items():
        if name in environ:
            _check(name, environ[name], read)


def _check_port(environ: Mapping[str, str]) -> None:
    port = environ.get("VLLM_PORT", "0")
    if not port.strip().isdecimal():
        raise _error("VLLM_PORT", port, "expected an integer")


def _check(name: str, value: str, read: Callable[[], Any]) -> None:
    # A reader may print, and import what it needs; an error of another kind is not about the value.
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), _no_imports():
            read()
    except ValueError as error:
        raise _error(name, value, " ".join(str(error).split())) from error
    except Exception:
        return


def _error(name: str, value: str, why: str) -> ArgumentsError:
    shown = "***" if is_secret(name) else value
    link = _SERVICE_LINK.fullmatch(value)
    return ArgumentsError(
        f"{name}={shown}: {'a link to a Service' if link else why}",
        code="service_link" if link else "bad_variable",
        hint=LINK_HINT if link else "correct the variable, or unset it",
    )


def _readers() -> Mapping[str, Callable[[], Any]]:
    """vLLM's variables with what reads each of them, from a copy of its module `envs`."""
    try:
        package = importlib.util.find_spec("vllm")
        (place, *_) = (package and package.submodule_search_locations) or ("",)
        spec = importlib.util.spec_from_file_location("_envs_of_vllm", Path(place) / "envs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with _no_imports():
            spec.loader.exec_module(module)
    except Exception:
        return {}
    readers: Any = getattr(module, "environment_variables", None)
    return readers if isinstance(readers, Mapping) else {}


@contextlib.contextmanager
def _no_imports() -> Iterator[None]:
    """An import of what is expensive fails at once, unless it is there already."""
    missing = [name for name in _EXPENSIVE if name not in sys.modules]
    blocked: dict[str, Any] = dict.fromkeys(missing)
    sys.modules.update(blocked)
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)
