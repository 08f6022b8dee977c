"""The operators' picture: read whole, versioned, followed by a watch."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.policy import Policies, Quota, Scope
from treadle.store import Store
from treadle.store.policies import changed
from treadle.store.policy_watch import PolicyWatch
from treadle.store.tables import quotas

ALICE = TenantId("user:alice")


async def set_quota(store: Store, scope: str, value: int, quota: str = "max_lora_rank") -> None:
    def write(conn: sa.Connection) -> None:
        conn.execute(quotas.insert(), {"scope": scope, "quota": quota, "value": value, "updated_at": 1.0})
        changed(conn, 1.0)

    await store._writer.run(write)


async def test_nothing_decided_is_version_0(store: Store) -> None:
    assert await store.policies.version() == 0
    assert await store.policies.read() == Policies()


async def test_the_narrowest_scope_decides(store: Store) -> None:
    await set_quota(store, "default", 8)
    await set_quota(store, "tenant:user:alice", 16)
    await set_quota(store, "default", 3, "a_quota_of_a_newer_server")
    picture = await store.policies.read()
    assert picture.version == 3
    assert picture.quota(ALICE, Quota.RANK) == 16
    assert picture.quota(TenantId("user:bob"), Quota.RANK) == 8
    assert picture.quota(ALICE, Quota.CONTEXT) is None
    member = Policies(
        quotas={"organization:acme": {Quota.RANK: 4}, "default": {Quota.RANK: 8}}, organizations={ALICE: "acme"}
    )
    assert member.quota(ALICE, Quota.RANK) == 4


def test_scopes_are_read_as_they_are_written() -> None:
    for scope in (Scope("default"), Scope("organization", "acme"), Scope("tenant", "user:alice")):
        assert Scope.parse(str(scope)) == scope
    hopeless = ("tenant:alice", "tenant:*", "tenant:user:a/b", "tenant:user:a b", "organization:*", "organization: a")
    for text in ("", "default:", "default:x", "tenant", "tenant:", "team:x", *hopeless):
        try:
            scope = Scope.parse(text)
        except ValueError:
            continue
        assert (text, scope) == ("default:", Scope("default"))


async def test_a_watch_follows_what_another_process_writes(store: Store) -> None:
    watch = PolicyWatch(store, every_s=0.01)
    await watch.start()
    try:
        assert watch.now.version == 0
        await set_quota(store, "default", 8)
        async with asyncio.timeout(10):
            while watch.now.quota(ALICE, Quota.RANK) != 8:  # noqa: ASYNC110  # its task is waited for
                await asyncio.sleep(0.01)
    finally:
        await watch.stop()
