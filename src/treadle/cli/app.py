"""The command tree and its way out: which commands exist, and how an error ends the process.

Invariant: an error of ours is one clear line on standard error, without a traceback: exit 2 when the caller can fix it
(UserError, ConfigError), exit 1 when the server failed.
"""

from __future__ import annotations

import typer
from rich.markup import escape

from treadle import __version__
from treadle.cli import admin, common, config, db, demo, doctor, keys, runs, serve, tokenizer
from treadle.errors import ConfigError, TreadleError, UserError

app = typer.Typer(
    name="treadle",
    help="An open training-as-a-service server that speaks the Tinker API.\n\n"
    "Start a server with [bold]treadle serve[/bold], point the official SDK at it with "
    "[bold]TINKER_BASE_URL=http://127.0.0.1:8000[/bold], or watch it work with [bold]treadle demo[/bold].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="serve", epilog=serve.EXAMPLES)(serve.serve)
app.command(name="demo", epilog=demo.EXAMPLES)(demo.demo)
app.command(name="doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.add_typer(keys.app, name="keys")
app.add_typer(runs.app, name="runs")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(admin.app, name="admin")
app.add_typer(db.app, name="db")
app.add_typer(config.app, name="config")


@app.command(name="version")
def version() -> None:
    """Print the version of treadle."""
    typer.echo(__version__)


def main(args: list[str] | None = None) -> None:
    """Runs one command line and raises SystemExit with its status. args None is the process's own."""
    try:
        app(args, prog_name="treadle")
    except TreadleError as error:
        # soft_wrap: the message stays one line, so that it can be searched for and piped.
        common.stderr().print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True, highlight=False)
        raise SystemExit(2 if isinstance(error, UserError | ConfigError) else 1) from error
