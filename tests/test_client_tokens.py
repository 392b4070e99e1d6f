"""A fleet's token that cannot be sent, wherever a command has it from; and a URL's password."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ichat_lifecycle.beacon import FLEET_TOKEN_VARIABLE
from ichat_lifecycle.client import fleet_commands, fleets
from ichat_lifecycle.client.fleets import Supervisor

BAD = ["s3c\nret-token", "s3crét-token", "s3c\0ret-token", "s3c\tret-token", "s3c\x1b]0;ret-token"]


@pytest.mark.parametrize("source", ["flag", "variable"])
@pytest.mark.parametrize("token", [bad for bad in BAD if "\0" not in bad])
def test_it_is_refused_before_it_is_sent_and_not_shown(
    token: str, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """httpx would quote all of it in its error."""

    async def find_fleet(_: str | None) -> Supervisor:
        return Supervisor("http://127.0.0.1:9", token="kept")

    monkeypatch.setattr(fleet_commands, "find_fleet", find_fleet)
    monkeypatch.delenv(FLEET_TOKEN_VARIABLE, raising=False)
    if source == "variable":
        monkeypatch.setenv(FLEET_TOKEN_VARIABLE, token)
    given = token if source == "flag" else None
    args = argparse.Namespace(fleet=None, token=given, name=None, all=True, now=False)
    assert fleet_commands.stop(args) == 2
    printed = capsys.readouterr()
    assert "the fleet's token cannot be sent" in printed.err
    for piece in ("s3c", "ret", "crét"):
        assert piece not in printed.err.replace("character", "") + printed.out


@pytest.mark.parametrize("content", [token.encode() for token in BAD] + [b"\xff\xfe", b""])
def test_a_file_with_anything_in_it_is_no_traceback(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "1.token"
    path.write_bytes(content)
    path.chmod(0o600)
    monkeypatch.setattr(fleets, "token_file", lambda pid: path)
    found = fleets._token_of(1)
    assert found is None


def test_the_password_of_a_url_is_in_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(fleet="http://me:s3cret@127.0.0.1:9", name="a", token=None)
    assert fleet_commands.restart(args) != 0
    assert "http://***@127.0.0.1:9" in capsys.readouterr().err
