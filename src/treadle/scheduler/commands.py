"""What operators ask of a pool's leader: which open command can be answered from the book, and which needs the worker.

The leader reads open commands a few times a second and carries them out between cycles. It refuses to know how a state
is written. Invariant: carrying a command out twice changes nothing, so that a leader may die anywhere in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection

from treadle.domain.commands import CommandKind, CommandOutcome, OperatorCommand
from treadle.domain.ids import PoolName, TenantId
from treadle.domain.limits import COMMAND_PATIENCE_S
from treadle.domain.records import LeaseRecord
from treadle.domain.states import ModelState
from treadle.errors import Fenced, ServerError, StoreUnavailable, WorkerDied
from treadle.executor.base import Executor
from treadle.scheduler.outages import Outages
from treadle.scheduler.runs import Run, RunBook
from treadle.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

LOOK_EVERY_S = 0.5


async def watch_commands(
    store: Store, pool: PoolName, *, outages: Outages, take: Callable[[Collection[OperatorCommand]], None]
) -> None:
    """Hand all open commands of the pool to `take`, again and again, until cancelled."""
    hint = asyncio.Event()
    unsubscribe = store.events.on_pool_changed(lambda changed: hint.set() if changed == pool else None)
    try:
        while True:
            hint.clear()
            try:
                take(await store.commands.open_of(pool))
            except Fenced:
                raise
            except StoreUnavailable as error:
                outages.noticed(error)
            except ServerError as error:
                log.error("commands not read", pool=pool, reason=error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await hint.wait()
    finally:
        unsubscribe()


class CommandDesk:
    """The open commands of one pool's runs. write: register a snapshot of a run's state, if that is possible."""

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        lease: LeaseRecord,
        clock: Callable[[], float],
        write: Callable[[Executor, Run], Awaitable[None]],
        is_ours: Callable[[TenantId], bool] = lambda _: True,
    ) -> None:
        """is_ours: whether commands about this tenant's runs are for the desk of this worker."""
        self._pool = pool
        self._store = store
        self._lease = lease
        self._clock = clock
        self._write = write
        self._is_ours = is_ours
        self._open: dict[int, OperatorCommand] = {}

    def take(self, commands: Collection[OperatorCommand]) -> bool:
        """These are all that are open; whether any of them is new."""
        is_news = any(command.command_id not in self._open for command in commands)
        self._open = {command.command_id: command for command in commands}
        return is_news

    async def obey(self, executor: Executor, book: RunBook) -> None:
        """Carry out what can be now. One that fails holds up nobody. Raises WorkerDied, Fenced, StoreUnavailable."""
        for command in list(self._open.values()):
            run = await book.get(command.model_id)
            if not self._is_ours(run.record.tenant_id):
                book.forget([command.model_id])
                continue
            outcome = _known_outcome(command, run)
            if outcome is None and _must_wait(command, run, self._clock()):
                continue
            if outcome is None:
                outcome = await self._carry_out(command, run, executor, book)
            if run.tag is None:
                # Nobody keeps what the book has of it, so it is read again when it is needed.
                book.forget([command.model_id])
            await self._store.commands.end(self._lease, command.command_id, outcome)
            self._open.pop(command.command_id, None)
            log.info("command ended", pool=self._pool, command_id=command.command_id, is_done=outcome.is_done)

    async def _carry_out(self, command: OperatorCommand, run: Run, executor: Executor, book: RunBook) -> CommandOutcome:
        try:
            if run.part is None:
                await self._write(executor, run)
            outcome = _ended(command, run)
            if outcome.is_done and command.kind is CommandKind.EVICT:
                book.forget([command.model_id])
                await executor.evict([command.model_id])
        except (WorkerDied, Fenced, StoreUnavailable):
            raise
        except Exception as error:  # noqa: BLE001 (cycle loop: the runs must not wait for a command)
            log.error("command failed", pool=self._pool, command_id=command.command_id, exc=error)
            return CommandOutcome(False, "an unexpected error, which is in the server's log")
        return outcome


def _known_outcome(command: OperatorCommand, run: Run) -> CommandOutcome | None:
    """How the command ends without anything of the worker; None when the worker has to write or forget something."""
    state = run.record.state
    if state is not ModelState.READY:
        return CommandOutcome(False, f"the run is {state.value}: it has no state that could be written")
    if run.tag is None and command.kind is CommandKind.EVICT:
        return CommandOutcome(True, f"no worker held it; {_restored_from(run)}")
    if run.is_covered and command.kind is CommandKind.SNAPSHOT:
        return CommandOutcome(True, f"its newest snapshot, of request {run.snapshots[0].seq_id}, holds all of it")
    if run.tag is None:
        return CommandOutcome(
            False,
            f"no worker holds it now, so there is nothing to write before its next request; {_restored_from(run)}",
        )
    return None


def _must_wait(command: OperatorCommand, run: Run, now: float) -> bool:
    """The run is in the middle of a pass that takes several cycles, and may still come to its end in time."""
    return run.part is not None and now - command.created_at < COMMAND_PATIENCE_S


def _ended(command: OperatorCommand, run: Run) -> CommandOutcome:
    """The outcome of a command whose writing was tried just now. The run is as the book has it since."""
    if run.part is not None:
        return CommandOutcome(False, "the run was in the middle of a pass all the time; try again when it is not")
    if not run.is_covered:
        return CommandOutcome(False, "its state could not be written: the server's log says why; it stays as it was")
    what = f"its snapshot of request {run.snapshots[0].seq_id} is registered"
    return CommandOutcome(True, what if command.kind is CommandKind.SNAPSHOT else f"{what}, and the worker forgot it")


def _restored_from(run: Run) -> str:
    if not run.snapshots:
        return "there is no snapshot that it could be restored from"
    num_behind = max(0, run.record.changed_seq - run.snapshots[0].seq_id)
    return f"it comes back from its snapshot of request {run.snapshots[0].seq_id} and {num_behind} requests behind that"
