"""The first admin key through a file."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from gateway_support import Harness, ok, refused

from treadle.domain.keys import is_own_form, key_digest, new_key
from treadle.domain.records import KeyRecord
from treadle.errors import ConfigError
from treadle.gateway.auth import OPEN_CACHE_S
from treadle.gateway.authenticators.bootstrap import _write, register_first_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin.key"


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def text_of(path: Path) -> str:
    return path.read_text()


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def files_beside(path: Path) -> list[Path]:
    return list(path.parent.glob("*.key*"))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_a_key_is_made_and_written_for_the_servers_user_alone(
    gateway: Harness, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    await register_first_key(gateway.store, path)

    key = text_of(path).strip()
    assert is_own_form(key)
    assert mode_of(path) == 0o600
    gateway.clock.advance(OPEN_CACHE_S)
    listed = await gateway.client.get("/admin/v1/keys", headers={"X-API-Key": key})
    assert [(one["user"], one["is_admin"], one["name"]) for one in ok(listed)["keys"]] == [("admin", True, "bootstrap")]
    refused(await gateway.get("sessions"), 401)
    assert key not in "".join(capfd.readouterr())
    events = ok(await gateway.client.get("/admin/v1/audit", headers={"X-API-Key": key}))
    assert [event["event"] for event in events["events"]] == ["key.created"]


async def test_a_key_that_a_secrets_manager_put_there_is_registered(gateway: Harness, path: Path) -> None:
    key = new_key()
    put(path, f"{key}\n".encode())

    for _ in range(2):
        await register_first_key(gateway.store, path)

    assert text_of(path) == key + "\n"
    record = await gateway.store.keys.find(key_digest(key))
    assert record is not None
    assert record.is_admin
    assert len(await gateway.store.keys.list()) == 1


async def test_once_there_was_a_key_nothing_happens(gateway: Harness, path: Path) -> None:
    record = await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
    await gateway.store.keys.revoke(record.key_id)

    await register_first_key(gateway.store, path)
    assert bytes_of(path) is None

    put(path, new_key().encode())
    await register_first_key(gateway.store, path)
    assert len(await gateway.store.keys.list()) == 1


async def test_a_revoked_first_key_does_not_come_back(gateway: Harness, path: Path) -> None:
    await register_first_key(gateway.store, path)
    [record] = await gateway.store.keys.list()
    await gateway.store.keys.revoke(record.key_id)

    await register_first_key(gateway.store, path)

    refused(await gateway.client.get("/admin/v1/keys", headers={"X-API-Key": text_of(path).strip()}), 401)
    assert len(await gateway.store.keys.list()) == 1


async def test_a_crash_before_the_key_is_stored_is_mended_by_the_next_start(
    gateway: Harness, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object, **__: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(gateway.store.keys, "add_first", crash)
        with pytest.raises(ConnectionError):
            await register_first_key(gateway.store, path)
    key = text_of(path)

    await register_first_key(gateway.store, path)

    assert text_of(path) == key
    assert await gateway.store.keys.find(key_digest(key.strip())) is not None


@pytest.mark.parametrize(
    "content", [b"", b"hunter2", b"tml-admin", b"tml-" + b"a b" * 20, b"tml-" + b"x" * 600, b"tml-\xff" + b"x" * 40]
)
async def test_a_file_that_holds_no_key_is_refused_and_kept(gateway: Harness, path: Path, content: bytes) -> None:
    put(path, content)

    with pytest.raises(ConfigError, match="bootstrap_key_file") as caught:
        await register_first_key(gateway.store, path)

    assert "hunter2" not in caught.value.message
    assert bytes_of(path) == content
    assert not await gateway.store.keys.any_ever()


async def test_a_place_that_cannot_be_written_is_refused(gateway: Harness, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        await register_first_key(gateway.store, tmp_path / "missing" / "admin.key")

    assert not await gateway.store.keys.any_ever()


async def test_a_server_that_reads_what_another_one_writes_takes_nothing_away(
    gateway: Harness, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers with one file: the second one finds the key of the first and stores it before the first does."""
    add_first = gateway.store.keys.add_first

    async def late(*arguments: Any, **options: Any) -> KeyRecord | None:
        monkeypatch.setattr(gateway.store.keys, "add_first", add_first)
        await register_first_key(gateway.store, path)
        return await add_first(*arguments, **options)

    monkeypatch.setattr(gateway.store.keys, "add_first", late)
    await register_first_key(gateway.store, path)

    [record] = await gateway.store.keys.list()
    assert record == await gateway.store.keys.find(key_digest(text_of(path).strip()))


async def test_servers_that_start_together_over_one_file_all_start(gateway: Harness, path: Path) -> None:
    await asyncio.gather(*(register_first_key(gateway.store, path) for _ in range(8)))

    [record] = await gateway.store.keys.list()
    assert record == await gateway.store.keys.find(key_digest(text_of(path).strip()))
    assert mode_of(path) == 0o600
    assert files_beside(path) == [path]


async def test_a_crash_while_the_file_is_written_is_mended_by_the_next_start(
    gateway: Harness, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            _write(path, new_key())

    await register_first_key(gateway.store, path)

    assert await gateway.store.keys.find(key_digest(text_of(path).strip())) is not None


async def test_what_is_no_file_is_refused_and_not_waited_for(gateway: Harness, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="bootstrap_key_file"):
            await asyncio.wait_for(register_first_key(gateway.store, place), timeout=10.0)

    assert not await gateway.store.keys.any_ever()


async def test_a_link_to_nowhere_is_not_followed(gateway: Harness, path: Path, tmp_path: Path) -> None:
    link(path, tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match="bootstrap_key_file"):
        await register_first_key(gateway.store, path)

    assert bytes_of(tmp_path / "elsewhere") is None
