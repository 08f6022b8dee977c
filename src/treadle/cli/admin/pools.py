"""`treadle admin pools`, `runs`, `queue` and `slots`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from treadle.cli.admin.client import AdminServer
from treadle.cli.admin.common import (
    LimitOption,
    ReasonOption,
    TenantOption,
    command,
    done,
    group,
    print_json,
    print_table,
    server,
    show,
    show_one,
    tenant_or_none,
)
from treadle.cli.common import stderr, stdout
from treadle.errors import ServerError

PoolArgument = Annotated[str, typer.Argument(metavar="POOL", help="A base model's name, as `pools list` shows it.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN_ID")]
PoolOption = Annotated[str | None, typer.Option("--pool", help="Only of this pool.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")]

# How long a command about a run is waited for, and how often it is looked at.
WAIT_S = 120.0
LOOK_EVERY_S = 0.5


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    _add_pools(group(app, "pools", "Base models: add, pause, resume, drain, scale, remove."))
    _add_runs(group(app, "runs", "Training runs of all tenants."))
    _add_views(app)


def _add_pools(pools: typer.Typer) -> None:
    @command(pools, "list", "pools list")
    def list_pools() -> None:
        """List the pools of this server and how they are."""
        columns = ("pool=name", "source", "revision", "state", "reason", "ready=is_ready", "why not=not_ready_reason")
        show(server().get("pools"), "pools", *columns, "leader", "cycle", empty="no pools")

    @command(pools, "add", "pools add mine /models/my-finetune", "pools add Qwen/Qwen3-0.6B Qwen/Qwen3-0.6B")
    def add(
        pool: Annotated[str, typer.Argument(metavar="POOL", help="Its name for clients.")],
        source: Annotated[
            str | None,
            typer.Argument(
                metavar="[SOURCE]",
                help="A hub's name or a directory of the servers. Without it: what it was served from before.",
            ),
        ] = None,
        revision: Annotated[str | None, typer.Option(help="Of a hub's model.")] = None,
    ) -> None:
        """Serve another base model from now on, on all servers."""
        asked = {"pool": pool, "source": source, "revision": revision}
        body = {name: value for name, value in asked.items() if value is not None}
        done(
            server().send("POST", "pools", body=body), f"pool {pool} is added; `treadle admin pools list` shows it load"
        )

    @command(pools, "pause", 'pools pause treadle/tiny --reason "maintenance"')
    def pause(pool: PoolArgument, reason: ReasonOption = None) -> None:
        """Plan nothing of a pool; requests are taken and wait."""
        _decide("pause", pool, reason, "paused")

    @command(pools, "resume", "pools resume treadle/tiny")
    def resume(pool: PoolArgument) -> None:
        """Go on after a pause or a drain."""
        _decide("resume", pool, None, "serving")

    @command(pools, "drain", 'pools drain treadle/tiny --reason "moves on Friday"')
    def drain(pool: PoolArgument, reason: ReasonOption = None) -> None:
        """Take no new runs and sampling sessions; what there is goes on."""
        _decide("drain", pool, reason, "draining")

    @command(pools, "scale", "pools scale treadle/tiny --workers 4 --samplers 1", "pools scale treadle/tiny")
    def scale(
        pool: PoolArgument,
        workers: Annotated[int | None, typer.Option(help="Workers that train.")] = None,
        samplers: Annotated[int | None, typer.Option(help="Workers that only sample.")] = None,
    ) -> None:
        """Have so many workers from now on; what is left out is as the servers' settings say."""
        answer = server().send("POST", "pools", "scale", body={"pool": pool, "workers": workers, "samplers": samplers})
        done(answer, f"pool {pool} is being scaled; `treadle admin slots --pool {pool}` shows its workers")

    @command(pools, "remove", "pools remove mine")
    def remove(pool: PoolArgument, reason: ReasonOption = None) -> None:
        """Persist its runs and stop its worker; its runs stay stored."""
        _decide("remove", pool, reason, "removed")


def _decide(action: str, pool: str, reason: str | None, state: str) -> None:
    body = {"pool": pool} | ({} if reason is None else {"reason": reason})
    done(server().send("POST", "pools", action, body=body), f"pool {pool} is {state}")


