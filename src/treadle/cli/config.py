"""`treadle config show`: what a server would run with, and why."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from treadle.cli.common import ConfigOption, stdout
from treadle.config import origin_of_each_value

app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Look at the configuration."""


@app.command(
    epilog="[bold]Examples[/]\n\ntreadle config show\n\nTREADLE_SERVER__PORT=9000 treadle config show --config my.toml"
)
def show(config: ConfigOption = None) -> None:
    """Print every setting, its value, and whether it is a default or from the file or the environment."""
    table = Table("setting", "value", "from")
    for origin in origin_of_each_value(config):
        style = "" if origin.source == "default" else "bold"
        table.add_row(Text(origin.key, style), Text(origin.shown, style), Text(origin.source, style or "dim"))
    stdout().print(table)
