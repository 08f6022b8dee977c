"""`treadle runs`: training runs of a data directory, and one run's loss curve in the terminal. Reads only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from treadle.cli.chart import line_chart
from treadle.cli.common import ConfigOption, DataOption, open_store, shown_time, stderr, stdout
from treadle.config import Settings, load_settings
from treadle.domain.ids import ModelId
from treadle.domain.ops import OpKind
from treadle.domain.records import CheckpointRecord, ModelRecord, RunLogEntry
from treadle.errors import NotFound

# A run's log is read whole up to here; beyond that the newest entries are shown.
MAX_ENTRIES = 20_000
LOSS = "loss:sum"

app = typer.Typer(help="Look at training runs.", no_args_is_help=True)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run and what belongs to it."""

    model: ModelRecord
    checkpoints: tuple[CheckpointRecord, ...]
    log: tuple[RunLogEntry, ...]


@app.command(name="list", epilog="[bold]Example[/]\n\ntreadle runs list --data ./treadle-data")
def list_runs(data: DataOption = None, config: ConfigOption = None) -> None:
    """List the training runs, newest first."""
    models = asyncio.run(_models(load_settings(config, {"data_dir": data})))
    if not models:
        stderr().print("no training runs yet")
        return
    table = Table("run", "tenant", "base model", "rank", "state", "ops", "created", "last request")
    for model in sorted(models, key=lambda model: model.created_at, reverse=True):
        table.add_row(
            Text(model.model_id, overflow="fold"),
            model.tenant_id,
            model.base_model,
            str(model.lora.rank),
            model.state.value,
            str(model.next_seq_id),
            shown_time(model.created_at),
            shown_time(model.last_request_at),
        )
    stdout().print(table)


@app.command(epilog="[bold]Example[/]\n\ntreadle runs show 4f3c...:train:0 --data ./treadle-data")
def show(
    run_id: Annotated[str, typer.Argument(help="The id that `treadle runs list` shows; its beginning is enough.")],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Show one run: its shape, its checkpoints and its loss curve."""
    run = asyncio.run(_run(load_settings(config, {"data_dir": data}), run_id))
    model, console = run.model, stdout()
    console.print(Text(model.model_id, "bold"), soft_wrap=True)
    console.print(
        f"{model.base_model} ({model.revision or 'no revision'}), rank {model.lora.rank}, {model.state.value}"
        + (f": {model.state_message}" if model.state_message else ""),
        highlight=False,
        markup=False,
    )
    if run.checkpoints:
        table = Table("checkpoint", "kind", "bytes", "created")
        for checkpoint in run.checkpoints:
            path = Text(checkpoint.tinker_path, overflow="fold")
            table.add_row(path, checkpoint.kind.value, f"{checkpoint.size_bytes:,}", shown_time(checkpoint.created_at))
        console.print(table)
    for line in loss_lines(run.log):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def loss_lines(log: Sequence[RunLogEntry]) -> list[str]:
    """The loss curve of a run's forward_backward calls as lines of text, in the order of their sequence numbers."""
    passes = [entry for entry in log if entry.kind is OpKind.FORWARD_BACKWARD and LOSS in entry.metrics]
    losses = [entry.metrics[LOSS] for entry in sorted(passes, key=lambda entry: entry.seq_id)]
    chart = line_chart(losses)
    if not chart:
        return ["no forward_backward has been recorded for this run yet"]
    return [f"{LOSS} of {len(losses)} forward_backward calls: {losses[0]:.4g} -> {losses[-1]:.4g}", *chart]


async def _models(settings: Settings) -> tuple[ModelRecord, ...]:
    async with open_store(settings) as store:
        return tuple(await store.models.list())


async def _run(settings: Settings, prefix: str) -> _Run:
    async with open_store(settings) as store:
        found = [model for model in await store.models.list() if model.model_id.startswith(prefix)]
        exact = [model for model in found if model.model_id == prefix] or found
        if len(exact) != 1:
            reason = "matches several runs" if exact else "names no run"
            raise NotFound(f"{prefix!r} {reason}; see `treadle runs list`")
        model_id = ModelId(exact[0].model_id)
        checkpoints = tuple(await store.checkpoints.of_model(model_id))
        return _Run(exact[0], checkpoints, tuple(await store.run_log.read(model_id, MAX_ENTRIES)))
