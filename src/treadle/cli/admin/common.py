"""What all of `treadle admin` shares: its options, the server that they name, and how answers are shown.

Every command has --url, --key-file and --json, which are added here rather than written into each of them. With
--json, standard output is the server's own answer and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.table import Table
from rich.text import Text

from treadle.cli.admin.client import AdminServer
from treadle.cli.common import plain, shown_time, stderr, stdout
from treadle.domain.fairness import tenant_of_user
from treadle.domain.ids import checked_name
from treadle.errors import InvalidRequest

LimitOption = Annotated[int, typer.Option("--limit", min=1, help="Most rows.")]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="Only of this tenant: a user's name, or an id with a colon.")
]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Why; those whom it stops are told.")]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="Where the server is; TREADLE_URL, or http://127.0.0.1:8000 without it.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", help="A file with the admin key; TREADLE_ADMIN_KEY without it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]


@dataclass(frozen=True, slots=True)
class _Options:
    """What every command is given."""

    url: str | None = None
    key_file: Path | None = None
    is_json: bool = False


_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}

_options: ContextVar[_Options] = ContextVar("options of treadle admin")


def command(group: typer.Typer, name: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command of `treadle admin`, with the options that all of them have."""
    shown = "\n\n".join(f"treadle admin {example}" for example in examples)

    def register(run: Callable[..., None]) -> Callable[..., None]:
        return group.command(name=name, epilog=f"[bold]Examples[/]\n\n{shown}")(_with_options(run))

    return register


def _with_options(run: Callable[..., None]) -> Callable[..., None]:
    """`run` as Typer sees it: with three more options, which are kept for `server` and `show`."""

    @functools.wraps(run)
    def wrapped(
        *args: Any, url: str | None = None, key_file: Path | None = None, is_json: bool = False, **given: Any
    ) -> None:
        token = _options.set(_Options(url, key_file, is_json))
        try:
            run(*args, **given)
        finally:
            _options.reset(token)

    more = {"url": UrlOption, "key_file": KeyFileOption, "is_json": JsonOption}
    defaults = {"url": None, "key_file": None, "is_json": False}
    hints = get_type_hints(run, include_extras=True)
    own = [parameter.replace(annotation=hints[name]) for name, parameter in inspect.signature(run).parameters.items()]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in more.items()
    ]
    # What Typer looks at.
    wrapped.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]  # functions may have one
    wrapped.__annotations__ = hints | more
    return wrapped


def group(app: typer.Typer, name: str, text: str) -> typer.Typer:
    """A group of commands below another."""
    made = typer.Typer(help=text, no_args_is_help=True)
    app.add_typer(made, name=name)
    return made


def server() -> AdminServer:
    """The server of the command that runs. Raises ConfigError without a key."""
    options = _options.get()
    return AdminServer(url=options.url, key_file=options.key_file)


def show(answer: Mapping[str, Any], rows: str, *columns: str, empty: str = "nothing") -> None:
    """Print the list that an answer has under `rows` as a table. columns: "field", "heading=field" or
    "heading=field.field"."""
    if print_json(answer):
        return
    if not answer[rows]:
        stderr().print(empty)
        return
    print_table(answer[rows], *columns)
    if answer.get("next") is not None:
        stderr().print("there are more: raise --limit")


def show_one(answer: Mapping[str, Any]) -> None:
    """Print an answer that is about one thing."""
    if print_json(answer):
        return
    table = Table(show_header=False, box=None)
    for name, value in answer.items():
        table.add_row(Text(name, "bold"), cell(value))
    stdout().print(table)


def done(answer: Mapping[str, Any], words: str) -> None:
    """Say that something was changed."""
    if not print_json(answer):
        stderr().print(words, highlight=False, markup=False, soft_wrap=True)


def print_table(rows: Sequence[Mapping[str, Any]], *columns: str, title: str | None = None) -> None:
    """Rows as a table; see `show`."""
    table = Table(title=title, title_justify="left")
    parts = [column.rpartition("=") for column in columns]
    for heading, _, path in parts:
        table.add_column(heading or path.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(cell(_at(row, path)) for _, _, path in parts))
    stdout().print(table)


def print_json(answer: Mapping[str, Any]) -> bool:
    """Print it as JSON if that was asked for; whether it was."""
    if _options.get().is_json:
        # Others than these are in no JSON as they are, and a terminal obeys some of them.
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False).translate(_CONTROLS))
        return True
    return False


def cell(value: object) -> Text:
    """One value for people: most of them are what users chose."""
    match value:
        case None:
            return Text("")
        case bool():
            return Text("yes" if value else "no")
        case int():
            return Text(f"{value:,}")
        case float():
            return Text(f"{value:,.3f}")
        case dict() | list():
            return plain(json.dumps(value, ensure_ascii=False))
        case _:
            return plain(_shown_text(str(value)))


def tenant_id(text: str) -> str:
    """A tenant by its id, which has a colon, or by the name of the user whose keys are its own."""
    return text if ":" in text else tenant_of_user(checked_name(text, what="user"))


def tenant_or_none(text: str | None) -> str | None:
    """The same for an option that may be absent."""
    return None if text is None else tenant_id(text)


def scope(text: str) -> str:
    """A scope: default, organization:NAME, tenant:ID; a tenant may be named as elsewhere (tenant:alice)."""
    kind, _, name = text.partition(":")
    return f"tenant:{tenant_id(name)}" if kind == "tenant" and name else text


def utc_time(text: str | None) -> str | None:
    """A day or a time as the server takes it; without a zone it is UTC's. Raises InvalidRequest."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not a time such as 2026-11-20 or 2026-11-20T13:00") from None
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).isoformat()


def _shown_text(text: str) -> str:
    # Times in answers end with a zone; everything else stays as it is.
    if len(text) < 19 or text[4:5] != "-" or text[10:11] != "T":
        return text
    try:
        return shown_time(datetime.fromisoformat(text).timestamp())
    except ValueError:
        return text


def _at(row: Mapping[str, Any], path: str) -> object:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
