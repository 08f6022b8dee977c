"""Keys and verdicts about tokens, on every database."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from treadle.domain.ids import TenantId
from treadle.errors import InvalidRequest
from treadle.store import Store
from treadle.store.audit import Author
from treadle.store.token_verdicts import TokenVerdict
from treadle.testing.clock import ManualClock

OPS = Author(TenantId("user:ops"), "user:ops (key 1)")
METHOD = "modelscope:here:explorers"


def verdict(digest: str = "d1", user: str = "ada", **changes: object) -> TokenVerdict:
    made = TokenVerdict(
        digest=digest,
        method=METHOD,
        tenant_id=TenantId(f"ms:{user}"),
        user=user,
        is_member=True,
        checked_at=1_000.0,
        good_until=1_300.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def put(store: Store, given: TokenVerdict, *, organization: str = "explorers", forget_before: float = 0) -> bool:
    return await store.token_verdicts.put(
        given, source="modelscope", organization=organization, forget_before=forget_before
    )


async def test_only_the_first_of_several_first_keys_is_made(store: Store, database_url: str) -> None:
    stores = [store, *[await Store.open(database_url) for _ in range(3)]]
    # As servers that start together with the same file, and with files of their own.
    digests = ["same", "same", "one", "other"]
    made = await asyncio.gather(
        *(each.keys.add_first("admin", digest, author=OPS) for each, digest in zip(stores, digests, strict=True))
    )
    for each in stores[1:]:
        await each.close()

    assert [record is None for record in made].count(False) == 1
    assert len(await store.keys.list()) == 1
    await store.keys.revoke(1)
    assert await store.keys.add_first("admin", "another", author=OPS) is None


async def test_a_key_is_changed_once_and_noted_once(store: Store, clock: ManualClock) -> None:
    added = await store.keys.add("ada", "digest", False, name="a", expires_at=50.0, author=OPS)
    assert (added.name, added.expires_at, added.created_by) == ("a", 50.0, OPS.actor)
    changed = await store.keys.change(added.key_id, name="b", expires_at=None, author=OPS)
    assert changed == replace(added, name="b", expires_at=None)
    assert await store.keys.change(added.key_id, name="b", expires_at=None, author=OPS) == changed
    assert await store.keys.get(added.key_id) == changed
    assert await store.keys.change(9, name="b", expires_at=None, author=OPS) is None
    await store.keys.revoke(added.key_id, author=OPS)
    with pytest.raises(InvalidRequest, match="revoked"):
        await store.keys.change(added.key_id, name="c", expires_at=None, author=OPS)

    events = await store.audit.read(OPS.tenant_id, since=0, before=clock.now() + 1)
    assert events is not None
    assert [event.event for event in events] == ["key.created", "key.changed", "key.revoked"]
    assert {event.subject for event in events} == {f"key:{added.key_id}"}
    assert "digest" not in str(events)


async def test_a_refused_organization_leaves_nothing(store: Store) -> None:
    await store.keys.add("ada", "digest-1", False, organization="acme")
    with pytest.raises(InvalidRequest):
        await store.keys.add("ada", "digest-2", False, organization="rival")

    assert await store.keys.find("digest-2") is None
    assert await store.keys.organizations([TenantId("user:ada"), TenantId("user:bob")]) == {"user:ada": "acme"}


async def test_ends_of_keys_that_were_not_revoked(store: Store) -> None:
    await store.keys.add("ada", "digest-1", False)
    await store.keys.add("ada", "digest-2", False, expires_at=7.0)
    gone = await store.keys.add("ada", "digest-3", False)
    await store.keys.revoke(gone.key_id)

    found = await store.keys.expiries([f"digest-{i}" for i in range(5)])

    assert found == {"digest-1": None, "digest-2": 7.0}
    assert await store.keys.expiries([]) == {}


async def test_pages_of_one_users_keys(store: Store) -> None:
    for number in range(6):
        await store.keys.add("ada" if number % 2 else "bob", f"digest-{number}", False)
    first = await store.keys.page(limit=2, user="ada")
    rest = await store.keys.page(limit=2, before=first[-1].key_id, user="ada")
    assert [record.key_id for record in (*first, *rest)] == [6, 4, 2]


async def test_a_verdict_is_kept_in_place_of_the_one_before(store: Store) -> None:
    await put(store, verdict())
    newer = verdict(is_member=False, checked_at=1_100.0)
    await put(store, newer)

    assert await store.token_verdicts.find("d1", METHOD) == newer
    assert await store.token_verdicts.among(["d1", "d2"], METHOD) == {"d1": newer}
    # It says nothing about another organisation.
    assert await store.token_verdicts.find("d1", "modelscope:here:others") is None
    assert await store.token_verdicts.among(["d1"], "modelscope:here:others") == {}


async def test_a_verdict_is_believed_longer_and_never_shorter(store: Store) -> None:
    await put(store, verdict())
    await store.token_verdicts.extend("d1", METHOD, 1_250.0)
    assert (await store.token_verdicts.find("d1", METHOD)) == verdict()
    await store.token_verdicts.extend("d1", METHOD, 1_500.0)
    assert (await store.token_verdicts.find("d1", METHOD)) == verdict(good_until=1_500.0)


async def test_a_member_becomes_a_tenant_once(store: Store) -> None:
    assert not await put(store, verdict(user="bob", digest="d2", is_member=False))
    assert await store.tenants.get(TenantId("ms:bob")) is None

    assert await put(store, verdict())
    version = (await store.policies.read()).version
    assert not await put(store, verdict(checked_at=1_200.0))
    assert not await put(store, verdict(digest="d3"), organization="another")

    policies = await store.policies.read()
    assert (policies.organizations, policies.version) == ({"ms:ada": "explorers"}, version)


async def test_verdicts_of_long_ago_are_dropped_by_the_way(store: Store) -> None:
    for number in range(5):
        await put(store, verdict(digest=f"d{number}", checked_at=100.0 * number))

    await put(store, verdict(digest="new"), forget_before=250.0)

    found = await store.token_verdicts.among([*(f"d{number}" for number in range(5)), "new"], METHOD)
    assert sorted(found) == ["d3", "d4", "new"]
    await store.token_verdicts.forget("new", METHOD)
    assert await store.token_verdicts.find("new", METHOD) is None


@pytest.mark.postgres
async def test_keys_that_are_made_at_once_put_nobody_into_two_organizations(postgres_url: str) -> None:
    here, there = await Store.open(postgres_url), await Store.open(postgres_url)
    try:
        for number in range(30):
            user = f"user-{number}"
            await here.keys.add(user, f"{number}", False)
            added = await asyncio.gather(
                here.keys.add(user, f"{number}-here", False, organization="one"),
                there.keys.add(user, f"{number}-there", False, organization="two"),
                return_exceptions=True,
            )
            assert sum(isinstance(one, InvalidRequest) for one in added) == 1, added
    finally:
        await here.close()
        await there.close()
