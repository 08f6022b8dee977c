"""`treadle keys`: create, list and revoke API keys in a data directory, whether or not its server runs.

Invariant: a key is shown once, on standard output, when it is created; only its digest is stored.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from treadle.cli.common import ConfigOption, DataOption, open_store, shown_time, stderr, stdout
from treadle.config import Settings, load_settings
from treadle.domain.ids import checked_name
from treadle.domain.keys import key_digest, new_key
from treadle.errors import NotFound

if TYPE_CHECKING:
    from treadle.domain.records import KeyRecord

app = typer.Typer(
    help="Create, list and revoke API keys. The first key ends open mode, also of a running server.",
    no_args_is_help=True,
)


@app.command(
    epilog="[bold]Examples[/]\n\ntreadle keys create alice\n\n"
    "export TINKER_API_KEY=$(treadle keys create alice --data /srv/treadle)"
)
def create(
    user: Annotated[
        str, typer.Argument(metavar="USER", help="Whose key it is. Keys of one user share runs and checkpoints.")
    ],
    admin: Annotated[
        bool, typer.Option("--admin", help="The key may also read /metrics of a server that is not on loopback.")
    ] = False,
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Create a key and print it, once, on standard output. Only its hash is stored."""
    settings = load_settings(config, {"data_dir": data})
    key = new_key()
    record = asyncio.run(_add(settings, checked_name(user, what="user"), key_digest(key), is_admin=admin))
    typer.echo(key)
    stderr().print(f"key {record.key_id} of {record.user} created; it is not shown again", highlight=False)


@app.command(name="list", epilog="[bold]Example[/]\n\ntreadle keys list --data /srv/treadle")
def list_keys(data: DataOption = None, config: ConfigOption = None) -> None:
    """List all keys, without the keys themselves."""
    records = asyncio.run(_list(load_settings(config, {"data_dir": data})))
    if not records:
        stderr().print("no key was created yet: a server on a loopback address is open to every tml- key")
        return
    table = Table("id", "user", "admin", "created", "revoked")
    for record in records:
        admin = "yes" if record.is_admin else ""
        table.add_row(
            str(record.key_id), record.user, admin, shown_time(record.created_at), shown_time(record.revoked_at)
        )
    stdout().print(table)


@app.command(epilog="[bold]Example[/]\n\ntreadle keys revoke 3")
def revoke(
    key_id: Annotated[int, typer.Argument(metavar="ID", help="The id that `treadle keys list` shows.")],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Revoke a key. A running server refuses it within seconds; revoking the last key does not open the server."""
    if not asyncio.run(_revoke(load_settings(config, {"data_dir": data}), key_id)):
        raise NotFound(f"there is no key with id {key_id} that could be revoked; see `treadle keys list`")
    stderr().print(f"key {key_id} revoked", highlight=False)


async def _add(settings: Settings, user: str, digest: str, *, is_admin: bool) -> KeyRecord:
    async with open_store(settings, create=True) as store:
        return await store.keys.add(user, digest, is_admin=is_admin)


async def _list(settings: Settings) -> tuple[KeyRecord, ...]:
    async with open_store(settings) as store:
        return tuple(await store.keys.list())


async def _revoke(settings: Settings, key_id: int) -> bool:
    async with open_store(settings) as store:
        return await store.keys.revoke(key_id)
