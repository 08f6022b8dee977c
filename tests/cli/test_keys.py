"""`treadle keys` against a real database."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle.cli.admin.common import _Options, _options, print_json, print_table
from treadle.cli.app import app
from treadle.domain.keys import key_digest
from treadle.domain.records import KeyRecord
from treadle.store import Store

RUNNER = CliRunner(env={"COLUMNS": "200"})


def find(data: Path, key: str) -> KeyRecord | None:
    async def look() -> KeyRecord | None:
        store = await Store.open(f"sqlite:///{data}/treadle.db")
        try:
            return await store.keys.find(key_digest(key))
        finally:
            await store.close()

    return asyncio.run(look())


def test_a_key_is_printed_once_and_stored_hashed(tmp_path: Path) -> None:
    data = tmp_path / "new"
    created = RUNNER.invoke(app, ["keys", "create", "alice", "--admin", "--data", str(data)])
    assert created.exit_code == 0
    key = created.stdout.strip()
    assert key.startswith("tml-")
    assert "not shown again" in created.stderr
    assert key not in created.stderr
    record = find(data, key)
    assert record is not None
    assert (record.user, record.is_admin, record.revoked_at) == ("alice", True, None)
    listed = RUNNER.invoke(app, ["keys", "list", "--data", str(data)])
    assert "alice" in listed.stdout
    assert key not in listed.stdout
    assert all(key.encode() not in path.read_bytes() for path in data.rglob("*") if path.is_file())


def test_a_revoked_key_stays_listed_and_cannot_be_revoked_again(tmp_path: Path) -> None:
    key = RUNNER.invoke(app, ["keys", "create", "bob", "--data", str(tmp_path)]).stdout.strip()
    record = find(tmp_path, key)
    assert record is not None
    revoke = ["keys", "revoke", str(record.key_id), "--data", str(tmp_path)]
    assert RUNNER.invoke(app, revoke).exit_code == 0
    again = find(tmp_path, key)
    assert again is not None
    assert again.revoked_at is not None
    assert "bob" in RUNNER.invoke(app, ["keys", "list", "--data", str(tmp_path)]).stdout
    refused = RUNNER.invoke(app, revoke)
    assert refused.exit_code != 0
    assert "there is no key with id" in str(refused.exception)


def test_a_key_has_a_name_an_end_and_its_users_organization(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path)]
    options = ["--name", "laptop", "--expires", "30d", "--organization", "acme"]
    before = time.time()
    created = RUNNER.invoke(app, ["keys", "create", "alice", *options, *data])
    after = time.time()
    assert created.exit_code == 0
    record = find(tmp_path, created.stdout.strip())
    assert record is not None
    assert record.expires_at is not None
    assert record.name == "laptop"
    assert before <= record.expires_at - 30 * 86_400 <= after
    listed = RUNNER.invoke(app, ["keys", "list", *data]).stdout
    assert all(word in listed for word in ("alice", "laptop", "acme", "expires"))

    refused = RUNNER.invoke(app, ["keys", "create", "alice", "--organization", "rival", *data])
    assert refused.exit_code != 0
    assert "acme" in str(refused.exception)


@pytest.mark.parametrize("expires", ["", "30", "d", "0d", "-1d", "1y", "99999999w", "1.5d"])
def test_an_end_that_is_none_is_refused(tmp_path: Path, expires: str) -> None:
    refused = RUNNER.invoke(app, ["keys", "create", "alice", "--expires", expires, "--data", str(tmp_path)])
    assert refused.exit_code != 0
    assert "--expires" in str(refused.exception)
    assert not (tmp_path / "treadle.db").exists()


def test_a_name_is_never_markup(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path)]
    assert RUNNER.invoke(app, ["keys", "create", "eve", "--name", "[/bold] [red]", *data]).exit_code == 0

    listed = RUNNER.invoke(app, ["keys", "list", *data])

    assert listed.exit_code == 0
    assert "[/bold] [red]" in listed.stdout


def test_what_users_choose_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;mine\x07\x9b2J [/b] \u202e\n"

    print_table([{"name": hostile, "details": {"name": hostile}}], "name", "details")
    print_json_of({"name": hostile})

    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & {*out}
    assert "\\x1b]0;mine\\x07\\x9b2J [/b] \\u202e" in out
    assert json.loads(out[out.index('{\n  "name"') :]) == {"name": hostile}


def print_json_of(answer: dict[str, object]) -> None:
    token = _options.set(_Options(is_json=True))
    try:
        assert print_json(answer)
    finally:
        _options.reset(token)
