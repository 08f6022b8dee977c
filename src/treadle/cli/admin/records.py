"""`treadle admin checkpoints`, `projects`, `audit` and `usage`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from treadle.cli.admin.common import (
    LimitOption,
    TenantOption,
    command,
    done,
    group,
    print_json,
    print_table,
    server,
    show,
    show_one,
    tenant_or_none,
    utc_time,
)
from treadle.cli.common import stderr
from treadle.errors import InvalidRequest

PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="tinker://RUN_ID/KIND/NAME")]
ProjectArgument = Annotated[str, typer.Argument(metavar="PROJECT_ID")]
SinceOption = Annotated[str | None, typer.Option(help="2026-11-20 or 2026-11-20T13:00; UTC without a zone.")]
BeforeOption = Annotated[str | None, typer.Option(help="The end, which is not included; as for --since.")]

GROUPS = ("tenant", "run", "session", "project", "day", "hour")
_KEYS = {
    "tenant": ("tenant=tenant_id",),
    "run": ("tenant=tenant_id", "run=model_id"),
    "session": ("tenant=tenant_id", "session=session_id"),
    "project": ("tenant=tenant_id", "project=project_id"),
    "day": ("day=bucket_start",),
    "hour": ("hour=bucket_start",),
}


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    _add_checkpoints(group(app, "checkpoints", "Checkpoints of all tenants."))
    _add_projects(group(app, "projects", "Shared projects of all tenants."))
    _add_audit(app)
    _add_usage(app)


def _add_checkpoints(checkpoints: typer.Typer) -> None:
    @command(checkpoints, "list", "checkpoints list --tenant alice", "checkpoints list --public")
    def list_checkpoints(
        tenant: TenantOption = None,
        public: Annotated[bool | None, typer.Option("--public/--private", help="Only these.")] = None,
        limit: LimitOption = 100,
    ) -> None:
        """List checkpoints, newest first."""
        owner = tenant_or_none(tenant)
        answer = server().pages("checkpoints", rows="checkpoints", limit=limit, tenant=owner, public=public)
        columns = ("path=tinker_path", "tenant=tenant_id", "bytes=size_bytes", "public", "created=created_at")
        show(answer, "checkpoints", *columns, "expires=expires_at", empty="no checkpoints")

    @command(checkpoints, "delete", "checkpoints delete tinker://4f3c...:train:0/weights/one")
    def delete(path: PathArgument) -> None:
        """Take a checkpoint away."""
        done(server().send("POST", "checkpoints", "delete", body={"path": path}), f"{path} is deleted")

    @command(checkpoints, "unpublish", "checkpoints unpublish tinker://4f3c...:train:0/weights/one")
    def unpublish(path: PathArgument) -> None:
        """Have a published checkpoint be its owner's alone again."""
        done(server().send("POST", "checkpoints", "unpublish", body={"path": path}), f"{path} is not public")


def _add_projects(projects: typer.Typer) -> None:
    @command(projects, "list", "projects list --tenant alice")
    def list_projects(tenant: TenantOption = None, limit: LimitOption = 100) -> None:
        """List shared projects."""
        answer = server().pages("projects", rows="projects", limit=limit, tenant=tenant_or_none(tenant))
        columns = ("project=project_id", "name", "owner=tenant_id", "members=num_members", "created=created_at")
        show(answer, "projects", *columns, empty="no shared projects")

    @command(projects, "show", "projects show prj-4f3c")
    def show_project(project_id: ProjectArgument) -> None:
        """Show one project and its members."""
        show_one(server().get("projects", project_id))

    @command(projects, "delete", "projects delete prj-4f3c")
    def delete(project_id: ProjectArgument) -> None:
        """End a project, and with it the sharing; its sessions stay with their owners."""
        done(server().send("DELETE", "projects", project_id), f"project {project_id} is deleted")


def _add_audit(app: typer.Typer) -> None:
    @command(app, "audit", "audit --since 2026-11-20", "audit --actor user:ops --event tenant.changed")
    def audit(
        since: SinceOption = None,
        before: BeforeOption = None,
        actor: Annotated[str | None, typer.Option(help='A tenant, or one key: "user:ops (key 3)".')] = None,
        subject: Annotated[str | None, typer.Option(help="tenant:user:alice, key:3, pool:NAME ...")] = None,
        event: Annotated[str | None, typer.Option(help="tenant.changed, quota.set ...")] = None,
        limit: LimitOption = 50,
    ) -> None:
        """Show what operators and users did, newest first."""
        answer = server().pages(
            "audit",
            rows="events",
            limit=limit,
            since=utc_time(since),
            before=utc_time(before),
            actor=actor,
            subject=subject,
            event=event,
        )
        show(answer, "events", "time", "actor", "event", "subject", "details", empty="no events")


def _add_usage(app: typer.Typer) -> None:
    @command(app, "usage", "usage --by day", "usage --by run --tenant alice --since 2026-11-01 --csv > usage.csv")
    def usage(
        by: Annotated[str, typer.Option(help=" ".join(GROUPS))] = "tenant",
        since: SinceOption = None,
        before: BeforeOption = None,
        tenant: TenantOption = None,
        limit: LimitOption = 100,
        as_csv: Annotated[bool, typer.Option("--csv", help="All of it as CSV, on standard output.")] = False,
    ) -> None:
        """Add up what was used in whole hours of UTC; the last seven days without --since."""
        if by not in GROUPS:
            raise InvalidRequest(f"--by {by} is none of {', '.join(GROUPS)}")
        query: dict[str, Any] = {
            "since": utc_time(since),
            "before": utc_time(before),
            "tenant": tenant_or_none(tenant),
            "group_by": by,
        }
        if as_csv:
            for piece in server().stream("usage.csv", **query):
                # As it is, line ends included.
                typer.echo(piece, nl=False)
            return
        answer = server().pages("usage", rows="data", limit=limit, **query)
        if print_json(answer):
            return
        columns = ["trained=training_tokens", "prompts=prefill_tokens", "cached=cached_prefill_tokens"]
        columns += ["sampled=sampled_tokens", "saves=checkpoints", "byte hours=storage_byte_hours"]
        if answer["data"]:
            print_table(answer["data"], *_KEYS[by], *columns)
        else:
            stderr().print("nothing was used")
        if answer.get("next") is not None:
            stderr().print("there are more: raise --limit")