def _add_runs(runs: typer.Typer) -> None:
    @command(runs, "list", "runs list --tenant alice --state ready")
    def list_runs(
        tenant: TenantOption = None,
        pool: PoolOption = None,
        state: Annotated[str | None, typer.Option(help="creating, ready, failed, lost or unloaded.")] = None,
        limit: LimitOption = 100,
    ) -> None:
        """List runs."""
        owner = tenant_or_none(tenant)
        answer = server().pages("runs", rows="runs", limit=limit, tenant=owner, pool=pool, state=state)
        columns = ("run=training_run_id", "tenant=tenant_id", "pool", "rank=lora_rank", "state", "ops=next_seq_id")
        show(answer, "runs", *columns, "created=created_at", "last=last_request_at", empty="no runs")

    @command(runs, "show", "runs show 4f3c...:train:0")
    def show_run(run_id: RunArgument) -> None:
        """Show one run: its state, snapshots, queue, last requests."""
        show_one(server().get("runs", run_id))

    @command(runs, "snapshot", "runs snapshot 4f3c...:train:0")
    def snapshot(run_id: RunArgument, wait: WaitOption = True) -> None:
        """Have its state written now."""
        _order(run_id, "snapshot", wait=wait)

    @command(runs, "evict", "runs evict 4f3c...:train:0")
    def evict(run_id: RunArgument, wait: WaitOption = True) -> None:
        """Have its state written and the worker forget it, until its next request."""
        _order(run_id, "evict", wait=wait)

    @command(runs, "command", "runs command 12")
    def show_command(command_id: Annotated[int, typer.Argument(metavar="COMMAND_ID")]) -> None:
        """Show how a snapshot or an eviction went."""
        show_one(server().get("commands", str(command_id)))


def _order(run_id: str, action: str, *, wait: bool) -> None:
    at = server()
    answer = at.send("POST", "runs", run_id, action, body={})
    if not wait:
        done(answer, f"command {answer['command_id']} is given")
        return
    ended = _ended(at, str(answer["command_id"]))
    done(ended, f"command {answer['command_id']} is {ended['state']}: {ended['message']}")
    if ended["state"] == "failed":
        raise ServerError(f"command {answer['command_id']} failed")


def _ended(at: AdminServer, command_id: str) -> dict[str, Any]:
    """A command once it is done. Raises ServerError when that takes too long."""
    until = time.monotonic() + WAIT_S
    while True:
        answer = at.get("commands", command_id)
        if answer.get("done_at") is not None:
            return answer
        if time.monotonic() > until:
            raise ServerError(f"command {command_id} waits still; see `treadle admin runs command {command_id}`")
        time.sleep(LOOK_EVERY_S)


def _add_views(app: typer.Typer) -> None:
    @command(app, "queue", "queue", "queue --pool treadle/tiny --limit 10")
    def queue(pool: PoolOption = None, limit: LimitOption = 20) -> None:
        """Show what waits or runs in every pool, by tenant."""
        answer = server().get("queue", pool=pool, limit=limit)
        if print_json(answer):
            return
        for one in answer["pools"]:
            _print_queue(one)
        if not answer["pools"]:
            stderr().print("no pools")

    @command(app, "slots", "slots", "slots --pool treadle/tiny")
    def slots(pool: PoolOption = None, limit: LimitOption = 100) -> None:
        """Show what every pool's workers are and hold."""
        answer = server().get("slots", pool=pool, limit=limit)
        if print_json(answer):
            return
        for one in answer["pools"]:
            _print_slots(one)
        if not answer["pools"]:
            stderr().print("no pools")


def _print_queue(pool: dict[str, Any]) -> None:
    how = "ready" if pool["is_ready"] else f"not ready: {pool['reason']}"
    line = f"{pool['pool']}: {how}; leader {pool['leader'] or 'none'}, cycle {pool['cycle'] or 0}, "
    line += f"{pool['num_in_flight']} in flight, {pool['num_tenants']} tenants wait"
    stdout().print(line, highlight=False, markup=False, soft_wrap=True)
    if pool["tenants"]:
        columns = ["tenant=tenant_id", "class=weight_class", "ops=training.num_ops", "tokens=training.num_tokens"]
        columns += ["bytes=training.num_bytes", "oldest s=training.oldest_s", "samples=sampling.num_ops"]
        columns += ["tokens=sampling.num_tokens", "bytes=sampling.num_bytes", "oldest s=sampling.oldest_s"]
        print_table(pool["tenants"], *columns)


def _print_slots(pool: dict[str, Any]) -> None:
    if pool["num_runs"] is None:
        line = f"{pool['pool']}: nobody has reported what its workers hold"
    else:
        line = f"{pool['pool']}: leader {pool['leader']}, cycle {pool['cycle']}, "
        line += f"{pool['num_runs']} runs, {pool['num_samples']} samples"
    stdout().print(line, highlight=False, markup=False, soft_wrap=True)
    if pool["workers"]:
        of_worker = ("worker=name", "role", "state", "tenants=num_tenants", "runs=num_runs", "samples=num_samples")
        print_table(pool["workers"], *of_worker, "deaths=num_deaths", "why not up=reason")
    if pool["runs"]:
        columns = ("run=model_id", "tenant=tenant_id", "rank=lora_rank", "state", "ops=next_seq_id")
        print_table(pool["runs"], *columns, "last=last_request_at")
    if pool["samples"]:
        print_table(pool["samples"], "tenant=tenant_id", "samples=num_samples")
