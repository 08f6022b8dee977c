"""`treadle admin tenants`, `organizations` and `keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.admin.common import (
    LimitOption,
    ReasonOption,
    command,
    done,
    group,
    print_json,
    server,
    show,
    show_one,
    tenant_id,
)
from treadle.cli.common import stderr
from treadle.domain.fairness import WeightClass
from treadle.errors import InvalidRequest

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="A user's name, or a tenant's id with a colon.")]
OrganizationArgument = Annotated[str, typer.Argument(metavar="NAME")]
KeyArgument = Annotated[int, typer.Argument(metavar="KEY_ID", help="The id that `keys list` shows.")]

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 24 * 3_600}


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    _add_tenants(group(app, "tenants", "Who may do what, and gets how much of a contended clock."))
    _add_organizations(group(app, "organizations", "Names that tenants share, for decisions about all of them."))
    _add_keys(group(app, "keys", "API keys of all users."))


def _add_tenants(tenants: typer.Typer) -> None:
    @command(tenants, "list", "tenants list", "tenants list --organization acme --name ali")
    def list_tenants(
        organization: Annotated[str | None, typer.Option(help="Only of this organisation.")] = None,
        name: Annotated[str | None, typer.Option(help="Only those whose id contains this.")] = None,
        limit: LimitOption = 100,
    ) -> None:
        """List tenants by id."""
        answer = server().pages("tenants", rows="tenants", limit=limit, organization=organization, q=name)
        columns = ("tenant=tenant_id", "organization", "class=weight_class", "source", "suspended=is_suspended")
        show(answer, "tenants", *columns, "reason=suspended_reason", "created=created_at", empty="no tenants")

    @command(tenants, "show", "tenants show alice")
    def show_tenant(tenant: TenantArgument) -> None:
        """Show one tenant: what is decided about it, what it has, what it used today."""
        show_one(server().get("tenants", tenant_id(tenant)))

    @command(tenants, "set", "tenants set alice --class bulk", "tenants set alice --organization acme")
    def set_tenant(
        tenant: TenantArgument,
        weight_class: Annotated[
            WeightClass | None,
            typer.Option("--class", help="What its tokens weigh while others wait; see scheduler.weight_*."),
        ] = None,
        organization: Annotated[str | None, typer.Option(help='Put it into this organisation; "" for none.')] = None,
    ) -> None:
        """Change a tenant's weight class or organisation."""
        body: dict[str, object] = {}
        if weight_class is not None:
            body["weight_class"] = weight_class.value
        if organization is not None:
            body["organization"] = organization or None
        answer = server().send("PUT", "tenants", tenant_id(tenant), body=body)
        done(
            answer,
            f"tenant {answer['tenant_id']}: {answer['weight_class']}, {answer['organization'] or 'no organization'}",
        )

    @command(tenants, "suspend", 'tenants suspend alice --reason "unpaid"')
    def suspend(tenant: TenantArgument, reason: ReasonOption = None) -> None:
        """Refuse everything that a tenant asks for, on all servers within a second."""
        body = {"is_suspended": True, "suspended_reason": reason or ""}
        answer = server().send("PUT", "tenants", tenant_id(tenant), body=body)
        done(answer, f"tenant {answer['tenant_id']} is suspended")

    @command(tenants, "resume", "tenants resume alice")
    def resume(tenant: TenantArgument) -> None:
        """End a suspension."""
        answer = server().send("PUT", "tenants", tenant_id(tenant), body={"is_suspended": False})
        done(answer, f"tenant {answer['tenant_id']} is not suspended")

    @command(tenants, "quotas", "tenants quotas alice")
    def quotas(tenant: TenantArgument) -> None:
        """Show a tenant's limits, where each comes from, and what it uses of it."""
        show(server().get("tenants", tenant_id(tenant), "quotas"), "quotas", "quota", "limit", "from=scope", "used=use")


