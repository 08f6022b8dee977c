"""What owners do to their checkpoints, copies of them, and what each leaves in the audit log."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from store_builders import MODEL, OTHER_TENANT, TENANT, checkpoint, done, lead, model, op, session, with_run

from treadle.domain.ids import CheckpointKind, ModelId, SessionId, TinkerPath, parse_tinker_path
from treadle.domain.limits import CHECKPOINT_GRACE_S
from treadle.domain.ops import OpKind
from treadle.domain.records import CheckpointRecord, FinishedCycle, ModelRecord
from treadle.domain.states import ModelState
from treadle.errors import InvalidRequest, NotFound
from treadle.store import Store
from treadle.store.tables import audit_log
from treadle.testing.clock import ManualClock

PATH = parse_tinker_path(checkpoint().tinker_path)
NOBODYS = TinkerPath(MODEL, CheckpointKind.TRAINING, "nothing")
COPY_RUN = ModelId("s2:train:0")


async def with_checkpoint(store: Store, **changes: Any) -> CheckpointRecord:
    await with_run(store)
    record = checkpoint(**changes)
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(record,)))
    return record


async def events(store: Store) -> list[str]:
    query = sa.select(audit_log.c.event).order_by(audit_log.c.audit_id)
    return await store.checkpoints._database.read(lambda conn: list(conn.execute(query).scalars()))


async def test_publishing_is_idempotent_and_ends_with_unpublishing(store: Store) -> None:
    record = await with_checkpoint(store)
    for public in (True, True, False, False):
        assert await store.checkpoints.set_public(PATH, TENANT, public=public)
        assert await store.checkpoints.find(record.tinker_path) == replace(record, public=public)
    assert await events(store) == ["checkpoint_publish"] * 2 + ["checkpoint_unpublish"] * 2


async def test_a_time_to_live_is_set_and_taken_away(store: Store, clock: ManualClock) -> None:
    record = await with_checkpoint(store)
    assert await store.checkpoints.set_expiry(PATH, TENANT, expires_at=clock.now() + 10.0)
    assert await store.checkpoints.set_expiry(PATH, TENANT, expires_at=None)
    clock.advance(20.0)
    assert await store.checkpoints.find(record.tinker_path) == record
    assert await store.checkpoints.set_expiry(PATH, TENANT, expires_at=clock.now() + 10.0)
    clock.advance(10.0)
    assert not await store.checkpoints.exists(record.tinker_path)
    assert not await store.checkpoints.set_expiry(PATH, TENANT, expires_at=None), "what expired does not come back"


async def test_only_its_owner_changes_a_checkpoint(store: Store, clock: ManualClock) -> None:
    record = await with_checkpoint(store)
    for path, tenant in ((PATH, OTHER_TENANT), (NOBODYS, TENANT)):
        assert not await store.checkpoints.set_public(path, tenant, public=True)
        assert not await store.checkpoints.set_expiry(path, tenant, expires_at=clock.now() + 10.0)
        assert not await store.checkpoints.delete_own(path, tenant)
    assert await store.checkpoints.find(record.tinker_path) == record
    assert await events(store) == [], "what did not happen is in no log"


async def test_deleting_takes_the_name_and_leaves_the_blob_to_the_sweep(store: Store) -> None:
    record = await with_checkpoint(store)
    assert await store.checkpoints.delete_own(PATH, TENANT)
    assert not await store.checkpoints.delete_own(PATH, TENANT)
    assert await store.retention.unnamed([record.blob_key]) == (record.blob_key,)
    assert await events(store) == ["checkpoint_delete"]


async def test_a_save_is_in_the_audit_log_once_however_often_its_commit_is_repeated(store: Store) -> None:
    await with_run(store)
    save = op(1, OpKind.SAVE_WEIGHTS)
    await store.requests.enqueue(save)
    lease = await lead(store)
    cycle = FinishedCycle(finished=(done(save),), checkpoints=(checkpoint(seq_id=1),))
    await store.cycles.finish(lease, cycle)
    await store.cycles.finish(lease, cycle)
    assert await events(store) == ["checkpoint_save"]


def copy_of(source: CheckpointRecord, run_id: ModelId = COPY_RUN) -> tuple[ModelRecord, CheckpointRecord]:
    path = TinkerPath(run_id, source.kind, source.name)
    run = replace(
        model(run_id, session_id="s2", tenant=OTHER_TENANT),
        state=ModelState.UNLOADED,
        state_message=f"it holds a copy of {source.tinker_path}",
        next_seq_id=1,
    )
    copy = replace(
        source, model_id=run_id, tenant_id=OTHER_TENANT, tinker_path=str(path), copied_from=source.tinker_path
    )
    return run, copy


async def with_copy(store: Store) -> tuple[CheckpointRecord, CheckpointRecord]:
    """A checkpoint and a copy of it that belongs to somebody else."""
    source = await with_checkpoint(store)
    await store.sessions.create(session("s2", tenant=OTHER_TENANT))
    run, copy = copy_of(source)
    await store.copies.add(run, copy)
    return source, copy


async def test_a_copy_is_listed_under_a_run_of_its_own(store: Store) -> None:
    source, copy = await with_copy(store)
    assert await store.checkpoints.of_model(COPY_RUN) == [copy]
    assert await store.checkpoints.list(OTHER_TENANT, limit=9) == ([copy], 1)
    assert await store.checkpoints.list(TENANT, limit=9) == ([source], 1)
    run = await store.models.get(COPY_RUN)
    assert run is not None
    assert run.state is ModelState.UNLOADED
    assert await events(store) == ["checkpoint_copy"]


@pytest.mark.parametrize("is_source_first", [True, False])
async def test_deleting_either_leaves_the_other_and_its_blob(store: Store, is_source_first: bool) -> None:
    source, copy = await with_copy(store)
    first, second = (source, copy) if is_source_first else (copy, source)
    assert await store.checkpoints.delete_own(parse_tinker_path(first.tinker_path), first.tenant_id)
    assert await store.checkpoints.exists(second.tinker_path)
    assert await store.retention.unnamed([source.blob_key]) == ()
    assert await store.checkpoints.delete_own(parse_tinker_path(second.tinker_path), second.tenant_id)
    assert await store.retention.unnamed([source.blob_key]) == (source.blob_key,)


async def test_an_expired_source_leaves_the_blob_of_its_copy(store: Store, clock: ManualClock) -> None:
    source, _ = await with_copy(store)
    await store.checkpoints.set_expiry(PATH, TENANT, expires_at=clock.now() + 1.0)
    clock.advance(CHECKPOINT_GRACE_S + 2.0)
    assert await store.retention.drop_checkpoints(expired_before=clock.now() - CHECKPOINT_GRACE_S) == (1, ())
    assert await store.retention.unnamed([source.blob_key]) == ()


@pytest.mark.postgres
async def test_a_copy_waits_for_whoever_takes_its_source_away(postgres_url: str) -> None:
    """Whoever takes the last name away deletes the blob, and would not see a copy that is made at the same time."""
    store = await Store.open(postgres_url)
    try:
        source = await with_checkpoint(store)
        await store.sessions.create(session("s2", tenant=OTHER_TENANT))
        async with await psycopg.AsyncConnection.connect(postgres_url.replace("+psycopg", "")) as sweep:
            await sweep.execute("DELETE FROM checkpoints")
            copying = asyncio.create_task(store.copies.add(*copy_of(source)))
            ended, _ = await asyncio.wait([copying], timeout=0.5)
            assert not ended, "it did not wait"
            await sweep.commit()
        with pytest.raises(NotFound):
            await copying
    finally:
        await store.close()


async def test_the_same_copy_again_changes_nothing_even_when_it_was_deleted(store: Store) -> None:
    source, copy = await with_copy(store)
    run, _ = copy_of(source)
    await asyncio.gather(*(store.copies.add(run, copy) for _ in range(4)))
    assert await store.checkpoints.list(OTHER_TENANT, limit=9) == ([copy], 1)
    assert await store.checkpoints.delete_own(parse_tinker_path(copy.tinker_path), OTHER_TENANT)
    await store.copies.add(run, copy)
    assert await store.checkpoints.list(OTHER_TENANT, limit=9) == ([], 0)


async def test_a_copy_is_refused_where_another_run_is(store: Store) -> None:
    source = await with_checkpoint(store)
    run, copy = copy_of(source, MODEL)
    with pytest.raises(InvalidRequest, match="holds something else"):
        await store.copies.add(run, copy)
    assert await store.checkpoints.of_model(MODEL) == [source]


async def test_a_copy_of_what_is_gone_leaves_nothing(store: Store) -> None:
    source = await with_checkpoint(store)
    await store.sessions.create(session(SessionId("s2"), tenant=OTHER_TENANT))
    await store.checkpoints.delete_own(PATH, TENANT)
    run, copy = copy_of(source)
    with pytest.raises(NotFound):
        await store.copies.add(run, copy)
    assert await store.models.get(COPY_RUN) is None
    assert await events(store) == ["checkpoint_delete"]
