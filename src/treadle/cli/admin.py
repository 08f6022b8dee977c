"""`treadle admin`: what an operator decides about tenants, in a data directory whose server may be running."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from treadle.cli.common import ConfigOption, DataOption, open_store, stderr, stdout
from treadle.config import Settings, load_settings
from treadle.domain.fairness import WeightClass, tenant_of_user
from treadle.domain.ids import TenantId, checked_name

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(help="Decide about tenants.", no_args_is_help=True)
tenants = typer.Typer(help="Who gets how much of a contended clock.", no_args_is_help=True)
app.add_typer(tenants, name="tenants")


@tenants.command(
    name="set",
    epilog="[bold]Examples[/]\n\ntreadle admin tenants set alice --class interactive\n\n"
    "treadle admin tenants set open:0123456789abcdef --class bulk",
)
def set_class(
    tenant: Annotated[
        str,
        typer.Argument(
            metavar="TENANT", help="A user of `treadle keys`, or a tenant id with a colon as logs and listings show it."
        ),
    ],
    weight_class: Annotated[
        WeightClass,
        typer.Option("--class", help="What the tenant's tokens weigh while others wait; see scheduler.weight_*."),
    ],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Give a tenant a weight class. A running server follows within seconds."""
    tenant_id = _tenant_id(tenant)
    asyncio.run(_set_class(load_settings(config, {"data_dir": data}), tenant_id, weight_class))
    stderr().print(f"tenant {tenant_id} is {weight_class.value}", highlight=False)


@tenants.command(name="list", epilog="[bold]Example[/]\n\ntreadle admin tenants list --data /srv/treadle")
def list_classes(data: DataOption = None, config: ConfigOption = None) -> None:
    """List the tenants that have a class of their own; all others are standard."""
    classes = asyncio.run(_classes(load_settings(config, {"data_dir": data})))
    if not classes:
        stderr().print("no tenant was given a class: all are standard")
        return
    table = Table("tenant", "class")
    for tenant_id, weight_class in classes.items():
        table.add_row(tenant_id, weight_class.value)
    stdout().print(table)


def _tenant_id(text: str) -> TenantId:
    """A tenant by its id, which has a colon, or by the name of the user whose keys are its own."""
    return TenantId(text) if ":" in text else tenant_of_user(checked_name(text, what="user"))


async def _set_class(settings: Settings, tenant_id: TenantId, weight_class: WeightClass) -> None:
    async with open_store(settings, create=True) as store:
        await store.tenants.set_class(tenant_id, weight_class)


async def _classes(settings: Settings) -> Mapping[TenantId, WeightClass]:
    async with open_store(settings) as store:
        return await store.tenants.classes()
