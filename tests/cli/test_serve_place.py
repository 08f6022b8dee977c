"""A server looks whether its blobs are where the database says, before it takes every run for lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.blobs import LocalBlobs, open_blobs
from treadle.domain.ids import BlobKey, PoolName, SamplingSessionId, SessionId, TenantId
from treadle.domain.records import SamplingSessionRecord, SessionRecord
from treadle.domain.states import SessionState
from treadle.errors import ConfigError, StoreUnavailable
from treadle.server import check_blobs
from treadle.store import Store


async def name(store: Store, *keys: str, seq_id: int | None = None) -> None:
    """seq_id: of the save without a name that made them."""
    session, tenant = SessionId("s"), TenantId("user:ada")
    if await store.sessions.get(session) is None:
        await store.sessions.create(SessionRecord(session, tenant, SessionState.ACTIVE, 1.0, 1.0))
    for key in keys:
        await store.sampling.create(
            SamplingSessionRecord(
                SamplingSessionId(f"s:sample:{key}"),
                session,
                tenant,
                PoolName("p"),
                "p",
                1.0,
                blob_key=BlobKey(key),
                seq_id=seq_id,
            )
        )


async def test_a_place_without_any_of_the_named_files_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    store = await Store.open(sqlite_url)
    blobs = open_blobs(str(tmp_path / "blobs"))
    await check_blobs(store, blobs, place="here")  # a new one names nothing
    await name(store, "states/0", seq_id=3)
    await check_blobs(store, blobs, place="here")  # which may be on its way
    assert await store.upkeep.unnamed_versions() == ["states/0"]
    await name(store, "states/a", "states/b")
    with pytest.raises(ConfigError, match=r"here has none of the files .* states/a .*TREADLE_BLOBS__URL"):
        await check_blobs(store, blobs, place="here")
    blobs.write("states/b", b"1")
    await check_blobs(store, blobs, place="here")
    await store.close()


async def test_a_place_that_does_not_answer_is_no_other_place(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_self: LocalBlobs, _key: str) -> bool:
        raise StoreUnavailable("the blob store could not look up: timed out")

    store = await Store.open(sqlite_url)
    await name(store, "states/a")
    monkeypatch.setattr(LocalBlobs, "exists", away)
    await check_blobs(store, open_blobs(str(tmp_path / "blobs")), place="here")
    await store.close()
