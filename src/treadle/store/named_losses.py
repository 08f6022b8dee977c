"""Named losses: what users submitted, what reviews found, what operators decided.

It refuses to know what a definition says and what a review does. Invariants: a submission is reviewed at most once,
whoever asks and whatever dies; only a reviewed one is ever approved; of one name, one is approved; what was approved
once stays, so that the picture of policies knows what may no longer run. Every change is audited in its transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_PENDING_LOSSES_PER_TENANT, MAX_REVIEW_S, MAX_UNPAGED_ROWS
from treadle.domain.named_losses import (
    LossStatus,
    NamedLoss,
    NewSubmission,
    ReviewResult,
    ReviewState,
    Submission,
    subject_of,
)
from treadle.errors import InvalidRequest, NotFound
from treadle.store import policies
from treadle.store.audit import Author, add_change
from treadle.store.dialect import ConflictInsert
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.tables import IS_APPROVED, AnyRow, loss_definitions, named_losses
from treadle.store.writer import Writer

_N = named_losses.c
_LISTED = (
    _N.named_loss_id,
    _N.name,
    _N.tenant_id,
    _N.source,
    _N.revision,
    _N.sha256,
    _N.form,
    _N.definition_sha256,
    _N.status,
    _N.tenants,
    _N.review,
    _N.reason,
    _N.submitted_at,
    _N.decided_at,
    _N.decided_by,
)
_ALL = sa.select(*_LISTED, _N.content, loss_definitions.c.definition).join_from(
    named_losses, loss_definitions, isouter=True
)
_GET = _ALL.where(_N.named_loss_id == sa.bindparam("id"))
_NEWEST = (
    _ALL.where(_N.tenant_id == sa.bindparam("of_tenant"), _N.name == sa.bindparam("of_name"))
    .order_by(_N.named_loss_id.desc())
    .limit(1)
)
_APPROVED = sa.select(
    _N.named_loss_id, _N.name, _N.tenant_id, _N.tenants, _N.definition_sha256, loss_definitions.c.definition
).join_from(named_losses, loss_definitions)
_APPROVED_BY_NAME = _APPROVED.where(_N.name == sa.bindparam("of_name"), IS_APPROVED)
_ALL_APPROVED = _APPROVED.where(IS_APPROVED).order_by(_N.name).limit(MAX_UNPAGED_ROWS)
_OF_DEFINITION = (
    sa.select(_N.status, _N.reason)
    .where(_N.definition_sha256 == sa.bindparam("of_definition"))
    .order_by(_N.named_loss_id.desc())
)
_REVOKED_BY_NAME = (
    sa.select(_N.reason, _N.tenants)
    .where(_N.name == sa.bindparam("of_name"), _N.status == LossStatus.REVOKED.value)
    .order_by(_N.named_loss_id.desc())
    .limit(1)
)
_PENDING = sa.select(_N.name).where(_N.tenant_id == sa.bindparam("of_tenant"), _N.status == LossStatus.PENDING.value)
# Locked, so that operators on other gateways wait; SQLite has one writer anyway.
_LOCKED = sa.select(*_LISTED).where(_N.named_loss_id == sa.bindparam("id")).with_for_update()
_LOCKED_NAMESAKES = (
    sa.select(_N.named_loss_id).where(_N.name == sa.bindparam("of_name")).order_by(_N.named_loss_id).with_for_update()
)
_HOLDER = sa.select(_N.named_loss_id, _N.tenant_id).where(_N.name == sa.bindparam("of_name"), IS_APPROVED)
_UPDATE = named_losses.update().where(_N.named_loss_id == sa.bindparam("id"))
_DELETE = named_losses.delete().where(_N.named_loss_id == sa.bindparam("id"))
_LOCKED_DEFINITION = (
    sa.select(loss_definitions.c.sha256)
    .where(loss_definitions.c.sha256 == sa.bindparam("of_definition"))
    .with_for_update()
)
_DELETE_UNNAMED = loss_definitions.delete().where(
    loss_definitions.c.sha256 == sa.bindparam("of_definition"),
    ~sa.exists().where(_N.definition_sha256 == loss_definitions.c.sha256),
)
_ENDED = "the server that ran the review ended; submit the loss again"


class NamedLosses:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(loss_definitions)
        # One that is there is locked by an update to itself, so that nobody removes it before it is named.
        self._insert_definition: ConflictInsert = insert.on_conflict_do_update(
            index_elements=[loss_definitions.c.sha256], set_={"created_at": loss_definitions.c.created_at}
        )

    async def approved(self, name: str, tenant_id: TenantId) -> NamedLoss | None:
        """What loss_fn=`name` is to this tenant: the approved loss, when the tenant is in its scope."""
        row = await self._database.read(lambda conn: conn.execute(_APPROVED_BY_NAME, {"of_name": name}).one_or_none())
        loss = None if row is None else _named_loss_of(row)
        return loss if loss is not None and loss.is_for(tenant_id) else None

    async def all_approved(self) -> list[NamedLoss]:
        """Every approved loss by name, whoever may use it; the first MAX_UNPAGED_ROWS."""
        rows = await self._database.read(lambda conn: conn.execute(_ALL_APPROVED).all())
        return [_named_loss_of(row) for row in rows]

    async def submit(self, new: NewSubmission, author: Author) -> Submission:
        """The submission, pending.

        Raises InvalidRequest when the name is another tenant's approved loss, when the tenant has one of that name
        pending already, and when MAX_PENDING_LOSSES_PER_TENANT of its submissions are.
        """

        def write(conn: sa.Connection) -> int:
            now = self._clock()
            # Other gateways count too.
            self._database.dialect.lock(conn, f"losses of {new.tenant_id}")
            _check_room(conn, new)
            row_id: int = conn.execute(
                named_losses.insert().returning(_N.named_loss_id), self._row_of(conn, new, now)
            ).scalar_one()
            after = {"name": new.name, "source": new.source, "revision": new.revision, "sha256": new.sha256}
            add_change(conn, author, "loss.submitted", subject_of(row_id), before=None, after=after, now=now)
            return row_id

        return await self.get(await self._writer.run(write))

    async def get(self, named_loss_id: int) -> Submission:
        """All of one submission. Raises NotFound."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": named_loss_id}).one_or_none())
        if row is None:
            raise _unknown(named_loss_id)
        return self._submission_of(row)

    async def newest(self, name: str, tenant_id: TenantId) -> Submission | None:
        """All of a tenant's newest submission of this name."""
        values = {"of_name": name, "of_tenant": tenant_id}
        row = await self._database.read(lambda conn: conn.execute(_NEWEST, values).one_or_none())
        return None if row is None else self._submission_of(row)

    async def revocation_of(self, definition_sha256: str) -> str | None:
        """Why no loss with this definition runs, as its operator said, "" when nobody did; None: one is approved."""
        values = {"of_definition": definition_sha256}
        rows = await self._database.read(lambda conn: conn.execute(_OF_DEFINITION, values).all())
        if any(row.status == LossStatus.APPROVED for row in rows):
            return None
        return next((row.reason for row in rows if row.status == LossStatus.REVOKED and row.reason), "")

    async def reason_of_revocation(self, name: str, tenant_id: TenantId) -> str | None:
        """Why the newest revoked loss of this name was revoked, "" when nobody said; None when there is none that the
        tenant might use."""
        row = await self._database.read(lambda conn: conn.execute(_REVOKED_BY_NAME, {"of_name": name}).one_or_none())
        if row is None:
            return None
        tenants = _tenants_of(row)
        return (row.reason or "") if tenants is None or tenant_id in tenants else None

    async def listing(
        self,
        *,
        limit: int,
        before: int | None = None,
        status: LossStatus | None = None,
        tenant_id: TenantId | None = None,
    ) -> list[Submission]:
        """Submissions, newest first, without content and definition; of one status, of one tenant, below one id."""
        query = sa.select(*_LISTED).order_by(_N.named_loss_id.desc()).limit(checked_limit(limit))
        if before is not None:
            query = query.where(_N.named_loss_id < before)
        if status is not None:
            query = query.where(_N.status == status.value)
        if tenant_id is not None:
            query = query.where(_N.tenant_id == tenant_id)
        rows = await self._database.read(lambda conn: conn.execute(query).all())
        return [self._submission_of(row) for row in rows]

    async def remove(self, named_loss_id: int, author: Author, *, only_pending: bool) -> None:
        """Forget a submission that was never approved; of an owner, one that is still pending.

        Raises NotFound, and InvalidRequest for any other.
        """

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            old = self._locked(conn, named_loss_id)
            if old.status in (LossStatus.APPROVED, LossStatus.REVOKED):
                raise InvalidRequest(
                    f"loss {old.name!r} ({named_loss_id}) is {old.status}: it stays; revoke it instead"
                )
            if only_pending and old.status is not LossStatus.PENDING:
                raise InvalidRequest(f"loss {old.name!r} is {old.status}; only a pending one can be withdrawn")
            conn.execute(_DELETE, {"id": named_loss_id})
            if old.definition_sha256 is not None:
                # Before it is looked at who else names it: another gateway may be about to.
                conn.execute(_LOCKED_DEFINITION, {"of_definition": old.definition_sha256}).all()
                conn.execute(_DELETE_UNNAMED, {"of_definition": old.definition_sha256})
            event = "loss.withdrawn" if only_pending else "loss.removed"
            add_change(conn, author, event, old.subject, before=_state(old), after=None, now=now)

        await self._writer.run(write)

    async def begin_review(self, named_loss_id: int, author: Author) -> Submission:
        """Claim the one review of a pending submission; what is to be reviewed.

        Raises NotFound, and InvalidRequest when it was decided or its review was begun before, by whomever.
        """

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            old = self._locked(conn, named_loss_id)
            if old.status is not LossStatus.PENDING:
                raise InvalidRequest(
                    f"loss {old.name!r} ({named_loss_id}) is {old.status}; only pending ones are reviewed"
                )
            if old.review is not None:
                raise InvalidRequest(
                    f"the review of loss {old.name!r} ({named_loss_id}) is {old.review['state']} already: a file is "
                    "executed once; for another review it is submitted again"
                )
            review = {"state": ReviewState.RUNNING.value, "started_at": now, "by": author.actor}
            conn.execute(_UPDATE.values(review=review), {"id": named_loss_id})
            add_change(conn, author, "loss.review_started", old.subject, before=None, after={"name": old.name}, now=now)

        await self._writer.run(write)
        return await self.get(named_loss_id)

    async def finish_review(self, named_loss_id: int, result: ReviewResult, author: Author) -> None:
        """Keep what a review found. Nothing happens when the submission is gone meanwhile, or the review counts as
        ended by its server's death."""

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            row = conn.execute(_LOCKED, {"id": named_loss_id}).one_or_none()
            old = None if row is None else self._submission_of(row)
            if old is None or old.review is None or old.review["state"] != ReviewState.RUNNING:
                return
            values: dict[str, Any] = {"review": {**old.review, **result.report, "ended_at": now}}
            if result.content is not None:
                values["content"] = result.content
            if result.definition is not None:
                values["definition_sha256"] = self._stored(conn, result.definition, now)
            conn.execute(_UPDATE.values(**values), {"id": named_loss_id})
            after = {"state": result.report["state"], "definition_sha256": values.get("definition_sha256")}
            add_change(conn, author, "loss.reviewed", old.subject, before=None, after=after, now=now)

        await self._writer.run(write)

    async def approve(self, named_loss_id: int, tenants: Sequence[TenantId] | None, author: Author) -> Submission:
        """Let these tenants (None: all) use a submission whose review passed, instead of its owner's older one of the
        name, which is revoked.

        Raises NotFound, and InvalidRequest when it is not pending, its review has not passed, or another tenant's loss
        has the name. An approved one gets another list of tenants.
        """

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            old = self._locked(conn, named_loss_id)
            conn.execute(_LOCKED_NAMESAKES, {"of_name": old.name}).all()
            _check_approvable(old)
            holder = conn.execute(_HOLDER, {"of_name": old.name}).one_or_none()
            if holder is not None and holder.named_loss_id != named_loss_id:
                if holder.tenant_id != old.tenant_id:
                    raise InvalidRequest(
                        f"name {old.name!r} belongs to loss {holder.named_loss_id} of {holder.tenant_id}; revoke it"
                    )
                replaced = self._locked(conn, holder.named_loss_id)
                self._decide(
                    conn, replaced, LossStatus.REVOKED, author, now, reason=f"replaced by loss {named_loss_id}"
                )
            self._decide(conn, old, LossStatus.APPROVED, author, now, tenants=tenants)

        await self._writer.run(write)
        return await self.get(named_loss_id)

    async def decide(self, named_loss_id: int, status: LossStatus, reason: str, author: Author) -> Submission:
        """Reject a pending submission, or revoke an approved one. Raises NotFound, and InvalidRequest for others."""
        assert status in (LossStatus.REJECTED, LossStatus.REVOKED)
        due = LossStatus.PENDING if status is LossStatus.REJECTED else LossStatus.APPROVED

        def write(conn: sa.Connection) -> None:
            old = self._locked(conn, named_loss_id)
            if old.status is not due:
                raise InvalidRequest(
                    f"loss {old.name!r} ({named_loss_id}) is {old.status}; only {due} ones can be {status}"
                )
            self._decide(conn, old, status, author, self._clock(), reason=reason)

        await self._writer.run(write)
        return await self.get(named_loss_id)

    def _decide(
        self,
        conn: sa.Connection,
        old: Submission,
        status: LossStatus,
        author: Author,
        now: float,
        *,
        reason: str | None = None,
        tenants: Sequence[TenantId] | None = None,
    ) -> None:
        values: dict[str, Any] = {
            "status": status.value,
            "reason": reason,
            "decided_at": now,
            "decided_by": author.actor,
        }
        if status is LossStatus.APPROVED:
            # JSON's null is not SQL's.
            values["tenants"] = sa.null() if tenants is None else list(tenants)
        conn.execute(_UPDATE.values(**values), {"id": old.named_loss_id})
        after = {
            "status": status.value,
            "reason": reason,
            "tenants": None if tenants is None else list(tenants),
            "definition_sha256": old.definition_sha256,
        }
        add_change(conn, author, f"loss.{status.value}", old.subject, before=_state(old), after=after, now=now)
        # Not for anything that users do: every server reads the whole picture again.
        policies.changed(conn, now)

    def _locked(self, conn: sa.Connection, named_loss_id: int) -> Submission:
        row = conn.execute(_LOCKED, {"id": named_loss_id}).one_or_none()
        if row is None:
            raise _unknown(named_loss_id)
        return self._submission_of(row)

    def _row_of(self, conn: sa.Connection, new: NewSubmission, now: float) -> dict[str, Any]:
        return {
            "name": new.name,
            "tenant_id": new.tenant_id,
            "source": new.source,
            "revision": new.revision,
            "sha256": new.sha256,
            "form": new.form,
            "content": new.content,
            "definition_sha256": None if new.definition is None else self._stored(conn, new.definition, now),
            "status": LossStatus.PENDING.value,
            "submitted_at": now,
        }

    def _stored(self, conn: sa.Connection, definition: bytes, now: float) -> str:
        sha256 = hashlib.sha256(definition).hexdigest()
        conn.execute(self._insert_definition, {"sha256": sha256, "definition": definition, "created_at": now})
        return sha256

    def _submission_of(self, row: AnyRow) -> Submission:
        content, definition = row._mapping.get("content"), row._mapping.get("definition")
        return Submission(
            named_loss_id=row.named_loss_id,
            name=row.name,
            tenant_id=TenantId(row.tenant_id),
            source=row.source,
            revision=row.revision,
            sha256=row.sha256,
            form=row.form,
            status=LossStatus(row.status),
            submitted_at=row.submitted_at,
            definition_sha256=row.definition_sha256,
            tenants=_tenants_of(row),
            review=_review_of(row.review, self._clock()),
            reason=row.reason,
            decided_at=row.decided_at,
            decided_by=row.decided_by,
            content=None if content is None else bytes(content),
            definition=None if definition is None else bytes(definition),
        )


