"""Named losses: submitted, reviewed once, decided, replaced; what policies know of them, and what is audited."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import pytest
import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_PENDING_LOSSES_PER_TENANT, MAX_REVIEW_S
from treadle.domain.named_losses import LossStatus, NewSubmission, ReviewResult, Submission
from treadle.errors import InvalidRequest, NotFound
from treadle.store import Store
from treadle.store.audit import Author
from treadle.store.tables import audit_log, loss_definitions
from treadle.testing.clock import ManualClock

ALICE, BOB = TenantId("user:alice"), TenantId("user:bob")
OWNER = Author(ALICE, "user:alice (key 1)")
ADMIN = Author(TenantId("user:root"), "user:root (key 9)")
GRAPH, OTHER_GRAPH = b'{"graph": 1}', b'{"graph": 2}'
PASSED = {"state": "passed", "cost": 1.5}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def new(name: str = "mine", *, tenant: TenantId = ALICE) -> NewSubmission:
    content = b"def loss(logprobs): ..."
    return NewSubmission(name, tenant, "upload", None, sha(content), "python", content)


async def submitted(store: Store, submission: NewSubmission) -> Submission:
    return await store.named_losses.submit(submission, Author(submission.tenant_id, submission.tenant_id))


async def reviewed(store: Store, submission: NewSubmission, definition: bytes = GRAPH) -> int:
    """The id of a submission whose review passed."""
    row = await submitted(store, submission)
    await store.named_losses.begin_review(row.named_loss_id, ADMIN)
    await store.named_losses.finish_review(row.named_loss_id, ReviewResult(PASSED, definition=definition), ADMIN)
    return row.named_loss_id


async def events(store: Store) -> list[tuple[str, str, str]]:
    query = sa.select(audit_log.c.event, audit_log.c.actor, audit_log.c.subject).order_by(audit_log.c.audit_id)
    return [tuple(row) for row in await store._database.read(lambda conn: conn.execute(query).all())]


async def definitions(store: Store) -> set[bytes]:
    query = sa.select(loss_definitions.c.definition)
    return {bytes(row[0]) for row in await store._database.read(lambda conn: conn.execute(query).all())}


async def test_a_submission_waits_and_is_read_back(store: Store) -> None:
    version = await store.policies.version()
    row = await submitted(store, new())
    # Users cannot make every server read everything again.
    assert await store.policies.version() == version
    assert (row.status, row.review, row.definition, row.content) == (LossStatus.PENDING, None, None, new().content)
    assert await store.named_losses.newest("mine", ALICE) == row
    assert await store.named_losses.newest("mine", BOB) is None
    assert await store.named_losses.approved("mine", ALICE) is None
    with pytest.raises(NotFound, match="named loss 99"):
        await store.named_losses.get(99)


async def test_the_way_to_an_approved_loss_is_audited_and_changes_the_picture(store: Store) -> None:
    number = await reviewed(store, new())
    assert (await store.policies.read()).revoked_losses == {sha(GRAPH)}
    before = await store.policies.version()
    row = await store.named_losses.approve(number, [ALICE], ADMIN)
    assert (row.status, row.tenants, row.decided_by) == (LossStatus.APPROVED, (ALICE,), ADMIN.actor)
    assert await store.policies.version() > before
    assert (await store.policies.read()).revoked_losses == frozenset()
    loss = await store.named_losses.approved("mine", ALICE)
    assert loss is not None
    assert (loss.definition, loss.definition_sha256) == (GRAPH, sha(GRAPH))
    assert await store.named_losses.approved("mine", BOB) is None
    assert await store.named_losses.all_approved() == [loss]
    await store.named_losses.approve(number, None, ADMIN)
    assert await store.named_losses.approved("mine", BOB) is not None
    revoked = await store.named_losses.decide(number, LossStatus.REVOKED, "leaks", ADMIN)
    assert (revoked.status, revoked.reason) == (LossStatus.REVOKED, "leaks")
    assert await store.named_losses.approved("mine", ALICE) is None
    assert (await store.policies.read()).revoked_losses == {sha(GRAPH)}
    subject = f"loss:{number}"
    assert await events(store) == [
        ("loss.submitted", ALICE, subject),
        ("loss.review_started", ADMIN.actor, subject),
        ("loss.reviewed", ADMIN.actor, subject),
        ("loss.approved", ADMIN.actor, subject),
        ("loss.approved", ADMIN.actor, subject),
        ("loss.revoked", ADMIN.actor, subject),
    ]


async def test_a_review_is_claimed_once_whoever_asks(store: Store) -> None:
    row = await submitted(store, new())
    claims = [store.named_losses.begin_review(row.named_loss_id, ADMIN) for _ in range(5)]
    ended = await asyncio.gather(*claims, return_exceptions=True)
    assert sum(isinstance(end, Submission) for end in ended) == 1
    assert all("running already" in str(end) for end in ended if not isinstance(end, Submission))
    await store.named_losses.finish_review(row.named_loss_id, ReviewResult({"state": "failed"}), ADMIN)
    with pytest.raises(InvalidRequest, match="failed already"):
        await store.named_losses.begin_review(row.named_loss_id, ADMIN)
    with pytest.raises(InvalidRequest, match=r"review of loss 'mine' .* is failed"):
        await store.named_losses.approve(row.named_loss_id, None, ADMIN)


async def test_a_review_whose_server_died_has_failed_for_good(store: Store, clock: ManualClock) -> None:
    row = await submitted(store, new())
    await store.named_losses.begin_review(row.named_loss_id, ADMIN)
    clock.advance(MAX_REVIEW_S)
    late = await store.named_losses.get(row.named_loss_id)
    assert late.review is not None
    assert (late.review["state"], "the server" in late.review["reason"]) == ("failed", True)
    await store.named_losses.finish_review(row.named_loss_id, ReviewResult(PASSED, definition=GRAPH), ADMIN)
    with pytest.raises(InvalidRequest, match="failed"):
        await store.named_losses.approve(row.named_loss_id, None, ADMIN)
    with pytest.raises(InvalidRequest, match="failed already"):
        await store.named_losses.begin_review(row.named_loss_id, ADMIN)


async def test_nothing_is_approved_without_a_review(store: Store) -> None:
    row = await submitted(store, replace(new(), form="graph", definition=GRAPH))
    assert row.definition == GRAPH
    with pytest.raises(InvalidRequest, match="not begun"):
        await store.named_losses.approve(row.named_loss_id, None, ADMIN)


async def test_a_newer_one_of_the_owner_replaces_the_older(store: Store) -> None:
    old = await reviewed(store, new())
    await store.named_losses.approve(old, None, ADMIN)
    newer = await reviewed(store, new(), OTHER_GRAPH)
    await store.named_losses.approve(newer, None, ADMIN)
    replaced = await store.named_losses.get(old)
    assert (replaced.status, replaced.reason) == (LossStatus.REVOKED, f"replaced by loss {newer}")
    loss = await store.named_losses.approved("mine", BOB)
    assert loss is not None
    assert loss.definition == OTHER_GRAPH
    assert (await store.policies.read()).revoked_losses == {sha(GRAPH)}


async def test_the_same_graph_again_is_not_revoked(store: Store) -> None:
    for _ in range(2):
        await store.named_losses.approve(await reviewed(store, new()), None, ADMIN)
    assert (await store.policies.read()).revoked_losses == frozenset()


async def test_a_name_belongs_to_whose_loss_was_approved(store: Store) -> None:
    first, second = await reviewed(store, new()), await reviewed(store, new(tenant=BOB))
    await store.named_losses.approve(first, [ALICE], ADMIN)
    with pytest.raises(InvalidRequest, match=f"belongs to loss {first}"):
        await store.named_losses.approve(second, None, ADMIN)
    with pytest.raises(InvalidRequest, match="is taken"):
        await submitted(store, new(tenant=TenantId("user:carol")))
    await store.named_losses.decide(first, LossStatus.REVOKED, "x", ADMIN)
    await store.named_losses.approve(second, None, ADMIN)


async def test_pending_ones_are_few_and_one_of_a_name(store: Store) -> None:
    await submitted(store, new())
    with pytest.raises(InvalidRequest, match="pending already"):
        await submitted(store, new())
    for number in range(MAX_PENDING_LOSSES_PER_TENANT - 1):
        await submitted(store, new(f"mine_{number}"))
    with pytest.raises(InvalidRequest, match="of your losses are pending"):
        await submitted(store, new("one_more"))
    await submitted(store, new("one_more", tenant=BOB))


async def test_what_is_withdrawn_is_gone_and_its_number_never_comes_back(store: Store) -> None:
    row = await submitted(store, replace(new(), form="graph", definition=GRAPH))
    await store.named_losses.begin_review(row.named_loss_id, ADMIN)
    await store.named_losses.remove(row.named_loss_id, OWNER, only_pending=True)
    await store.named_losses.finish_review(row.named_loss_id, ReviewResult(PASSED, definition=GRAPH), ADMIN)
    assert await definitions(store) == set()
    assert (await submitted(store, new())).named_loss_id > row.named_loss_id


async def test_what_was_approved_once_stays(store: Store) -> None:
    number = await reviewed(store, new())
    await store.named_losses.approve(number, None, ADMIN)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="stays"):
            await store.named_losses.remove(number, ADMIN, only_pending=False)
        if (await store.named_losses.get(number)).status is LossStatus.APPROVED:
            await store.named_losses.decide(number, LossStatus.REVOKED, "x", ADMIN)
    assert (await store.policies.read()).revoked_losses == {sha(GRAPH)}


async def test_a_rejected_one_keeps_its_reason_until_an_operator_removes_it(store: Store) -> None:
    number = (await submitted(store, new())).named_loss_id
    await store.named_losses.decide(number, LossStatus.REJECTED, "too slow", ADMIN)
    for call in (
        store.named_losses.remove(number, OWNER, only_pending=True),
        store.named_losses.decide(number, LossStatus.REVOKED, "x", ADMIN),
        store.named_losses.begin_review(number, ADMIN),
        store.named_losses.approve(number, None, ADMIN),
    ):
        with pytest.raises(InvalidRequest, match="is rejected"):
            await call
    await store.named_losses.remove(number, ADMIN, only_pending=False)
    with pytest.raises(NotFound):
        await store.named_losses.get(number)


async def test_listings_are_by_id_and_carry_no_content(store: Store) -> None:
    ids = [(await submitted(store, new(f"loss_{number}"))).named_loss_id for number in range(3)]
    other = (await submitted(store, new(tenant=BOB))).named_loss_id
    await store.named_losses.decide(ids[0], LossStatus.REJECTED, "x", ADMIN)

    async def listed(limit: int = 10, **filters: object) -> list[int]:
        found = await store.named_losses.listing(limit=limit, **filters)  # type: ignore[arg-type]
        assert all(row.content is None for row in found)
        return [row.named_loss_id for row in found]

    assert await listed() == [other, *reversed(ids)]
    assert await listed(2) == [other, ids[2]]
    assert await listed(before=ids[2]) == [ids[1], ids[0]]
    assert await listed(status=LossStatus.PENDING, tenant_id=ALICE) == [ids[2], ids[1]]
