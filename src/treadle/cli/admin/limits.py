"""`treadle admin quotas` and `losses`."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.admin.common import (
    LimitOption,
    command,
    done,
    group,
    print_json,
    print_table,
    scope,
    server,
    show,
    show_one,
    tenant_id,
)
from treadle.cli.common import stdout
from treadle.errors import InvalidRequest

ScopeArgument = Annotated[str, typer.Argument(metavar="SCOPE", help="default, organization:NAME or tenant:ID.")]
LossArgument = Annotated[str, typer.Argument(metavar="LOSS", help='Its name; "custom" for all that clients trace.')]
NamedArgument = Annotated[int, typer.Argument(metavar="ID", help="The id that `losses named list` shows.")]
WhyOption = Annotated[str, typer.Option("--reason", help="Why; its submitter is told.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    _add_quotas(group(app, "quotas", "What tenants may use, by scope."))
    losses = group(app, "losses", "Which losses tenants may run.")
    _add_losses(losses)
    _add_named(group(losses, "named", "Losses that users submitted under a name."))


def _add_quotas(quotas: typer.Typer) -> None:
    @command(quotas, "list", "quotas list")
    def list_quotas() -> None:
        """Show every quota with its unit, and what each scope sets."""
        answer = server().get("quotas")
        if print_json(answer):
            return
        print_table(answer["quotas"], "quota", "unit", "server's=default", "meaning")
        print_table(answer["scopes"], "scope", "sets=quotas")

    @command(quotas, "show", "quotas show tenant:alice")
    def show_quotas(of: ScopeArgument) -> None:
        """Show what one scope sets."""
        show_one(server().get("quotas", scope(of)))

    @command(quotas, "set", "quotas set default max_lora_rank=16", "quotas set tenant:alice max_models=none")
    def set_quotas(
        of: ScopeArgument,
        values: Annotated[
            list[str], typer.Argument(metavar="QUOTA=VALUE...", help='"none" leaves it to wider scopes.')
        ],
    ) -> None:
        """Set quotas of one scope; others of it stay."""
        answer = server().send("PUT", "quotas", scope(of), body=dict(_quota(text) for text in values))
        done(answer, f"quotas of {scope(of)} are set")

    @command(quotas, "delete", "quotas delete organization:acme")
    def delete_quotas(of: ScopeArgument) -> None:
        """Have a scope set nothing any more."""
        done(server().send("DELETE", "quotas", scope(of)), f"quotas of {scope(of)} are deleted")


def _add_losses(losses: typer.Typer) -> None:
    @command(losses, "list", "losses list")
    def list_losses() -> None:
        """Show the losses of this server, and what each scope says about them."""
        answer = server().get("losses")
        if print_json(answer):
            return
        print_table(answer["built_in"], "loss=name", "enabled=is_enabled", "settings")
        stdout().print(f"traced losses: {'enabled' if answer['traced_is_enabled'] else 'not enabled'}", highlight=False)
        if answer["disabled_operations"]:
            stdout().print(f"operations switched off: {', '.join(answer['disabled_operations'])}", highlight=False)
        if answer["rules"]:
            print_table(answer["rules"], "scope", "loss", "enabled=is_enabled", "bounds")

    @command(losses, "set", "losses set default dro --off", "losses set tenant:alice ppo --on --bound beta=0:1")
    def set_rule(
        of: ScopeArgument,
        loss: LossArgument,
        is_enabled: Annotated[bool | None, typer.Option("--on/--off", help="Neither: as wider scopes say.")] = None,
        bound: Annotated[list[str] | None, typer.Option("--bound", metavar="KEY=LOW:HIGH")] = None,
    ) -> None:
        """Say what one scope may do with one loss, instead of what was said before."""
        body: dict[str, object] = {"bounds": dict(_bound(text) for text in bound or ())}
        if is_enabled is not None:
            body["is_enabled"] = is_enabled
        done(server().send("PUT", "losses", "rules", scope(of), loss, body=body), f"{loss} in {scope(of)} is set")

    @command(losses, "unset", "losses unset tenant:alice ppo")
    def unset_rule(of: ScopeArgument, loss: LossArgument) -> None:
        """Have a scope say nothing about a loss any more."""
        done(server().send("DELETE", "losses", "rules", scope(of), loss), f"{loss} in {scope(of)} is unset")

    @command(losses, "operations", "losses operations", "losses operations --disable torch.sort --disable torch.cumsum")
    def operations(
        disable: Annotated[
            list[str] | None, typer.Option(help="Switch off these, and no others. Without it they are shown.")
        ] = None,
        enable_all: Annotated[bool, typer.Option("--enable-all", help="Switch off none.")] = False,
    ) -> None:
        """Show or set which operations graphs of traced losses may call."""
        if enable_all and disable:
            raise InvalidRequest("--enable-all and --disable contradict each other")
        if enable_all or disable:
            body = {"disabled": [] if enable_all else disable}
            answer = server().send("PUT", "losses", "operations", body=body)
        else:
            answer = server().get("losses", "operations")
        if not print_json(answer):
            disabled = set(answer["disabled"])
            rows = [{"operation": name, "enabled": name not in disabled} for name in answer["operations"]]
            print_table(rows, "operation", "enabled")


def _add_named(named: typer.Typer) -> None:
    @command(named, "list", "losses named list --status pending")
    def list_named(
        status: Annotated[str | None, typer.Option(help="pending, approved, rejected or revoked.")] = None,
        limit: LimitOption = 100,
    ) -> None:
        """List submissions, newest first."""
        path = ("losses", "named")
        answer = server().pages(*path, rows="data", limit=limit, place="before", status=status)
        columns = ("id=named_loss_id", "name", "tenant=tenant_id", "form", "source", "status", "reason")
        show(answer, "data", *columns, "submitted=submitted_at", empty="no submissions")

    @command(named, "show", "losses named show 7")
    def show_named(of: NamedArgument) -> None:
        """Show one submission: its source, its hash, what its review found."""
        show_one(server().get("losses", "named", str(of)))

    @command(named, "review", "losses named review 7")
    def review(of: NamedArgument) -> None:
        """Trace it in a throw-away process and try it on synthetic tensors: the only time that its code runs."""
        show_one(server().send("POST", "losses", "named", str(of), "review", body={}))

    @command(named, "approve", "losses named approve 7", "losses named approve 7 --tenant alice --tenant bob")
    def approve(
        of: NamedArgument,
        tenant: Annotated[list[str] | None, typer.Option(help="Who may use it; all without it.")] = None,
    ) -> None:
        """Let tenants use it under its name."""
        body: dict[str, object] = {} if not tenant else {"tenants": [tenant_id(one) for one in tenant]}
        done(server().send("POST", "losses", "named", str(of), "approve", body=body), f"submission {of} is approved")

    @command(named, "reject", 'losses named reject 7 --reason "no gradient"')
    def reject(of: NamedArgument, reason: WhyOption) -> None:
        """Refuse it."""
        answer = server().send("POST", "losses", "named", str(of), "reject", body={"reason": reason})
        done(answer, f"submission {of} is rejected")

    @command(named, "revoke", 'losses named revoke 7 --reason "too slow"')
    def revoke(of: NamedArgument, reason: WhyOption) -> None:
        """End its use at the next cycle."""
        answer = server().send("POST", "losses", "named", str(of), "revoke", body={"reason": reason})
        done(answer, f"submission {of} is revoked")

    @command(named, "submit", "losses named submit my_loss loss.json --form graph")
    def submit(
        name: Annotated[str, typer.Argument(metavar="NAME")],
        file: Annotated[
            typer.FileText, typer.Argument(metavar="FILE", help="The implementation; - for standard input.")
        ],
        form: Annotated[str, typer.Option(help="graph or python.")] = "python",
    ) -> None:
        """Submit one yourself."""
        body = {"name": name, "content": file.read(), "form": form}
        answer = server().send("POST", "losses", "named", body=body)
        done(answer, f"submission {answer.get('named_loss_id')} of {name} is pending")

    @command(named, "delete", "losses named delete 7")
    def delete(of: NamedArgument) -> None:
        """Delete a submission."""
        done(server().send("DELETE", "losses", "named", str(of)), f"submission {of} is deleted")


def _quota(text: str) -> tuple[str, int | None]:
    name, separator, value = text.partition("=")
    plain = value.replace("_", "")
    if not separator or not name or not (value == "none" or (plain.isascii() and plain.isdecimal())):
        raise InvalidRequest(f"{text!r} is not QUOTA=NUMBER or QUOTA=none")
    return name, None if value == "none" else int(plain)


def _bound(text: str) -> tuple[str, list[float]]:
    name, separator, limits = text.partition("=")
    low, colon, high = limits.partition(":")
    try:
        if not (separator and colon and name):
            raise ValueError
        return name, [float(low), float(high)]
    except ValueError:
        raise InvalidRequest(f"{text!r} is not KEY=LOW:HIGH") from None