def _check_room(conn: sa.Connection, new: NewSubmission) -> None:
    holder = conn.execute(_HOLDER, {"of_name": new.name}).one_or_none()
    if holder is not None and holder.tenant_id != new.tenant_id:
        raise InvalidRequest(f"name {new.name!r} is taken; choose another")
    pending = conn.execute(_PENDING, {"of_tenant": new.tenant_id}).scalars().all()
    if new.name in pending:
        raise InvalidRequest(
            f"loss {new.name!r} is pending already; withdraw it first (DELETE /api/v1/losses/{new.name})"
        )
    if len(pending) >= MAX_PENDING_LOSSES_PER_TENANT:
        raise InvalidRequest(
            f"{len(pending)} of your losses are pending, the most that is allowed; withdraw one, or wait for a decision"
        )


def _check_approvable(old: Submission) -> None:
    what = f"loss {old.name!r} ({old.named_loss_id})"
    if old.status not in (LossStatus.PENDING, LossStatus.APPROVED):
        raise InvalidRequest(f"{what} is {old.status}; only pending ones can be approved")
    state = None if old.review is None else old.review["state"]
    if state != ReviewState.PASSED or old.definition_sha256 is None:
        raise InvalidRequest(
            f"the review of {what} is {state or 'not begun'}; only after one that passed it is approved"
        )


def _review_of(review: Mapping[str, Any] | None, now: float) -> Mapping[str, Any] | None:
    """The review as it stands: one that runs for longer than any may has died with its server."""
    if review is None or review["state"] != ReviewState.RUNNING or now < review["started_at"] + MAX_REVIEW_S:
        return review
    return {**review, "state": ReviewState.FAILED.value, "reason": _ENDED}


def _tenants_of(row: AnyRow) -> tuple[TenantId, ...] | None:
    return None if row.tenants is None else tuple(TenantId(tenant) for tenant in row.tenants)


def _named_loss_of(row: AnyRow) -> NamedLoss:
    return NamedLoss(
        named_loss_id=row.named_loss_id,
        name=row.name,
        tenant_id=TenantId(row.tenant_id),
        tenants=_tenants_of(row),
        definition_sha256=row.definition_sha256,
        definition=bytes(row.definition),
    )


def _state(old: Submission) -> dict[str, Any]:
    return {
        "name": old.name,
        "tenant_id": old.tenant_id,
        "status": old.status.value,
        "reason": old.reason,
        "tenants": None if old.tenants is None else list(old.tenants),
    }


def _unknown(named_loss_id: int) -> NotFound:
    return NotFound(f"named loss {named_loss_id} does not exist")
