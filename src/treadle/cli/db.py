"""`treadle db`: the database and the blobs as a whole. Upgrade the schema, look for damage, make a backup.

All of it may run beside a server. Invariant: only `upgrade` changes anything, and `backup` names a copy complete only
when every blob that the copied rows name is in it. Weights without a name may be on their way to their blob, or lost
with a machine: what is there of them is copied.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.markup import escape

from treadle.cli.common import ConfigOption, DataOption, open_store, stderr, stdout
from treadle.config import Settings, environment_of_tool, load_settings
from treadle.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from treadle.blobs import BlobStore
    from treadle.domain.ids import BlobKey
    from treadle.store import Store

app = typer.Typer(help="Look after the database and the files that it names.", no_args_is_help=True)

DATABASE_COPY = "treadle.db"
DUMP = "treadle.dump"
# A blob that goes while it is copied was retired meanwhile: the database is copied again, which then lacks it too.
_MAX_ROUNDS = 5
_MAX_SHOWN = 20


@app.command(epilog="[bold]Example[/]\n\ntreadle db upgrade --data /srv/treadle")
def upgrade(data: DataOption = None, config: ConfigOption = None) -> None:
    """Bring the schema to this version of treadle, which [bold]treadle serve[/] does as well when it starts."""
    before, after = asyncio.run(_upgraded(load_settings(config, {"data_dir": data})))
    done = f"already at {after}" if before == after else f"upgraded from {before or 'nothing'} to {after}"
    stdout().print(f"schema {done}", highlight=False)


@app.command(epilog="[bold]Example[/]\n\ntreadle db check --data /srv/treadle")
def check(data: DataOption = None, config: ConfigOption = None) -> None:
    """Check the schema, the database's own integrity, and that every blob that a row names is there.

    Exits with 1 when something is wrong. Blobs that no row names are only counted: a server sweeps them.
    """
    problems, notes = asyncio.run(_checked(load_settings(config, {"data_dir": data})))
    for note in notes:
        stdout().print(escape(note), highlight=False)
    for problem in problems[:_MAX_SHOWN]:
        stderr().print(f"[bold red]problem:[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if problems:
        stderr().print(f"{len(problems)} problems", highlight=False)
        raise typer.Exit(1)
    stdout().print("sound")


@app.command(epilog="[bold]Example[/]\n\ntreadle db backup /backup/treadle-today --data /srv/treadle")
def backup(
    target: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to write it; a new directory.")],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Copy the database, as of one moment, and every blob that it names. A server may go on meanwhile.

    SQLite: to restore, start a server with [bold]--data DIRECTORY[/]. PostgreSQL is dumped by its own
    [bold]pg_dump[/]; without it, the command to run is printed.
    """
    settings = load_settings(config, {"data_dir": data})
    try:
        target.mkdir(parents=True)
        target = target.resolve()
    except OSError as error:
        raise ConfigError(f"cannot write a backup to {target}: {error.strerror}; name a new directory") from error
    num_blobs = asyncio.run(_backed_up(settings, target))
    stdout().print(f"backup complete: database and {num_blobs} blobs in {target}", highlight=False, soft_wrap=True)


async def _upgraded(settings: Settings) -> tuple[str | None, str | None]:
    async with open_store(settings, migrate=False) as store:
        before = await store.upkeep.schema_version()
    async with open_store(settings) as store:
        return before, await store.upkeep.schema_version()