def _add_organizations(organizations: typer.Typer) -> None:
    @command(organizations, "list", "organizations list")
    def list_organizations(limit: LimitOption = 100) -> None:
        """List organisations by name."""
        answer = server().pages("organizations", rows="organizations", limit=limit)
        columns = ("name", "description", "tenants=num_tenants", "created=created_at")
        show(answer, "organizations", *columns, empty="no organizations")

    @command(organizations, "show", "organizations show acme")
    def show_organization(name: OrganizationArgument) -> None:
        """Show one organisation."""
        show_one(server().get("organizations", name))

    @command(organizations, "set", 'organizations set acme --description "Acme Inc."')
    def set_organization(name: OrganizationArgument, description: Annotated[str, typer.Option()] = "") -> None:
        """Make an organisation, or describe it anew."""
        done(
            server().send("PUT", "organizations", name, body={"description": description}),
            f"organization {name} is set",
        )

    @command(organizations, "delete", "organizations delete acme")
    def delete_organization(name: OrganizationArgument) -> None:
        """Delete an organisation without tenants, quotas and rules."""
        done(server().send("DELETE", "organizations", name), f"organization {name} is deleted")


def _add_keys(keys: typer.Typer) -> None:
    @command(keys, "list", "keys list --user alice")
    def list_keys(
        user: Annotated[str | None, typer.Option(help="Only of this user.")] = None, limit: LimitOption = 100
    ) -> None:
        """List keys, newest first, without the keys themselves."""
        answer = server().pages("keys", rows="keys", limit=limit, place="before", user=user)
        columns = ("id=key_id", "user", "name", "admin=is_admin", "organization", "created=created_at")
        show(answer, "keys", *columns, "expires=expires_at", "revoked=revoked_at", empty="no keys")

    @command(keys, "show", "keys show 3")
    def show_key(key_id: KeyArgument) -> None:
        """Show what is known of one key."""
        show_one(server().get("keys", str(key_id)))

    @command(keys, "create", "keys create alice --name laptop --expires 30d", "keys create ops --admin")
    def create_key(
        user: Annotated[str, typer.Argument(metavar="USER", help="Whose key it is.")],
        name: Annotated[str | None, typer.Option(help="What its holder calls it.")] = None,
        admin: Annotated[bool, typer.Option("--admin", help="It may do everything that this command can.")] = False,
        expires: Annotated[str | None, typer.Option(metavar="DURATION", help="When it ends: 90m, 12h, 30d.")] = None,
        organization: Annotated[str | None, typer.Option(help="The organisation that its user is in.")] = None,
    ) -> None:
        """Create a key and print it, once, on standard output."""
        body: dict[str, object] = {"user": user, "is_admin": admin}
        optional = {"name": name, "organization": organization, "expires_in_s": duration_s(expires)}
        body |= {field: value for field, value in optional.items() if value is not None}
        answer = server().send("POST", "keys", body=body)
        if not print_json(answer):
            typer.echo(answer["key"])
            stderr().print(f"key {answer['key_id']} of {user} created; it is not shown again", highlight=False)

    @command(keys, "set", "keys set 3 --name desktop", "keys set 3 --expires-at 2027-01-01T00:00:00Z")
    def set_key(
        key_id: KeyArgument,
        name: Annotated[str | None, typer.Option(help="What its holder calls it.")] = None,
        expires_at: Annotated[str | None, typer.Option(help='When it ends, with a zone; "never" for no end.')] = None,
    ) -> None:
        """Name a key anew, or give it another end."""
        body: dict[str, object] = {} if name is None else {"name": name}
        if expires_at is not None:
            body["expires_at"] = None if expires_at == "never" else expires_at
        done(server().send("PUT", "keys", str(key_id), body=body), f"key {key_id} is changed")

    @command(keys, "revoke", "keys revoke 3")
    def revoke_key(key_id: KeyArgument) -> None:
        """End a key and every token of it, on all servers within a second."""
        done(server().send("DELETE", "keys", str(key_id)), f"key {key_id} is revoked")


def duration_s(text: str | None) -> int | None:
    """Seconds of "90m", "12h" or "30d". Raises InvalidRequest."""
    if text is None:
        return None
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not (number.isascii() and number.isdecimal()):
        raise InvalidRequest(f"{text!r} is not a duration such as 90m, 12h or 30d")
    return int(number) * _UNITS_S[unit]
