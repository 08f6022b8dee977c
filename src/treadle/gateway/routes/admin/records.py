"""What was done and used: the audit log and usage of all tenants, as JSON pages and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.domain.tenants import user_of
from treadle.domain.usage import HOUR_S, hour_of
from treadle.errors import InvalidRequest
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.keyset import cursor_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routes.admin.tenants import FORBIDDEN, used
from treadle.gateway.routing import Resource
from treadle.store.admin_audit import AuditQuery, NumberedEvent
from treadle.store.admin_usage import GroupBy, SumQuery, UsageSum
from treadle.wire.admin_bodies import AuditEventsQuery, UsagePageQuery, UsageSumsQuery
from treadle.wire.answers_admin_records import AuditEventsAnswer, UsageSumsAnswer

router = Resource("/admin/v1")

# The beginning of the year 9999: times of answers end with that one.
MAX_TIME_S = 253_370_764_800
# What is added up when nobody says which hours.
DEFAULT_WINDOW_S = 7 * 24 * HOUR_S
# What the key of a group says, and the types of its values.
KEY_FIELDS: Mapping[GroupBy, tuple[str, ...]] = {
    "tenant": ("tenant_id",),
    "run": ("tenant_id", "model_id"),
    "session": ("tenant_id", "session_id"),
    "project": ("tenant_id", "project_id"),
    "day": ("bucket_start",),
    "hour": ("bucket_start",),
}
GROUP_FIELDS = ("tenant_id", "user", "model_id", "session_id", "project_id", "bucket_start")
AMOUNTS = (
    "training_tokens",
    "prefill_tokens",
    "cached_prefill_tokens",
    "sampled_tokens",
    "checkpoints",
    "storage_byte_hours",
)
# A table program takes a cell that begins so for a formula; and clients choose the names of projects.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@router.get("/audit", query=AuditEventsQuery, answer=AuditEventsAnswer, others=FORBIDDEN)
async def list_events(request: Request) -> Response:
    """What operators and users did, newest first, a page at a time."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, AuditEventsQuery)
    behind = None if query.after is None else place_of(query.after, float, int)
    found = await gateway.store.admin_audit.find(
        AuditQuery(
            limit=query.limit,
            since=None if query.since is None else query.since.timestamp(),
            before=None if query.before is None else query.before.timestamp(),
            actor=query.actor,
            subject=query.subject,
            event=query.event,
            behind=behind,
        )
    )
    following = None
    if len(found) == query.limit:
        following = cursor_of([float(found[-1].event.created_at), found[-1].audit_id])
    return json_response({"events": [_event(one) for one in found], "next": following})


@router.get("/usage", query=UsagePageQuery, answer=UsageSumsAnswer, others=FORBIDDEN)
async def sum_usage(request: Request) -> Response:
    """What was used in any whole hours that are kept, added up exactly by tenant, run, session, project, day or hour.
    Groups that used nothing are left out."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, UsagePageQuery)
    wanted = _sum_query(gateway, query, limit=query.limit)
    if query.after is not None:
        wanted = replace(wanted, behind=_behind(query.group_by, query.after))
    sums = await gateway.store.admin_usage.sums(wanted)
    following = cursor_of(sums[-1].key) if len(sums) == query.limit else None
    return json_response(
        {
            "group_by": query.group_by,
            "since": iso_time(wanted.since),
            "before": iso_time(wanted.before),
            "data": [_usage(query.group_by, one) for one in sums],
            "next": following,
        }
    )


@router.get("/usage.csv", query=UsageSumsQuery, answer_type="text/csv", others=FORBIDDEN)
async def export_usage(request: Request) -> Response:
    """All of it as one CSV file (RFC 4180, a line of names first), sent while it is read. A project's name that a
    table program would take for a formula has an apostrophe in front."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, UsageSumsQuery)
    wanted = _sum_query(gateway, query, limit=MAX_PAGE_ROWS)
    # Before the answer begins, so that an outage is an error and no broken file.
    first = await gateway.store.admin_usage.sums(wanted)
    name = f"usage-by-{query.group_by}-{iso_time(wanted.since)[:10]}.csv"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "private, no-store"}
    return StreamingResponse(_csv(gateway, wanted, first), media_type="text/csv", headers=headers)


async def _csv(gateway: Gateway, query: SumQuery, sums: Sequence[UsageSum]) -> AsyncIterator[str]:
    fields = KEY_FIELDS[query.group_by]
    yield _line([*fields, *AMOUNTS])
    while sums:
        # A page is at most MAX_PAGE_ROWS lines.
        yield "".join(_line(_cells(query.group_by, one)) for one in sums)
        if len(sums) < query.limit:
            return
        query = replace(query, behind=sums[-1].key)
        sums = await gateway.store.admin_usage.sums(query)


def _cells(group_by: GroupBy, one: UsageSum) -> list[object]:
    row = _usage(group_by, one)
    project = row["project_id"]
    if isinstance(project, str) and project.startswith(_FORMULA):
        row["project_id"] = f"'{project}"
    return [row[name] for name in (*KEY_FIELDS[group_by], *AMOUNTS)]


def _line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue()


def _sum_query(gateway: Gateway, query: UsageSumsQuery, *, limit: int) -> SumQuery:
    """Raises InvalidRequest for times that are no whole hours."""
    now = gateway.deps.clock.now()
    before = hour_of(now) + HOUR_S if query.before is None else _hour("before", query.before)
    since = before - DEFAULT_WINDOW_S if query.since is None else _hour("since", query.since)
    if since >= before:
        raise InvalidRequest("since is not in front of before")
    return SumQuery(
        group_by=query.group_by,
        since=since,
        before=before,
        limit=limit,
        tenant_id=None if query.tenant is None else TenantId(query.tenant),
    )


def _hour(name: str, time: datetime) -> int:
    seconds = time.timestamp()
    if not 0 <= seconds <= MAX_TIME_S:
        raise InvalidRequest(f"{name} is not in the years 1970 to 9998")
    if seconds != hour_of(seconds):
        raise InvalidRequest(f"{name} is not at the beginning of an hour of UTC")
    return int(seconds)


def _behind(group_by: GroupBy, cursor: str) -> tuple[str | int, ...]:
    return place_of(cursor, *(int if name == "bucket_start" else str for name in KEY_FIELDS[group_by]))


def _usage(group_by: GroupBy, one: UsageSum) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(GROUP_FIELDS)
    for name, value in zip(KEY_FIELDS[group_by], one.key, strict=True):
        row[name] = iso_time(int(value)) if name == "bucket_start" else value
        if name == "tenant_id":
            row["user"] = user_of(TenantId(str(value)))
    return row | used(one.amounts)


def _event(numbered: NumberedEvent) -> dict[str, object]:
    event = numbered.event
    return {
        "audit_id": numbered.audit_id,
        "time": iso_time(event.created_at),
        "tenant_id": event.tenant_id,
        "actor": event.actor or event.tenant_id,
        "event_type": event.event_type,
        "event": event.event,
        "subject": event.subject,
        "details": event.details,
        "model_id": event.model_id,
        "tinker_path": event.tinker_path,
        "purpose": event.purpose,
    }
