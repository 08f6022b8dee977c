"""`treadle runs`: training runs of a data directory, and one run's loss curve in the terminal. Reads only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from treadle.cli.chart import line_chart
from treadle.cli.common import ConfigOption, DataOption, open_store, shown_time, stderr, stdout
from treadle.config import Settings, load_settings
from treadle.domain.ids import ModelId
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.errors import NotFound

if TYPE_CHECKING:
    from treadle.domain.records import CheckpointRecord, ModelRecord, ReplayDebt, RunLogEntry
    from treadle.store import Store

LOSS = "loss:sum"
# Of the newest requests, so many are listed one by one.
NUM_RECENT = 10

app = typer.Typer(help="Look at training runs.", no_args_is_help=True)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run and what belongs to it."""

    model: ModelRecord
    debt: ReplayDebt
    checkpoints: tuple[CheckpointRecord, ...]
    log: tuple[RunLogEntry, ...]


@app.command(name="list", epilog="[bold]Example[/]\n\ntreadle runs list --data ./treadle-data")
def list_runs(data: DataOption = None, config: ConfigOption = None) -> None:
    """List the training runs, newest first (at most 1,000)."""
    models = asyncio.run(_models(load_settings(config, {"data_dir": data})))
    if not models:
        stderr().print("no training runs yet")
        return
    table = Table(Column("run", no_wrap=True), "tenant", "base model", "rank", "state", "ops", "created")
    for model in models:
        table.add_row(
            model.model_id,
            model.tenant_id,
            model.base_model,
            str(model.lora.rank),
            model.state.value,
            str(model.next_seq_id),
            shown_time(model.created_at),
        )
    stdout().print(table)


@app.command(epilog="[bold]Example[/]\n\ntreadle runs show 4f3c...:train:0 --data ./treadle-data")
def show(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="The id that `treadle runs list` shows; its beginning is enough.")
    ],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Show one run: its state and what it can be restored from, its last requests, checkpoints, and loss curve."""
    run = asyncio.run(_run(load_settings(config, {"data_dir": data}), run_id))
    model, console = run.model, stdout()
    console.print(Text(model.model_id, "bold"), soft_wrap=True)
    console.print(
        f"{model.base_model} ({model.revision or 'no revision'}), rank {model.lora.rank}, {model.state.value}"
        + (f": {model.state_message}" if model.state_message else ""),
        highlight=False,
        markup=False,
    )
    for line in recovery_lines(model, run.debt, run.log, now=time.time()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if run.log:
        console.print(_recent(run.log[-NUM_RECENT:]))
    if run.checkpoints:
        table = Table("checkpoint", "kind", "bytes", "created")
        for checkpoint in run.checkpoints:
            path = Text(checkpoint.tinker_path, overflow="fold")
            table.add_row(path, checkpoint.kind.value, f"{checkpoint.size_bytes:,}", shown_time(checkpoint.created_at))
        console.print(table)
    for line in loss_lines(run.log):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def recovery_lines(model: ModelRecord, debt: ReplayDebt, log: Sequence[RunLogEntry], *, now: float) -> list[str]:
    """How far the run is, what a restore would start from and have to run again, and how often that happened."""
    lines = [f"committed up to request {model.next_seq_id - 1}; restored {model.incarnation} times"]
    if not debt.snapshots:
        return [*lines, "no snapshot: its state cannot be had back"]
    newest = debt.snapshots[0]
    what = "its seed" if newest.blob_key is None else f"{newest.num_bytes:,} bytes"
    lines.append(f"newest snapshot: request {newest.seq_id}, {now - newest.created_at:,.0f} s ago ({what})")
    if newest.seq_id >= model.changed_seq:
        lines.append("replay debt: none")
    else:
        replay_s = sum(entry.run_s for entry in log if newest.seq_id < entry.seq_id <= model.changed_seq)
        lines.append(
            f"replay debt: {replay_s:.1f} s of work behind it; {debt.num_payloads} requests "
            f"({debt.payload_bytes:,} bytes) are kept"
        )
    return lines


def _recent(entries: Sequence[RunLogEntry]) -> Table:
    """The newest requests one by one: what each waited and ran."""
    table = Table("request", "kind", "waited", "ran", "cycle", "committed")
    for entry in entries:
        waited, ran = f"{entry.queued_s:.3f} s", f"{entry.run_s:.3f} s"
        when = shown_time(entry.created_at)
        table.add_row(str(entry.seq_id), entry.kind.value, waited, ran, str(entry.cycle), when)
    return table


def loss_lines(log: Sequence[RunLogEntry]) -> list[str]:
    """The loss curve of a run's forward_backward calls as lines of text, in the order of their sequence numbers."""
    # Imported here: with it comes numpy, and `--help` needs none of it.
    from treadle.domain.ops import OpKind

    passes = [entry for entry in log if entry.kind is OpKind.FORWARD_BACKWARD and LOSS in entry.metrics]
    losses = [entry.metrics[LOSS] for entry in sorted(passes, key=lambda entry: entry.seq_id)]
    chart = line_chart(losses)
    if not chart:
        return ["no forward_backward has been recorded for this run yet"]
    return [f"{LOSS} of {len(losses)} forward_backward calls: {losses[0]:.4g} -> {losses[-1]:.4g}", *chart]


async def _models(settings: Settings) -> list[ModelRecord]:
    async with open_store(settings) as store:
        models, _ = await store.models.list(None, MAX_PAGE_ROWS)
        return models


async def _run(settings: Settings, prefix: str) -> _Run:
    async with open_store(settings) as store:
        model = await store.models.get(ModelId(prefix)) or await _newest_with(store, prefix)
        return _Run(
            model,
            await store.snapshots.debt(model.model_id),
            tuple(await store.checkpoints.of_model(model.model_id)),
            tuple(await store.run_log.read(model.model_id, MAX_PAGE_ROWS)),
        )


async def _newest_with(store: Store, prefix: str) -> ModelRecord:
    models, _ = await store.models.list(None, MAX_PAGE_ROWS)
    found = [model for model in models if model.model_id.startswith(prefix)]
    if len(found) != 1:
        reason = "matches several runs" if found else "names no run"
        raise NotFound(f"{prefix!r} {reason}; see `treadle runs list`")
    return found[0]
