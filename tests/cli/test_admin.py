"""`treadle admin` against a real database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.domain.fairness import WeightClass
from treadle.domain.ids import TenantId
from treadle.domain.keys import key_digest
from treadle.store import Store

RUNNER = CliRunner(env={"COLUMNS": "200"})


def classes(data: Path) -> dict[TenantId, WeightClass]:
    async def look() -> dict[TenantId, WeightClass]:
        store = await Store.open(f"sqlite:///{data}/treadle.db")
        try:
            return await store.tenants.classes()
        finally:
            await store.close()

    return asyncio.run(look())


def set_class(data: Path, tenant: str, weight_class: str) -> None:
    done = RUNNER.invoke(app, ["admin", "tenants", "set", tenant, "--class", weight_class, "--data", str(data)])
    assert done.exit_code == 0, done.stderr


def test_a_class_is_set_changed_and_taken_back(tmp_path: Path) -> None:
    set_class(tmp_path, "alice", "bulk")
    set_class(tmp_path, "open:0123", "interactive")
    assert classes(tmp_path) == {
        TenantId("user:alice"): WeightClass.BULK,
        TenantId("open:0123"): WeightClass.INTERACTIVE,
    }
    listed = RUNNER.invoke(app, ["admin", "tenants", "list", "--data", str(tmp_path)])
    assert "user:alice" in listed.stdout
    assert "bulk" in listed.stdout

    set_class(tmp_path, "alice", "interactive")
    set_class(tmp_path, "open:0123", "standard")
    assert classes(tmp_path) == {TenantId("user:alice"): WeightClass.INTERACTIVE}


def test_the_user_of_a_key_is_the_tenant_that_is_set(tmp_path: Path) -> None:
    key = RUNNER.invoke(app, ["keys", "create", "alice", "--data", str(tmp_path)]).stdout.strip()
    set_class(tmp_path, "alice", "bulk")

    async def tenant_of_key() -> TenantId:
        store = await Store.open(f"sqlite:///{tmp_path}/treadle.db")
        try:
            record = await store.keys.find(key_digest(key))
            assert record is not None
            return record.tenant_id
        finally:
            await store.close()

    assert list(classes(tmp_path)) == [asyncio.run(tenant_of_key())]


@pytest.mark.parametrize("arguments", [["set", "alice", "--class", "best"], ["set", "al ice", "--class", "bulk"]])
def test_what_is_no_class_or_no_user_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    done = RUNNER.invoke(app, ["admin", "tenants", *arguments, "--data", str(tmp_path)])
    assert done.exit_code != 0
    assert not (tmp_path / "treadle.db").exists() or classes(tmp_path) == {}


def test_a_directory_without_a_class_says_that_all_are_standard(tmp_path: Path) -> None:
    set_class(tmp_path, "alice", "standard")
    listed = RUNNER.invoke(app, ["admin", "tenants", "list", "--data", str(tmp_path)])
    assert "all are standard" in listed.stderr
