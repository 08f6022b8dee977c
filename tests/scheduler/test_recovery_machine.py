"""Random lives of a pool: clients submit, retry and reorder; workers and leaders die at any point; nothing is lost.

The oracle is a worker to which nothing happens and which gets the same ops one by one. Every result must be the
oracle's, byte for byte, must never change once it was seen, and the weights at the end must be equal to the last bit.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_support import SETTINGS, Cluster

from treadle.blobs import open_blobs
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, TinkerPath, op_request_id
from treadle.domain.ops import LoadWeightsOp, LoraSpec, PassOp, SaveWeightsOp, TrainingOp
from treadle.domain.outcome import BlobResult, OpOutcome
from treadle.domain.records import FutureRecord
from treadle.domain.states import ModelState, RequestState
from treadle.executor import fake_model
from treadle.executor.fake import DEFAULT_FACTS, FakeExecutor
from treadle.executor.faults import Fault, Moment, PlannedFault
from treadle.scheduler import quarantine, replay, slot, snapshots
from treadle.testing.builders import create_op, datum, pass_op, step_op
from treadle.testing.driver import Driver

RUNS = (ModelId("session:train:0"), ModelId("session:train:1"))
SPEC = LoraSpec(rank=8, seed=7)
Value = TypeVar("Value")


@dataclass
class Client:
    """One client's run: what it sent, in order, and what it holds back."""

    model_id: ModelId
    ops: list[TrainingOp] = field(default_factory=list)
    held_back: list[TrainingOp] = field(default_factory=list)
    saves: list[SaveWeightsOp] = field(default_factory=list)

    @property
    def can_load(self) -> bool:
        """Nothing is missing in front of its saves."""
        return bool(self.saves) and not self.held_back

    @property
    def next_seq_id(self) -> int:
        return len(self.ops) + 1


class PoolMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        for module, name, value in (
            (slot, "RESTART_PAUSES_S", (0.0,)),
            # So many deaths as there are here would make poison of anything.
            (quarantine, "MAX_DEATHS", 1_000),
            (replay, "FIRST_PAUSE_S", 0.001),
            (snapshots, "FIXED_COST_S", 0.0),
            (snapshots, "PAUSE_S", 0.0),
        ):
            self.stack.enter_context(mock.patch.object(module, name, value))
        self.loop = self.stack.enter_context(asyncio.Runner())
        self.clients = {run: Client(run) for run in RUNS}
        self.seen: dict[RequestId, FutureRecord] = {}

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.loop.run(work)

    @initialize(share=st.sampled_from([0.0, 1e9]), is_split=st.booleans())
    def open(self, share: float, is_split: bool) -> None:
        """share: of the time for snapshots, nothing or as much as they want. is_split: long passes take many cycles."""
        self.stack.enter_context(mock.patch.object(snapshots, "BUDGET_SHARE", share))
        self.cluster = self.run(Cluster.open(self.folder))
        if is_split:
            self.cluster.settings = replace(SETTINGS, budget_tokens=2048)
        self.oracle = self.run(started_oracle(self.folder))

        async def begin() -> None:
            self.cluster.start()
            for run in RUNS:
                await self.cluster.create(run)

        self.run(begin())

    # Clients.

    @rule(run=st.sampled_from(RUNS), op=st.sampled_from(["pass", "long", "forward", "step", "save"]))
    def submit(self, run: ModelId, op: str) -> None:
        self._send(self.clients[run], self._new_op(self.clients[run], op))

    @rule(run=st.sampled_from(RUNS), op=st.sampled_from(["pass", "step"]))
    def hold_back(self, run: ModelId, op: str) -> None:
        """Numbered now and sent later: others overtake it."""
        client = self.clients[run]
        made = self._new_op(client, op)
        client.ops.append(made)
        client.held_back.append(made)

    @precondition(lambda self: any(client.held_back for client in self.clients.values()))
    @rule(data=st.data())
    def send_late(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from([one for one in self.clients.values() if one.held_back]))
        op = client.held_back.pop(data.draw(st.integers(0, len(client.held_back) - 1)))
        self.run(self.cluster.submit(op))

    @precondition(lambda self: any(client.can_load for client in self.clients.values()))
    @rule(data=st.data(), with_optimizer=st.booleans())
    def load(self, data: st.DataObject, with_optimizer: bool) -> None:
        """Of a checkpoint that is there; so its client has waited for it."""
        client = data.draw(st.sampled_from([one for one in self.clients.values() if one.can_load]))
        save = data.draw(st.sampled_from(client.saves))
        self.run(self.cluster.result(id_of(save)))
        path = str(TinkerPath(client.model_id, CheckpointKind.TRAINING, save.name))
        found = self.run(self.cluster.store.checkpoints.find(path))
        assert found is not None
        seq_id = client.next_seq_id
        self._send(client, LoadWeightsOp(client.model_id, seq_id, path, found.blob_key, SPEC, with_optimizer, False))

    @precondition(lambda self: any(client.ops for client in self.clients.values()))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """The same request again, as after an answer that got lost: never a second op."""
        client = data.draw(st.sampled_from([one for one in self.clients.values() if one.ops]))
        op = data.draw(st.sampled_from(client.ops))
        if op not in client.held_back:
            self.run(self.cluster.submit(op))

    @rule(turns=st.integers(1, 60))
    def let_time_pass(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0.0005)

        self.run(turn())

    @rule()
    def wait_for_everything(self) -> None:
        """All that was sent without a hole in front of it ends."""

        async def wait() -> None:
            for client in self.clients.values():
                for op in client.ops:
                    if op in client.held_back:
                        break
                    await self.cluster.future(id_of(op))

        self.run(wait())

    # Faults.

    @rule(
        moment=st.sampled_from(list(Moment)),
        run=st.sampled_from([*RUNS, None]),
        skip=st.integers(0, 3),
    )
    def plan_a_death(self, moment: Moment, run: ModelId | None, skip: int) -> None:
        if self.cluster.faults.num_left < 2:  # or nothing would ever end
            self.cluster.faults.plan(PlannedFault(moment, Fault.DEATH, run, skip=skip))

    @rule(moment=st.sampled_from([Moment.RESTORE_TAKEN, Moment.SNAPSHOT_TAKEN]), times=st.integers(1, 3))
    def plan_a_failure(self, moment: Moment, times: int) -> None:
        if self.cluster.faults.num_left < 2:
            self.cluster.faults.plan(PlannedFault(moment, Fault.FAILED, times=times))

    @rule()
    def kill_the_worker(self) -> None:
        async def kill() -> None:
            if self.cluster.executors:
                self.cluster.worker.die("killed")

        self.run(kill())

    @rule()
    def kill_the_leader(self) -> None:
        self.run(self.cluster.restart())

    @rule()
    def drain_and_start(self) -> None:
        async def drain() -> None:
            try:
                await self.cluster.drain()
            except Exception:  # a worker that dies while it persists: the log has everything
                await self.cluster.crash()
            self.cluster.start()

        self.run(drain())

    @rule(run=st.sampled_from(RUNS))
    def put_away(self, run: ModelId) -> None:
        async def put_away() -> None:
            for cycles in self.cluster.loops():
                cycles.park_cold([run])

        self.run(put_away())

    # What must hold.

    @invariant()
    def results_never_change(self) -> None:
        if not hasattr(self, "oracle"):
            return

        async def check() -> None:
            for client in self.clients.values():
                for op in client.ops:
                    record = await self.cluster.store.requests.future(id_of(op))
                    if record is not None and record.state is not RequestState.QUEUED:
                        assert self.seen.setdefault(id_of(op), record) == record
                assert (await self.cluster.model(client.model_id)).state in (ModelState.CREATING, ModelState.READY)

        self.run(check())

    def teardown(self) -> None:
        try:
            if hasattr(self, "oracle"):
                self.run(self._compare())
                self.run(self.cluster.close())
                self.run(self.oracle.executor.stop())
        finally:
            self.stack.close()

    async def _compare(self) -> None:
        for client in self.clients.values():
            for op in client.held_back:
                await self.cluster.submit(op)
            client.held_back.clear()
            last = SaveWeightsOp(client.model_id, client.next_seq_id, name="last")
            client.ops.append(last)
            await self.cluster.submit(last)
        for client in self.clients.values():
            saved: dict[str, BlobKey] = {}
            for op in client.ops:
                outcome = await self._undisturbed(op, saved)
                record = await self.cluster.future(id_of(op))
                assert record.failure == outcome.failure, id_of(op)
                assert self.seen.get(id_of(op), record) == record
                if outcome.encoded is not None:
                    assert record.result == outcome.encoded, id_of(op)
            path = str(TinkerPath(client.model_id, CheckpointKind.TRAINING, "last"))
            found = await self.cluster.store.checkpoints.find(path)
            assert found is not None
            assert_same_state(self.cluster.blobs.read(found.blob_key), self.oracle_blobs.read(saved["last"]))
            log = await self.cluster.store.run_log.read(client.model_id, 1_000)
            assert len({entry.seq_id for entry in log}) == len(log), "an op is logged once"

    async def _undisturbed(self, op: TrainingOp, saved: dict[str, BlobKey]) -> OpOutcome:
        """The oracle's outcome; it saves under keys of its own."""
        if isinstance(op, LoadWeightsOp):
            name = op.path.rsplit("/", 1)[-1]
            op = LoadWeightsOp(op.model_id, op.seq_id, op.path, saved[name], SPEC, op.with_optimizer, False)
        (outcome,) = await self.oracle.run(op)
        if isinstance(op, SaveWeightsOp):
            assert isinstance(outcome.result, BlobResult)
            saved[op.name] = outcome.result.blob_key
        return outcome

    @property
    def oracle_blobs(self) -> Any:
        return open_blobs(str(self.folder / "oracle"))

    def _new_op(self, client: Client, kind: str) -> TrainingOp:
        run, seq_id = client.model_id, client.next_seq_id
        match kind:
            case "pass":
                return pass_op(seq_id, model_id=run)
            case "long":
                return pass_op(seq_id, model_id=run, datums=[datum(2048, seed=seq_id + part) for part in range(3)])
            case "forward":
                return pass_op(seq_id, model_id=run, forward_only=True)
            case "step":
                return step_op(seq_id, model_id=run)
            case _:
                client.saves.append(SaveWeightsOp(run, seq_id, name=f"s{seq_id}"))
                return client.saves[-1]

    def _send(self, client: Client, op: TrainingOp) -> None:
        client.ops.append(op)
        self.run(self.cluster.submit(op))


async def started_oracle(folder: Path) -> Driver:
    """A worker with both runs, to which nothing happens."""
    oracle = Driver(FakeExecutor(open_blobs(str(folder / "oracle"))))
    await oracle.executor.start(on_samples=oracle.take_samples, on_death=oracle.deaths.append)
    for run in RUNS:
        await oracle.run(create_op(run, rank=SPEC.rank, seed=SPEC.seed))
    return oracle


def id_of(op: TrainingOp) -> RequestId:
    assert not isinstance(op, PassOp) or op.seq_id > 0
    return op_request_id(op.model_id, getattr(op, "seq_id", 0))


def assert_same_state(one: bytes, other: bytes) -> None:
    """Equal to the last bit, open gradient and all."""
    first, second = (fake_model.decode_state(data, DEFAULT_FACTS.vocab_size) for data in (one, other))
    np.testing.assert_array_equal(first.weights, second.weights)
    np.testing.assert_array_equal(first.grad, second.grad)
    assert (first.num_steps, first.num_open_passes) == (second.num_steps, second.num_open_passes)


PoolMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase
