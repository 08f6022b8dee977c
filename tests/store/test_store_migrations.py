"""Old schema, new code: a database that the first release wrote comes up with its runs usable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from store_builders import MODEL, POOL, SAMPLER, SESSION, TENANT, checkpoint, done, lead, op, sample, snapshot

from treadle.domain.ids import ModelId
from treadle.domain.ops import LoraSpec, OpKind
from treadle.domain.records import FinishedCycle, ModelAdvance, RunLogEntry
from treadle.domain.stability import recorded
from treadle.domain.states import ModelState, RequestState
from treadle.domain.usage import SampleUsage
from treadle.store import Store, migrate
from treadle.store.checkpoints import row_of
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.lora_json import lora_to_json
from treadle.store.tables import metadata

EXACT, SEED, BEHIND, LOST, NEW = (ModelId(f"s1:train:{n}") for n in range(5))


@pytest.fixture
async def old_url(empty_database_url: str) -> str:
    """A database of version 0001, as a server left it that was killed in the middle of its work."""
    database = Database.of(empty_database_url)

    def fill(conn: sa.Connection) -> None:
        config = migrate._config()
        config.attributes["connection"] = conn
        command.upgrade(config, "0001")
        old = sa.MetaData()
        old.reflect(conn)
        for name, rows in _old_rows().items():
            for row in rows:
                conn.execute(old.tables[name].insert(), row)

    await database.write(fill)
    await database.close()
    return empty_database_url


async def test_run_of_the_old_schema_keeps_an_exact_snapshot(old_url: str) -> None:
    store = await Store.open(old_url)
    (exact,) = await store.snapshots.newest(EXACT)
    assert (exact.seq_id, exact.blob_key, exact.with_optimizer, exact.created_at) == (4, "states/a", True, 7.0)
    (seed,) = await store.snapshots.newest(SEED)
    assert (seed.seq_id, seed.blob_key) == (0, None)
    # A step was taken behind its snapshot, and the old release kept no log: it cannot be restored, and says so.
    assert await store.snapshots.newest(BEHIND) == ()
    assert await store.snapshots.newest(LOST) == ()
    assert await store.snapshots.newest(NEW) == ()
    record = await store.models.get(EXACT)
    assert record is not None
    assert (record.state, record.next_seq_id, record.changed_seq, record.lora.rank) == (ModelState.READY, 5, 3, 8)
    await store.close()


async def test_queue_of_the_old_schema_goes_on(old_url: str) -> None:
    store = await Store.open(old_url)
    lines = {line[0].model_id: line for line in await store.requests.heads(POOL)}
    assert [(r.seq_id, r.payload_bytes, r.payload_key) for r in lines[EXACT]] == [(5, 4, None), (6, 0, "payloads/b")]
    assert await store.requests.payload(op(5).request_id) == (b"body", None)
    # The payload of what was done went with its outcome; its blob is no longer there.
    assert await store.requests.payload(op(3).request_id) == (b"", None)
    future = await store.requests.future(op(3).request_id)
    assert future is not None
    assert (future.state, future.result and future.result.body) == (RequestState.DONE, b"result")

    # From here on there is a log.
    lease = await lead(store)
    finished = tuple(done(op(n, OpKind.OPTIM_STEP)) for n in (5, 6))
    await store.cycles.finish(
        lease, FinishedCycle(finished=finished, advances=(ModelAdvance(EXACT, 7, changed_seq=6),))
    )
    assert [r.seq_id for r in await store.requests.log(EXACT, after=4, before=7)] == [5, 6]
    debt = await store.snapshots.debt(EXACT)
    assert (debt.num_payloads, debt.payload_bytes) == (2, 4)
    assert await store.cycles.finish(lease, FinishedCycle(snapshots=(snapshot(6),))) == ()
    assert [s.seq_id for s in await store.snapshots.newest(EXACT)] == [6, 4]
    await store.close()


async def test_what_else_the_old_schema_holds_is_read(old_url: str) -> None:
    store = await Store.open(old_url)
    assert await store.schema_is_current()
    assert await store.run_log.read(MODEL) == [RunLogEntry(MODEL, 1, OpKind.FORWARD_BACKWARD, 1.0, {"loss:sum": 1.0})]
    sampler = await store.sampling.get(SAMPLER)
    assert sampler is not None
    assert (sampler.seq_id, sampler.is_dropped, sampler.blob_key) == (None, False, "states/sampler")
    used_at = "SELECT last_used_at FROM sampling_sessions ORDER BY sampling_session_id"
    found = await store._database.read(lambda conn: conn.exec_driver_sql(used_at).scalars().all())
    # The time of its newest sample, or of its creation.
    assert found == [9.0, 2.0]
    await store.close()


async def test_what_version_0002_holds_is_read_and_goes_on(old_url: str) -> None:
    database = Database.of(old_url)

    def fill(conn: sa.Connection) -> None:
        config = migrate._config()
        config.attributes["connection"] = conn
        command.upgrade(config, "0002")
        old = sa.MetaData()
        old.reflect(conn)
        columns = set(old.tables["checkpoints"].c.keys())
        row = {name: value for name, value in row_of(checkpoint()).items() if name in columns}
        conn.execute(old.tables["checkpoints"].insert(), row | {"model_id": EXACT})
        if conn.dialect.name == "postgresql":
            # The rows of this test have numbers of their own.
            conn.exec_driver_sql("SELECT setval(pg_get_serial_sequence('requests', 'row_id'), 100)")

    await database.write(fill)
    await database.close()
    store = await Store.open(old_url)
    assert await store.schema_is_current()
    record = await store.checkpoints.find(checkpoint().tinker_path)
    assert record is not None
    assert (record.is_encrypted, record.copied_from) == (False, None)
    sampler = await store.sampling.get(SAMPLER)
    assert sampler is not None
    assert not sampler.is_inflight
    old_session = await store.sessions.get(SESSION)
    assert old_session is not None
    assert tuple(old_session.tags) == ()
    # Old sessions use the new tables: a sample on record, and what it used.
    lease = await lead(store)
    kept = recorded([(np.array([1, 2], np.int32), np.array([-1.0, -2.0], np.float32))], 3)
    await store.requests.enqueue(sample(2))
    await store.cycles.finish_samples(lease, [replace(done(sample(2)), recorded=kept, usage=SampleUsage(3, 2, 0))])
    assert await store.stability.use(SESSION, [f"{SAMPLER}:2:0"]) == {f"{SAMPLER}:2:0": kept[0]}
    events = await store.usage.events(TENANT, since=0, before=2**40)
    assert {event.kind.value: event.amount for event in events} == {"sampling_prefill": 3.0, "sampling_sample": 2.0}
    await store.close()


@pytest.mark.postgres
async def test_migrated_postgresql_is_the_declared_one_to_the_letter(new_postgres_url: Callable[[], str]) -> None:
    """Comparing by reflection overlooks conditions of partial indexes and names of constraints."""
    found = []
    for build in (metadata.create_all, lambda conn: migrate.upgrade(conn, Dialect("postgresql"))):
        database = Database.of(new_postgres_url())
        await database.write(build)
        found.append(await database.read(_postgresql_schema))
        await database.close()
    declared, migrated = found
    assert {item for item in migrated if "alembic_version" not in item} == declared
    assert any("ix_sessions_active" in item and "WHERE" in item for item in declared)


def _postgresql_schema(conn: sa.Connection) -> set[str]:
    """Every index, constraint and column."""
    queries = (
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace",
        "SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable, column_default) "
        "FROM information_schema.columns WHERE table_schema = 'public'",
    )
    return {item for query in queries for item in conn.exec_driver_sql(query).scalars()}


def _old_rows() -> dict[str, list[dict[str, Any]]]:
    run = {
        "session_id": SESSION,
        "tenant_id": TENANT,
        "pool": POOL,
        "base_model": "treadle/tiny",
        "revision": "abc",
        "lora": lora_to_json(LoraSpec(rank=8, seed=1)),
        "state_message": "",
        "user_metadata": {},
        "created_at": 1.0,
        "last_request_at": 7.0,
    }
    runs = [
        (EXACT, "ready", 5, 3, "states/a", 4),
        (SEED, "ready", 1, 0, None, 0),
        (BEHIND, "ready", 4, 3, "states/c", 2),
        (LOST, "lost", 3, 2, None, 2),
        (NEW, "creating", 0, 0, None, -1),
    ]
    sampler = {
        "session_id": SESSION,
        "tenant_id": TENANT,
        "pool": POOL,
        "base_model": "treadle/tiny",
        "created_at": 2.0,
        "blob_key": "states/sampler",
        "model_id": EXACT,
        "client_counter": 0,
        "finished_counter": 1,
    }
    return {
        "sessions": [
            {
                "session_id": SESSION,
                "tenant_id": TENANT,
                "state": "active",
                "created_at": 1.0,
                "last_heartbeat_at": 1.0,
                "sdk_version": "0.38",
                "user_metadata": {},
            }
        ],
        "models": [
            run
            | {
                "model_id": model_id,
                "state": state,
                "next_seq_id": next_seq_id,
                "incarnation": 1,
                "changed_seq": changed_seq,
                "snapshot_key": key,
                "snapshot_seq": snapshot_seq,
                "create_request_id": f"{model_id}:0",
            }
            for model_id, state, next_seq_id, changed_seq, key, snapshot_seq in runs
        ],
        "sampling_sessions": [
            sampler | {"sampling_session_id": SAMPLER},
            sampler | {"sampling_session_id": f"{SAMPLER}1", "model_id": None},
        ],
        "requests": [
            _request(1, 3, "forward_backward", "done", payload_key="payloads/deleted", finished_at=3.0, result_bytes=6),
            _request(2, 5, "optim_step", "queued"),
            _request(3, 6, "optim_step", "queued", payload_key="payloads/b"),
            _request(4, 1, "sample", "done", sampler=SAMPLER, finished_at=9.0, finished_order=1),
        ],
        "payloads": [{"row_id": 2, "body": b"body"}],
        "results": [{"row_id": 1, "content_type": "application/json", "finished_at": 3.0, "body": b"result"}],
        "run_log": [
            {
                "model_id": MODEL,
                "seq_id": 1,
                "kind": "forward_backward",
                "created_at": 1.0,
                "metrics": {"loss:sum": 1.0},
            }
        ],
    }


def _request(
    row_id: int, seq_id: int, kind: str, state: str, *, sampler: str | None = None, **more: Any
) -> dict[str, Any]:
    owner = sampler or EXACT
    return {
        "row_id": row_id,
        "request_id": f"{owner}:{seq_id}",
        "tenant_id": TENANT,
        "pool": POOL,
        "kind": kind,
        "state": state,
        "seq_id": seq_id,
        "num_tokens": 1,
        "quantum_tokens": [1],
        "model_id": None if sampler else EXACT,
        "sampling_session_id": sampler,
        "created_at": 1.0,
        "in_line": state == "queued",
        "is_transient": False,
        **more,
    }
