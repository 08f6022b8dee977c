"""What several commands share: options with one meaning everywhere, consoles, and the store of a data directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from treadle.config import Settings, help_text

if TYPE_CHECKING:
    from treadle.store import Store

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings. Flags and environment win over it.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help=help_text("data_dir"), show_default="./treadle-data")]


def stdout() -> Console:
    """Where results go."""
    return Console()


def stderr() -> Console:
    """Where everything else goes."""
    return Console(stderr=True)


@asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[Store]:
    """The store that a server with these settings uses; it may be running meanwhile. Closed at the end."""
    from treadle.store import Store

    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = await Store.open(settings.database_url)
    try:
        yield store
    finally:
        await store.close()


def shown_time(seconds: float | None) -> str:
    """A stored time in the reader's own zone; empty for None."""
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
