"""Rules about losses: one per scope and loss, audited, and part of the picture at once."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.policy import DEFAULT_SCOPE, LossRule, Scope
from treadle.store import Store
from treadle.store.audit import Author
from treadle.store.tables import audit_log

ADMIN = Author(TenantId("user:root"), "user:root (key 9)")
ALICE = Scope("tenant", "user:alice")


async def changes(store: Store) -> list[tuple[str, str, object, object]]:
    query = sa.select(audit_log.c.event, audit_log.c.subject, audit_log.c.details).order_by(audit_log.c.audit_id)
    rows = await store._database.read(lambda conn: conn.execute(query).all())
    return [(event, subject, details["before"], details["after"]) for event, subject, details in rows]


async def test_a_rule_replaces_the_one_before_it_whole(store: Store) -> None:
    await store.loss_rules.put(DEFAULT_SCOPE, "dro", LossRule(False, {"beta": (0.0, 0.5)}), ADMIN)
    await store.loss_rules.put(ALICE, "dro", LossRule(True), ADMIN)
    await store.loss_rules.put(DEFAULT_SCOPE, "dro", LossRule(None, {"beta": (0.1, 0.2)}), ADMIN)
    policies = await store.policies.read()
    assert policies.losses == {
        "default": {"dro": LossRule(None, {"beta": (0.1, 0.2)})},
        "tenant:user:alice": {"dro": LossRule(True, {})},
    }
    assert policies.version == 3
    first, second = (
        {"is_enabled": False, "bounds": {"beta": [0.0, 0.5]}},
        {"is_enabled": None, "bounds": {"beta": [0.1, 0.2]}},
    )
    assert (await changes(store))[2] == ("loss_rule.set", "loss:dro default", first, second)


async def test_a_rule_that_is_not_there_cannot_be_removed(store: Store) -> None:
    assert not await store.loss_rules.remove(ALICE, "dro", ADMIN)
    assert (await store.policies.version(), await changes(store)) == (0, [])
    await store.loss_rules.put(ALICE, "dro", LossRule(True), ADMIN)
    assert not await store.loss_rules.remove(DEFAULT_SCOPE, "dro", ADMIN)
    assert await store.loss_rules.remove(ALICE, "dro", ADMIN)
    assert (await store.policies.read()).losses == {}
    assert (await changes(store))[1] == (
        "loss_rule.removed",
        "loss:dro tenant:user:alice",
        {"is_enabled": True, "bounds": {}},
        None,
    )


async def test_the_list_of_operations_is_replaced_whole(store: Store) -> None:
    await store.loss_rules.disable_operations(["torch.sort", "Tensor.sort", "torch.sort"], ADMIN)
    assert (await store.policies.read()).disabled_operations == {"torch.sort", "Tensor.sort"}
    await store.loss_rules.disable_operations([], ADMIN)
    policies = await store.policies.read()
    assert (policies.version, policies.disabled_operations) == (2, frozenset())
    assert await changes(store) == [
        ("loss_operations.set", "losses", [], ["Tensor.sort", "torch.sort"]),
        ("loss_operations.set", "losses", ["Tensor.sort", "torch.sort"], []),
    ]


async def test_changes_at_the_same_time_are_all_made(store: Store) -> None:
    await asyncio.gather(
        *(store.loss_rules.put(Scope("tenant", f"user:{i}"), "ppo", LossRule(False), ADMIN) for i in range(10)),
        *(
            store.loss_rules.put(DEFAULT_SCOPE, "ppo", LossRule(None, {"beta": (0.0, float(i))}), ADMIN)
            for i in range(5)
        ),
    )
    policies = await store.policies.read()
    assert len(policies.losses) == 11
    assert policies.version == 15
    # Each "before" is what another change left.
    told = [(before, after) for _, subject, before, after in await changes(store) if subject == "loss:ppo default"]
    assert [before for before, _ in told[1:]] == [after for _, after in told[:-1]]
