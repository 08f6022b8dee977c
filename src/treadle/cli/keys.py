"""`treadle keys`: create, list and revoke API keys in a data directory, whether or not its server runs.

Invariant: a key is shown once, on standard output, when it is created; only its digest is stored.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from treadle.cli.common import ConfigOption, DataOption, open_store, plain, shown_time, stderr, stdout
from treadle.config import Settings, load_settings
from treadle.domain.ids import checked_name
from treadle.domain.keys import checked_key_name, key_digest, new_key
from treadle.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from treadle.domain.ids import TenantId
    from treadle.domain.records import KeyRecord

_DURATION = re.compile(r"([0-9]{1,9})([mhdw])")
_UNITS_S = {"m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
MAX_LIFE_S = 3_650 * 86_400

app = typer.Typer(
    help="Create, list and revoke API keys. The first key ends open mode, also of a running server.",
    no_args_is_help=True,
)


@app.command(
    epilog="[bold]Examples[/]\n\ntreadle keys create alice\n\n"
    "export TINKER_API_KEY=$(treadle keys create alice --data /srv/treadle)\n\n"
    "treadle keys create bob --name laptop --expires 30d --organization acme"
)
def create(
    user: Annotated[
        str, typer.Argument(metavar="USER", help="Whose key it is. Keys of one user share runs and checkpoints.")
    ],
    admin: Annotated[bool, typer.Option("--admin", help="The key may also use /admin/v1, and read /metrics.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="What to call the key.")] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="TIME", help="When the key ends: 12h, 30d, 8w from now. Without it, it never ends."
        ),
    ] = None,
    organization: Annotated[
        str | None, typer.Option("--organization", help="What the user becomes a member of; see `treadle admin`.")
    ] = None,
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Create a key and print it, once, on standard output. Only its hash is stored."""
    settings = load_settings(config, {"data_dir": data})
    key = new_key()
    wanted = _NewKey(
        user=checked_name(user, what="user"),
        digest=key_digest(key),
        is_admin=admin,
        name=None if name is None else checked_key_name(name),
        expires_at=None if expires is None else time.time() + _seconds(expires),
        organization=None if organization is None else checked_name(organization, what="organization"),
    )
    record = asyncio.run(_add(settings, wanted))
    typer.echo(key)
    stderr().print(f"key {record.key_id} of {record.user} created; it is not shown again", highlight=False)


@app.command(name="list", epilog="[bold]Example[/]\n\ntreadle keys list --data /srv/treadle")
def list_keys(data: DataOption = None, config: ConfigOption = None) -> None:
    """List all keys, without the keys themselves."""
    records, organizations = asyncio.run(_list(load_settings(config, {"data_dir": data})))
    if not records:
        stderr().print("no key was created yet: a server on a loopback address is open to every tml- key")
        return
    table = Table("id", "user", "name", "organization", "admin", "created", "expires", "revoked")
    for record in records:
        table.add_row(
            str(record.key_id),
            plain(record.user),
            plain(record.name or ""),
            plain(organizations.get(record.tenant_id, "")),
            "yes" if record.is_admin else "",
            shown_time(record.created_at),
            shown_time(record.expires_at),
            shown_time(record.revoked_at),
        )
    stdout().print(table)


@app.command(epilog="[bold]Example[/]\n\ntreadle keys revoke 3")
def revoke(
    key_id: Annotated[int, typer.Argument(metavar="ID", help="The id that `treadle keys list` shows.")],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Revoke a key. A running server refuses it within a second; revoking the last key does not open the server."""
    if not asyncio.run(_revoke(load_settings(config, {"data_dir": data}), key_id)):
        raise NotFound(f"there is no key with id {key_id} that could be revoked; see `treadle keys list`")
    stderr().print(f"key {key_id} revoked", highlight=False)


@dataclass(frozen=True, slots=True)
class _NewKey:
    user: str
    digest: str
    is_admin: bool
    name: str | None
    expires_at: float | None
    organization: str | None


def _seconds(text: str) -> float:
    """What "30d" means. Raises InvalidRequest."""
    match = _DURATION.fullmatch(text)
    seconds = int(match[1]) * _UNITS_S[match[2]] if match is not None else 0
    if not 0 < seconds <= MAX_LIFE_S:
        raise InvalidRequest(
            f"--expires {text[:40]!r} is not a time such as 90m, 12h, 30d or 8w, of at most {MAX_LIFE_S // 86_400} days"
        )
    return seconds


async def _add(settings: Settings, key: _NewKey) -> KeyRecord:
    async with open_store(settings, create=True) as store:
        return await store.keys.add(
            key.user,
            key.digest,
            key.is_admin,
            name=key.name,
            expires_at=key.expires_at,
            organization=key.organization,
        )


async def _list(settings: Settings) -> tuple[tuple[KeyRecord, ...], dict[TenantId, str]]:
    """The newest keys, oldest of them first, and the organisations of their users."""
    async with open_store(settings) as store:
        records = tuple(await store.keys.list())
        return records, await store.keys.organizations([record.tenant_id for record in records])


async def _revoke(settings: Settings, key_id: int) -> bool:
    async with open_store(settings) as store:
        return await store.keys.revoke(key_id)
