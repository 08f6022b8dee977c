"""What several commands share: options with one meaning everywhere, consoles, and the store of a data directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from treadle.config import Settings, help_text
from treadle.errors import ConfigError

if TYPE_CHECKING:
    from treadle.store import Store

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings. Flags and environment win over it.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help=help_text("data_dir"), show_default="./treadle-data")]


# Wide enough for every table, so that a pipe or a file gets one line per row.
PIPE_COLUMNS = 250


def stdout() -> Console:
    """Where results go."""
    console = Console(emoji=False)  # else run ids, which contain ":train:", show a tram
    return console if console.is_terminal else Console(width=PIPE_COLUMNS, emoji=False)


def stderr() -> Console:
    """Where everything else goes."""
    return Console(stderr=True, emoji=False)


@asynccontextmanager
async def open_store(settings: Settings, *, create: bool = False, migrate: bool = True) -> AsyncIterator[Store]:
    """The store that a server with these settings uses; it may be running meanwhile. Closed at the end.

    Without `create`, a data directory that has no database yet is a ConfigError: most likely --data is wrong. Without
    `migrate`, the schema stays as it is.
    """
    from treadle.store import Store

    if not settings.store.url:
        if create:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
        elif not settings.database_file.is_file():
            raise ConfigError(f"there is no database in {settings.data_dir}; is --data right?")
    store = await Store.open(settings.database_url, migrate=migrate)
    try:
        yield store
    finally:
        await store.close()


def shown_time(seconds: float | None) -> str:
    """A stored time in the reader's own zone; empty for None."""
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def plain(text: str) -> Text:
    """What somebody chose, for a terminal: never read as markup, and what would command the terminal is spelled out."""
    return Text("".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text))
