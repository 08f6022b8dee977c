"""Keys, sessions, runs and checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_builders import (
    MODEL,
    OTHER_TENANT,
    POOL,
    REFUSED,
    SESSION,
    TENANT,
    checkpoint,
    count_queued,
    creation,
    lead,
    model,
    session,
    with_run,
)

from treadle.domain.ids import CheckpointKind, ModelId, SessionId
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle
from treadle.domain.states import ModelState, RequestState, SessionState
from treadle.errors import InvalidRequest, ServerError
from treadle.store import Store
from treadle.testing.clock import ManualClock


async def test_key_is_found_by_its_digest_even_when_revoked(store: Store, clock: ManualClock) -> None:
    assert not await store.keys.any_ever()
    added = await store.keys.add("ada", "digest-1", True)
    assert (added.tenant_id, added.is_admin, added.revoked_at) == (TENANT, True, None)
    assert await store.keys.find("digest-1") == added
    assert await store.keys.find("digest-2") is None

    clock.advance(1.0)
    assert await store.keys.revoke(added.key_id)
    assert not await store.keys.revoke(added.key_id)
    assert not await store.keys.revoke(added.key_id + 1)
    assert await store.keys.find("digest-1") == replace(added, revoked_at=clock.now())
    # Open mode ended for good.
    assert await store.keys.any_ever()


async def test_keys_of_a_user_share_a_tenant(store: Store) -> None:
    first = await store.keys.add("ada", "digest-1", False)
    second = await store.keys.add("ada", "digest-2", False)
    assert first.tenant_id == second.tenant_id
    assert await store.keys.list() == [first, second]
    with pytest.raises(ServerError):
        await store.keys.add("bob", "digest-1", False)


async def test_session_is_replayed_by_its_idempotency_key(store: Store) -> None:
    first = await store.sessions.create(session("s1"), "key")
    assert await store.sessions.create(session("s2"), "key") == first
    assert await store.sessions.get(SessionId("s2")) is None
    # The key is the tenant's own, and sessions without one are never the same.
    assert (await store.sessions.create(session("s3", tenant=OTHER_TENANT), "key")).session_id == "s3"
    assert (await store.sessions.create(session("s4"), None)).session_id == "s4"
    assert (await store.sessions.create(session("s5"), None)).session_id == "s5"


async def test_heartbeats_and_the_first_finish_are_kept(store: Store, clock: ManualClock) -> None:
    await store.sessions.create(session(), None)
    await store.sessions.touch([SESSION, SessionId("nobody")])
    assert await store.sessions.get(SESSION) == replace(session(), last_heartbeat_at=clock.now())
    assert await store.sessions.finish(SESSION, "done", "all of it")
    assert not await store.sessions.finish(SESSION, "crashed", None)
    found = await store.sessions.get(SESSION)
    assert found is not None
    assert found.state is SessionState.FINISHED


async def test_heartbeat_wakes_an_expired_session_but_no_finished_one(store: Store, clock: ManualClock) -> None:
    expired = replace(session(), state=SessionState.EXPIRED)
    await store.sessions.create(expired, None)
    clock.advance(5.0)
    await store.sessions.touch([SESSION])
    assert await store.sessions.get(SESSION) == replace(session(), last_heartbeat_at=clock.now())
    assert await store.sessions.finish(SESSION, "done")
    await store.sessions.touch([SESSION])
    assert await store.sessions.finished_among([SESSION]) == {SESSION}


async def test_expired_session_can_be_finished(store: Store) -> None:
    await store.sessions.create(replace(session(), state=SessionState.EXPIRED), None)
    assert await store.sessions.finish(SESSION, "done")
    assert await store.sessions.finished_among([SESSION]) == {SESSION}


async def test_sessions_are_listed_newest_first(store: Store) -> None:
    for n in range(4):
        await store.sessions.create(session(f"s{n}", created_at=float(n)), None)
    await store.sessions.create(session("other", tenant=OTHER_TENANT), None)
    page, total = await store.sessions.list(TENANT, limit=2, offset=1)
    assert ([s.session_id for s in page], total) == (["s2", "s1"], 4)
    assert (await store.sessions.list(None, limit=10))[1] == 5


async def test_run_and_its_request_are_created_together(store: Store) -> None:
    await store.sessions.create(session(), None)
    request_id = await store.models.create(model(), creation())
    assert await store.models.get(MODEL) == model()
    assert await store.models.of_session(SESSION) == [model()]
    future = await store.requests.future(request_id)
    assert future is not None
    assert future.state is RequestState.QUEUED


async def test_retried_create_returns_the_first_request(store: Store) -> None:
    await store.sessions.create(session(), None)
    first = await store.models.create(model(), creation())
    other_request = replace(creation(), request_id=f"{MODEL}:again")
    assert await store.models.create(replace(model(), base_model="other"), other_request) == first
    assert await store.models.get(MODEL) == model()
    assert await count_queued(store, TENANT) == (1, 0)


async def test_run_cannot_be_created_again_in_another_way(store: Store) -> None:
    await store.sessions.create(session(), None)
    await store.models.create(model(), creation())
    with pytest.raises(InvalidRequest, match="taken"):
        await store.models.create(model(), replace(creation(), kind=OpKind.LOAD_WEIGHTS))


async def test_refused_run_says_why(store: Store) -> None:
    await store.sessions.create(session(), None)
    request_id = await store.models.create(model(), creation(failure=REFUSED))
    found = await store.models.get(MODEL)
    assert found is not None
    assert (found.state, found.state_message) == (ModelState.FAILED, REFUSED.message)
    future = await store.requests.future(request_id)
    assert future is not None
    assert future.failure == REFUSED


async def test_run_of_an_unknown_session_leaves_nothing(store: Store) -> None:
    with pytest.raises(ServerError):
        await store.models.create(model(), creation())
    assert await store.models.get(MODEL) is None
    assert await store.requests.get(creation().request_id) is None


async def test_runs_are_listed_by_tenant_and_project(store: Store) -> None:
    await store.sessions.create(session(), None)
    await store.sessions.create(replace(session("s2"), project_id="another"), None)
    for n in range(3):
        model_id = f"s1:train:{n}"
        await store.models.create(model(model_id, created_at=float(n)), creation(model_id))
    await store.models.create(model("s2:train:0", session_id="s2"), creation("s2:train:0"))
    page, total = await store.models.list(TENANT, limit=2, offset=0, project_id="project")
    assert ([m.model_id for m in page], total) == (["s1:train:2", "s1:train:1"], 3)
    assert (await store.models.list(TENANT, limit=0))[1] == 4
    assert await store.models.list(OTHER_TENANT, limit=10) == ([], 0)


async def test_runs_of_a_pool_are_found_by_state(store: Store) -> None:
    await with_run(store, MODEL, "s1:train:1")
    creating = await store.models.of_pool(POOL, [ModelState.CREATING, ModelState.READY])
    assert [m.model_id for m in creating] == [MODEL, "s1:train:1"]
    assert await store.models.of_pool(POOL, [ModelState.LOST]) == []
    assert await store.models.of_pool(POOL, [ModelState.CREATING], limit=1) == creating[:1]
    assert await store.models.of_pool(POOL, [ModelState.CREATING], after=MODEL, limit=1) == creating[1:]


async def test_touch_moves_the_last_request(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await store.models.touch(MODEL)
    assert await store.models.get(MODEL) == replace(model(), last_request_at=clock.now())


async def test_published_checkpoint_is_found_and_listed(store: Store) -> None:
    await with_run(store)
    old, new = checkpoint("a", created_at=1.0), checkpoint("b", created_at=2.0, seq_id=2)
    sampler = checkpoint("c", kind=CheckpointKind.SAMPLER, created_at=3.0, seq_id=3)
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(old, new, sampler)))
    assert await store.checkpoints.find(old.tinker_path) == old
    newest = await store.checkpoints.newest([MODEL, ModelId("nobody")])
    assert newest[MODEL, CheckpointKind.TRAINING] == new
    assert {model_id for model_id, _ in newest} == {MODEL}
    assert await store.checkpoints.of_model(MODEL) == [sampler, new, old]
    assert await store.checkpoints.list(TENANT, limit=2, offset=1) == ([new, old], 3)
    assert await store.checkpoints.list(OTHER_TENANT, limit=2) == ([], 0)


async def test_same_path_replaces_and_deletion_ends_it(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(checkpoint(),)))
    replacing = checkpoint(blob_key="blob/2", created_at=9.0)
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(replacing,)))
    assert await store.checkpoints.of_model(MODEL) == [replacing]
    assert await store.checkpoints.delete(replacing.tinker_path)
    assert not await store.checkpoints.delete(replacing.tinker_path)
    assert not await store.checkpoints.exists(replacing.tinker_path)


async def test_expired_checkpoint_is_gone_before_any_sweep(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    dying = checkpoint(expires_at=clock.now() + 10.0)
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(dying,)))
    assert await store.checkpoints.exists(dying.tinker_path)
    clock.advance(10.0)
    assert not await store.checkpoints.exists(dying.tinker_path)
    assert await store.checkpoints.of_model(MODEL) == []
    assert await store.checkpoints.list(TENANT, limit=10) == ([], 0)
    assert await store.checkpoints.newest([MODEL]) == {}