async def _checked(settings: Settings) -> tuple[list[str], list[str]]:
    """What is wrong, and what else there is to say."""
    async with open_store(settings, migrate=False) as store:
        version = await store.upkeep.schema_version()
        problems = await store.upkeep.problems()
        if not await store.schema_is_current():
            return [*problems, f"the schema is {version or 'missing'}; run `treadle db upgrade`"], []
        blobs = _blobs(settings.blobs_url)
        # Listed before rows are read: what is written meanwhile is then in the rows at least.
        stored = set(await asyncio.to_thread(lambda: list(blobs.iter_keys())))
        named: set[str] = set()
        async for key in _paged(store.upkeep.named_blobs):
            named.add(key)
            # Blobs come before their rows, so one that is not in the list may have come since.
            if key not in stored and not await asyncio.to_thread(blobs.exists, key):
                problems.append(f"blob {key} is named by a row and is not there")
        versions = {key async for key in _paged(store.upkeep.unnamed_versions)}
        named |= versions
        notes = [
            f"schema {version}",
            f"{len(named)} blobs are named by rows",
            f"{len(stored - named)} blobs are named by none, and wait for a sweep",
        ]
        if away := len(versions - stored):
            notes.append(f"{away} of weights without a name are not there: on their way, or lost with their machine")
        return problems, notes


async def _backed_up(settings: Settings, target: Path) -> int:
    """The number of blobs copied."""
    from treadle.store.upkeep import postgres_address

    source, copies = _blobs(settings.blobs_url), _blobs(str(target / "blobs"))
    if postgres_address(settings.database_url) is None:
        return await _copied_sqlite(settings, source, copies, target / DATABASE_COPY)
    async with open_store(settings) as store:
        # Twice: blobs that go while the dump is made are in the first copy, those that come are in the second.
        await _copy_named(store, source, copies)
        await asyncio.to_thread(_dump, settings.database_url, target / DUMP)
        await _copy_named(store, source, copies)
    return await asyncio.to_thread(lambda: sum(1 for _ in copies.iter_keys()))


async def _copied_sqlite(settings: Settings, source: BlobStore, copies: BlobStore, file: Path) -> int:
    from treadle.store import Store

    for _ in range(_MAX_ROUNDS):
        async with open_store(settings) as store:
            await store.upkeep.copy_to(file)
        copy = await Store.open(f"sqlite:///{file}")
        try:
            missing = await _copy_named(copy, source, copies)
            if not missing:
                return await asyncio.to_thread(lambda: sum(1 for _ in copies.iter_keys()))
        finally:
            await copy.close()
    raise NotFound(f"{len(missing)} blobs are named and not there, {missing[0]} among them; see `treadle db check`")


async def _copy_named(store: Store, source: BlobStore, copies: BlobStore) -> list[BlobKey]:
    """Copy what rows name and is not copied yet; what of it is not there."""
    missing = []
    async for key in _paged(store.upkeep.named_blobs):
        try:
            await asyncio.to_thread(_copy_blob, source, copies, key)
        except NotFound:
            missing.append(key)
    async for key in _paged(store.upkeep.unnamed_versions):
        with suppress(NotFound):
            await asyncio.to_thread(_copy_blob, source, copies, key)
    return missing


def _copy_blob(source: BlobStore, copies: BlobStore, key: BlobKey) -> None:
    if not copies.exists(key):
        copies.write(key, source.read(key))


class _ReadPage(Protocol):
    async def __call__(self, *, after: str = "") -> list[BlobKey]:
        """The next page behind a key."""


async def _paged(read: _ReadPage) -> AsyncIterator[BlobKey]:
    after = ""
    while page := await read(after=after):
        for key in page:
            yield key
        after = page[-1]


def _dump(url: str, file: Path, *, find: Callable[[str], str | None] = shutil.which) -> None:
    """Have PostgreSQL's own tool write its dump. Raises ConfigError, with the command, when it is not there."""
    from treadle.store.upkeep import postgres_address

    address = postgres_address(url)
    assert address is not None
    command = ["pg_dump", "--format=custom", "--no-owner", f"--file={file}", f"--dbname={address.url}"]
    if find(command[0]) is None:
        raise ConfigError(f"pg_dump is not installed here; run: {' '.join(command)}")
    secret = {} if address.password is None else {"PGPASSWORD": address.password}
    done = subprocess.run(command, env=environment_of_tool(secret), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"pg_dump failed: {done.stderr.strip()[:500]}")


def _blobs(url: str) -> BlobStore:
    from treadle.blobs import open_blobs

    return open_blobs(url)
