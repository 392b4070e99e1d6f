"""A process whose user has no home, as containers under an arbitrary UID have none."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from structlog.testing import capture_logs

from ichat_lifecycle import environment, home
from ichat_lifecycle.adapters.evidence import default_directory
from ichat_lifecycle.beacon import token_file
from ichat_lifecycle.errors import LimitError
from ichat_lifecycle.start_history import StartHistory


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> Iterator[Path]:
    """No HOME, no entry in /etc/passwd, and no variable that names a directory."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    yield temporary


def test_it_gets_a_home_of_its_own_and_the_same_again(nobody: Path) -> None:
    environ: dict[str, str] = {}
    provided = home.provide_home(environ)
    assert provided == nobody / f"ichat-lifecycle-{os.geteuid()}"
    assert environ == {"HOME": str(provided), "USER": f"uid-{os.geteuid()}"}
    assert stat.S_IMODE(provided.stat().st_mode) == 0o700
    assert home.private_home() == provided


@pytest.mark.parametrize("what", ["open to others", "a link", "a file"])
def test_a_directory_that_somebody_else_may_have_made_is_not_trusted(
    nobody: Path, what: str
) -> None:
    taken = nobody / f"ichat-lifecycle-{os.geteuid()}"
    if what == "a link":
        (nobody / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(nobody / "elsewhere")
    elif what == "a file":
        taken.touch()
    else:
        taken.mkdir()
        taken.chmod(0o777)
    other = home.private_home()
    assert other not in (taken, nobody / "elsewhere")
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


def test_what_the_user_set_stays(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("USER", "me")
    environ: dict[str, str] = {}
    assert home.provide_home(environ) is None
    assert environ == {}


@pytest.mark.usefixtures("nobody")
def test_all_that_is_kept_for_a_user_has_a_place_without_a_home() -> None:
    """None of them raises, also where a program embeds the worker and HOME is not ours to set."""
    places = [default_directory(), token_file(7), home.cache_directory()]
    assert all(place.is_relative_to(home.private_home()) for place in places)
    StartHistory().record("model", 3.0)
    assert StartHistory().expected("model") is not None


def test_without_a_temporary_directory_either_it_is_a_clear_error(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> NoReturn:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(LimitError, match="no temporary one") as caught:
        environment.prepare({})
    assert "TMPDIR" in str(caught.value.hint)


def test_a_home_that_cannot_be_written_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    """As HOME=/ of a container is for anybody but root, whom no mode keeps out."""
    monkeypatch.setattr(environment, "can_make", lambda directory: False)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with capture_logs() as logs:
        environment.log_all(environment.prepare({"HOME": "/"}))
    (log,) = logs
    assert (log["event"], log["log_level"], log["path"]) == ("home_unwritable", "warning", "/")
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        assert name in log["hint"]


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "VLLM_CACHE_ROOT"])
def test_a_named_cache_that_cannot_be_written_is_warned_of(name: str, tmp_path: Path) -> None:
    """And counts in place of the home."""
    assert environment.prepare({name: str(tmp_path / "made later")}) == ()
    path = tmp_path / "file"
    path.touch()
    with capture_logs() as logs:
        environment.log_all(environment.prepare({name: str(path / "below")}))
    (log,) = logs
    assert (log["event"], log["name"]) == ("cache_unwritable", name)
    assert name in log["hint"]


def test_whether_a_directory_can_be_made(tmp_path: Path) -> None:
    assert environment.can_make(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    assert not environment.can_make(tmp_path / "file" / "b")
