"""`treadle db` against real databases and real blobs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from treadle.blobs import open_blobs
from treadle.cli.app import main
from treadle.cli.db import DATABASE_COPY, DUMP, app
from treadle.domain.ids import BlobKey, PoolName, SamplingSessionId, SessionId, TenantId
from treadle.domain.records import SamplingSessionRecord, SessionRecord
from treadle.domain.states import SessionState
from treadle.store import Store

T = TypeVar("T")

RUNNER = CliRunner(env={"COLUMNS": "200"})
KEYS = ("samplers/one.safetensors", "samplers/two.safetensors")


def on_store(url: str, work: Callable[[Store], Awaitable[T]]) -> T:
    async def run() -> T:
        store = await Store.open(url)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def fill(store: Store) -> None:
    """A session with two sampling sessions, each of which names a blob."""
    session, tenant = SessionId("s"), TenantId("user:ada")
    await store.sessions.create(SessionRecord(session, tenant, SessionState.ACTIVE, 1.0, 1.0))
    record = SamplingSessionRecord(SamplingSessionId(""), session, tenant, PoolName("p"), "p", 1.0)
    for key in KEYS:
        await store.sampling.create(
            replace(record, sampling_session_id=SamplingSessionId(f"s:sample:{key}"), blob_key=BlobKey(key))
        )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    on_store(f"sqlite:///{folder}/treadle.db", fill)
    blobs = open_blobs(str(folder / "blobs"))
    for key in KEYS:
        blobs.write(key, key.encode())
    blobs.write("payloads/nobody", b"x")
    return folder


def test_a_sound_database_is_called_sound(data: Path) -> None:
    done = RUNNER.invoke(app, ["check", "--data", str(data)])
    assert done.exit_code == 0, done.stderr
    assert "sound" in done.stdout
    assert "2 blobs are named by rows" in done.stdout
    assert "1 blobs are named by none" in done.stdout


def test_missing_blobs_and_dangling_rows_are_problems(data: Path) -> None:
    open_blobs(str(data / "blobs")).delete(KEYS[0])
    engine = sa.create_engine(f"sqlite:///{data}/treadle.db")
    with engine.begin() as conn:
        # Without foreign_keys = ON, as another program would.
        conn.exec_driver_sql("UPDATE sampling_sessions SET session_id = 'gone'")
    engine.dispose()
    done = RUNNER.invoke(app, ["check", "--data", str(data)])
    assert done.exit_code == 1
    assert f"blob {KEYS[0]} is named by a row and is not there" in done.stderr
    assert "of table sampling_sessions refers to a row of sessions" in done.stderr
    assert "3 problems" in done.stderr


def test_an_old_schema_is_named_and_upgraded(tmp_path: Path) -> None:
    async def create_empty() -> None:
        await (await Store.open(f"sqlite:///{tmp_path}/treadle.db", migrate=False)).ping()

    asyncio.run(create_empty())
    done = RUNNER.invoke(app, ["check", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert "treadle db upgrade" in done.stderr
    first = RUNNER.invoke(app, ["upgrade", "--data", str(tmp_path)])
    assert "upgraded from nothing to" in first.stdout
    again = RUNNER.invoke(app, ["upgrade", "--data", str(tmp_path)])
    assert "already at" in again.stdout
    assert RUNNER.invoke(app, ["check", "--data", str(tmp_path)]).exit_code == 0


def test_a_backup_is_a_data_directory_with_all_that_rows_name(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup"
    done = RUNNER.invoke(app, ["backup", str(target), "--data", str(data)])
    assert done.exit_code == 0, done.stderr
    assert (target / DATABASE_COPY).is_file()
    copies = open_blobs(str(target / "blobs"))
    assert {key: copies.read(key) for key in KEYS} == {key: key.encode() for key in KEYS}
    assert not copies.exists("payloads/nobody")
    assert RUNNER.invoke(app, ["check", "--data", str(target)]).exit_code == 0
    with pytest.raises(SystemExit) as again:
        main(["db", "backup", str(target), "--data", str(data)])
    assert again.value.code == 2, "a backup was written over"


def test_a_backup_that_lacks_a_blob_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_blobs(str(data / "blobs")).delete(KEYS[1])
    with pytest.raises(SystemExit) as ended:
        main(["db", "backup", str(tmp_path / "backup"), "--data", str(data)])
    assert ended.value.code != 0
    assert KEYS[1] in capsys.readouterr().err


@pytest.mark.postgres
def test_postgresql_is_dumped_by_its_own_tool(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_store(postgres_url, fill)
    blobs = open_blobs(str(tmp_path / "data" / "blobs"))
    for key in KEYS:
        blobs.write(key, key.encode())
    monkeypatch.setenv("TREADLE_STORE__URL", postgres_url)
    arguments = ["--data", str(tmp_path / "data")]
    assert RUNNER.invoke(app, ["check", *arguments]).exit_code == 0
    if shutil.which("pg_dump") is not None:
        done = RUNNER.invoke(app, ["backup", str(tmp_path / "with"), *arguments])
        assert done.exit_code == 0, done.stderr
        assert (tmp_path / "with" / DUMP).stat().st_size > 1000
        assert open_blobs(str(tmp_path / "with" / "blobs")).exists(KEYS[0])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["db", "backup", str(tmp_path / "without"), *arguments])
    said = capsys.readouterr().err
    assert "pg_dump --format=custom" in said
    assert "password" not in said
