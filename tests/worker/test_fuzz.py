"""Random days of a worker: whatever happens in them, each run ends with the numbers it would have alone.

One worker gets random cycles of up to five runs while memory runs out, disks fill up, kernels break, runs are parked,
evicted and restored, and leaders change. A second, undisturbed worker gets the ops that took effect, one per cycle.
Results, counts of skipped passes, and whole states (weights, moments, open gradient, as files) are compared with
tolerance 0, and so is the memory that runs hold.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worker_support
from worker_support import Driver, MemoryBlobs, create, datums, item, metrics_of, model_id, passed, publish, save, step

from treadle.config import bundled_model_dir
from treadle.domain.ids import BlobKey, ModelId
from treadle.domain.ops import Datum, LoadWeightsOp, LoraSpec, OptimStepOp, PassOp, TrainingOp, UnloadModelOp
from treadle.domain.outcome import Failure, OpOutcome, PassResult
from treadle.domain.plan import RestoreItem, StateTag
from treadle.domain.quanta import cut_quanta
from treadle.domain.states import Category
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.memory import PassLimits
from treadle.testing.clock import ManualClock
from treadle.worker import cycle as cycle_module
from treadle.worker import open_pass, parking
from treadle.worker.parking import FileShelf
from treadle.worker.slots import ParkingRules
from treadle.worker.work import DecodedItem
from treadle.worker.worker import Worker

NUM_RUNS = 5
QUANTUM = 12
LIMITS = PassLimits(packed=48, none=100, selective=200, full=400)
# Other seeds and longer days are for whoever changes the worker; this is what a test run can afford.
NUM_CYCLES = 30
SEEDS = (1, 2)


@pytest.fixture(autouse=True)
def _small_quanta(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(datum_tokens: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return cut_quanta(datum_tokens, limit=QUANTUM)

    monkeypatch.setattr(open_pass, "cut_quanta", cut)
    monkeypatch.setattr(worker_support, "cut_quanta", cut)


class FlakyBlobs(MemoryBlobs):
    """A store that sometimes does not take a blob."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full: Callable[[], bool] = lambda: False

    def write(self, key: str, data: bytes) -> int:
        if self.is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(key, data)


class NoSampler:
    has_work = False


@dataclass
class Faults:
    """What goes wrong in the cycle at hand. Counters run down; at 0 the fault strikes."""

    oom_at: int = 0
    bug_at: int = 0
    oom_from: int = 0
    guilty: ModelId | None = None
    unpark_at: int = 0
    step_oom: bool = False
    num_strikes: int = 0

    def strike(self, error: Exception) -> None:
        self.num_strikes += 1
        raise error

    def calls(self) -> None:
        self.oom_at, was_oom = self.oom_at - 1, self.oom_at
        self.bug_at, was_bug = self.bug_at - 1, self.bug_at
        if self.oom_from > 0:
            self.oom_from -= 1
            if self.oom_from == 0:
                self.oom_from = -1
        if self.oom_from < 0 or was_oom == 1:
            self.strike(torch.OutOfMemoryError("CUDA out of memory"))
        if was_bug == 1:
            self.strike(RuntimeError("shapes cannot be multiplied"))


@dataclass
class FaultyKernel:
    """The real kernel, and the faults of the cycle."""

    inner: Any
    faults: Faults
    is_guilty: Callable[[Any], bool]

    @property
    def name(self) -> str:
        return str(self.inner.name)

    def add(self, x: Any, y: Any, segments: Any, group: Any) -> object:
        self.faults.calls()
        return self.inner.add(x, y, segments, group)

    def add_grads(self, dy: Any, x: Any, kept: Any, dx: Any, segments: Any, group: Any) -> None:
        self.inner.add_grads(dy, x, kept, dx, segments, group)
        self.faults.calls()
        if self.is_guilty(segments):
            self.faults.strike(RuntimeError("this one breaks"))


@dataclass
class Run:
    """What is known of one run: the state the disturbed worker must hold, and what a repair could start from."""

    run: ModelId
    spec: LoraSpec
    seq: int = 0
    incarnation: int = 1
    is_held: bool = False
    num_skipped: int = 0
    # A pass of which earlier cycles did so many quanta.
    part: tuple[PassOp, int] | None = None
    # Restorable: (seq, blob key or None for the fresh run).
    snapshots: list[tuple[int, str | None]] = field(default_factory=list)
    saves: list[str] = field(default_factory=list)
    ref_incarnation: int = 1

    @property
    def tag(self) -> StateTag:
        return StateTag(self.run, self.incarnation, self.seq)


class Day:
    """One random sequence of cycles."""

    def __init__(self, seed: int, base: BaseModel, calm_base: BaseModel, directory: Path) -> None:
        self.rng = np.random.default_rng(seed)
        self.clock = ManualClock()
        self.base = base
        self.blobs = FlakyBlobs()
        self.shelf = FileShelf(directory)
        rules = ParkingRules(shelves=(self.shelf,), after_s=60.0, max_resident_bytes=0)
        self.worker = Worker(
            base=base,
            sampler=NoSampler(),  # type: ignore[arg-type]
            blobs=self.blobs,
            limits=LIMITS,
            parking=rules,
            clock=self.clock.monotonic,
        )
        self.driver = Driver(self.worker)
        self.calm_blobs = FlakyBlobs()
        self.calm = Driver(
            Worker(base=calm_base, sampler=NoSampler(), blobs=self.calm_blobs, limits=LIMITS)  # type: ignore[arg-type]
        )
        self.faults = Faults()
        self.runs = [Run(model_id(i), LoraSpec(rank=int(r), seed=i)) for i, r in enumerate((4, 4, 8, 3, 4))]
        self.num_keys = 0
        self.num_calm = 0
        self.is_disk_full = False
        self.seen: dict[str, int] = {}

    # -- drawing

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    def key(self, what: str) -> str:
        self.num_keys += 1
        return f"{what}/{self.num_keys}"

    def a_pass(self, run: Run, seq: int) -> PassOp:
        data: tuple[Datum, ...] = datums(
            int(self.rng.integers(1, 6)), int(self.rng.integers(1, 11)), seed=int(self.rng.integers(2**31))
        )
        loss = "cross_entropy"
        if self.chance(0.3):
            loss = str(self.rng.choice(["importance_sampling", "ppo", "gspo"]))
            poisoned = self.chance(0.4)
            bad = int(self.rng.integers(len(data)))
            data = tuple(
                Datum(
                    one.tokens,
                    {
                        **one.inputs,
                        "logprobs": np.full(one.num_tokens, -1e30 if poisoned and i == bad else -6.5, np.float32),
                        "advantages": self.rng.normal(size=one.num_tokens).astype(np.float32),
                    },
                )
                for i, one in enumerate(data)
            )
            if poisoned:
                self.note("poisoned")
        return passed(run.run, seq, data, loss=loss, forward_only=self.chance(0.2))

    def ops_of(self, run: Run) -> list[DecodedItem]:
        """What one run asks for in this cycle, in order of phases."""
        items: list[DecodedItem] = []
        seq = run.seq
        if not run.is_held:
            if run.snapshots:
                return []
            op = create(run.run, rank=run.spec.rank, seed=run.spec.seed)
            items.append(item(op, starts_from=None, blob_key=self.key("create")))
        if run.part is not None:
            op_, done = run.part
            return [self.part_of(run, op_, done)]
        if run.saves and self.chance(0.1):
            seq += 1
            key = "missing" if self.chance(0.3) else str(self.rng.choice(run.saves))
            load = LoadWeightsOp(run.run, seq, "tinker://x", BlobKey(key), run.spec, self.chance(0.6), False)
            items.append(self.planned(run, load))
        for _ in range(int(self.rng.integers(0, 4))):
            seq += int(self.rng.integers(1, 3))
            op_ = self.a_pass(run, seq)
            num_quanta = len(open_pass.cut_quanta([one.num_tokens for one in op_.datums]))
            if num_quanta > 1 and self.chance(0.3):
                items.append(self.part_of(run, op_, 0))
                if items[-1].item.planned.quantum_stop < num_quanta:
                    self.note("split")
                    return items
                continue
            items.append(self.planned(run, op_))
        for _ in range(int(self.rng.integers(0, 2)) + self.chance(0.1)):
            seq += 1
            items.append(self.planned(run, step(run.run, seq, learning_rate=float(self.rng.choice([1e-2, 1e-3])))))
        if self.chance(0.2):
            seq += 1
            op = save(run.run, seq) if self.chance(0.5) else publish(run.run, seq)
            items.append(self.planned(run, op))
        if self.chance(0.03):
            items.append(self.planned(run, UnloadModelOp(run.run, seq + 1)))
        return items

    def planned(self, run: Run, op: Any, quanta: tuple[int, int] | None = None) -> DecodedItem:
        return item(
            op,
            starts_from=StateTag(run.run, run.incarnation, op.seq_id - 1),
            quanta=quanta,
            blob_key=self.key("blob"),
        )

    def part_of(self, run: Run, op: PassOp, done: int) -> DecodedItem:
        num_quanta = len(open_pass.cut_quanta([one.num_tokens for one in op.datums]))
        return self.planned(run, op, (done, int(self.rng.integers(done + 1, num_quanta + 1))))

    # -- one cycle

    def cycle(self) -> None:
        self.between()
        restores = [self.restore_of(run) for run in self.runs if not run.is_held and run.snapshots]
        items = [one for run in self.rng.permutation(len(self.runs)) for one in self.ops_of(self.runs[run])]
        self.arm()
        unfailing = self.faults.oom_from == 0 and self.faults.guilty is None
        outcomes = self.driver.run(items, restores=restores).outcomes
        guilty, self.faults.guilty = self.faults.guilty, None
        self.disarm()
        assert [one.request_id for one in outcomes] == [one.item.planned.request_id for one in items]
        for one, outcome in zip(items, outcomes, strict=True):
            may_fail = not unfailing if guilty is None else one.item.planned.model_id == guilty
            self.check(one, outcome, may_fail=may_fail)
        self.check_memory()
        if self.chance(0.3):
            self.compare_states()

    def arm(self) -> None:
        """Draw the cycle's faults. One strike must cost nobody anything; lasting ones only what they meet."""
        faults = self.faults
        match int(self.rng.integers(9)):
            case 0 | 1:
                faults.oom_at = int(self.rng.integers(1, 150))
            case 2:
                faults.bug_at = int(self.rng.integers(1, 150))
            case 3:
                faults.oom_from = int(self.rng.integers(1, 200))
            case 4:
                faults.guilty = self.runs[int(self.rng.integers(NUM_RUNS))].run
            case 5:
                faults.unpark_at = int(self.rng.integers(1, 5))
            case 6:
                faults.step_oom = True
            case 7:
                self.blobs.is_full = lambda: self.chance(0.5)
            case _:
                pass

    def disarm(self) -> None:
        if self.faults.num_strikes:
            self.note("strikes")
        self.faults.__dict__.update(Faults().__dict__)
        self.blobs.is_full = lambda: False

    def between(self) -> None:
        """What happens to a worker between two cycles."""
        if self.chance(0.15):
            self.driver.token += 1
            for run in self.runs:
                if run.part is not None:
                    self.note("fenced part")
                    run.part = (run.part[0], 0)
        self.clock.advance(float(self.rng.choice([0, 20, 61])))
        self.is_disk_full = self.chance(0.2)
        for _ in range(int(self.rng.integers(0, 6))):
            self.worker.park_idle()
        if self.worker._slots._parked:
            self.note("parked")
        self.is_disk_full = False
        for run in self.runs:
            if run.is_held and self.chance(0.1):
                self.snapshot(run)
            if run.is_held and run.snapshots and self.chance(0.05):
                self.note("evicted")
                self.worker.evict([run.run])
                run.is_held = False
                run.part = None
        if self.chance(0.05):
            # As a worker does that dies: all runs go, also those that cannot be restored.
            self.worker.evict([run.run for run in self.runs])
            self.note("died")
            for run in self.runs:
                run.is_held, run.part = False, None
                if not run.snapshots:
                    self.start_afresh(run)

    def start_afresh(self, run: Run) -> None:
        """The run is gone for good; another takes its place."""
        self.num_keys += 1
        self.calm.worker.evict([run.run])
        run.__dict__.update(Run(model_id(100 + self.num_keys), run.spec).__dict__)

    def snapshot(self, run: Run) -> None:
        key = self.key("snapshot")
        assert self.driver.snapshot(run.tag, key) == self.calm_state(run), f"{run.run} differs at {run.seq}"
        run.snapshots.append((run.seq, key))

    def restore_of(self, run: Run) -> RestoreItem:
        self.note("restored")
        seq, key = run.snapshots[-1]
        run.seq, run.incarnation = seq, run.incarnation + 1
        run.is_held, run.num_skipped, run.part = True, 0, None
        restore = RestoreItem(run.run, run.spec, None if key is None else BlobKey(key), run.tag)
        self.calm.worker.evict([run.run])
        if key is not None:
            calm_key = self.key("calm-restore")
            self.calm_blobs.blobs[calm_key] = self.blobs.blobs[key]
            key = calm_key
        run.ref_incarnation = run.incarnation
        self.calm.run([], restores=[RestoreItem(run.run, run.spec, None if key is None else BlobKey(key), run.tag)])
        return restore

    # -- what must be

    def check(self, one: DecodedItem, outcome: OpOutcome, *, may_fail: bool) -> None:
        run = next(run for run in self.runs if run.run == one.item.planned.model_id)
        op = one.op
        assert not isinstance(op, Failure)
        seq = one.item.planned.seq_id
        if outcome.is_partial:
            assert isinstance(op, PassOp)
            assert outcome.tag_after == run.tag
            run.part = (op, one.item.planned.quantum_stop)
            return
        run.part = None
        if outcome.failure is not None and outcome.failure.category is Category.SERVER:
            is_full = "internal error" in outcome.failure.message and op.__class__.__name__.startswith("Save")
            assert may_fail or is_full, f"{op.__class__.__name__} at {seq} of {run.run}: {outcome.failure.message}"
            self.note("failed")
            run.num_skipped += isinstance(op, PassOp) and not op.forward_only
            run.seq = seq
            assert outcome.tag_after == run.tag
            return
        alone = self.alone(run, one, op)
        assert outcome.failure == alone.failure
        run.seq = seq
        if isinstance(op, UnloadModelOp):
            assert outcome.tag_after is None
            self.start_afresh(run)
            return
        run.is_held = True
        assert outcome.tag_after == run.tag
        self.compare_results(run, op, outcome, alone)

    def alone(self, run: Run, one: DecodedItem, op: TrainingOp) -> OpOutcome:
        """The op on the undisturbed worker."""
        starts = one.item.starts_from
        if starts is not None:
            starts = StateTag(run.run, run.ref_incarnation, starts.applied_seq)
        key = one.item.blob_key
        if isinstance(op, LoadWeightsOp) and op.blob_key in self.blobs.blobs:
            self.calm_blobs.blobs[op.blob_key] = self.blobs.blobs[op.blob_key]
        (outcome,) = self.calm.run([item(op, starts_from=starts, blob_key=key)]).outcomes
        if key in self.calm_blobs.blobs:
            assert self.calm_blobs.blobs[str(key)] == self.blobs.blobs[str(key)], "saved files differ"
        return outcome

    def compare_results(self, run: Run, op: TrainingOp, outcome: OpOutcome, alone: OpOutcome) -> None:
        if isinstance(op, PassOp):
            run.num_skipped += outcome.failure is not None and not op.forward_only
        if isinstance(op, LoadWeightsOp) and outcome.failure is None:
            run.num_skipped = 0
        if outcome.failure is not None:
            return
        if isinstance(op, PassOp):
            assert isinstance(outcome.result, PassResult)
            assert isinstance(alone.result, PassResult)
            ours, theirs = outcome.result.logprobs, alone.result.logprobs
            assert [array.tobytes() for array in ours] == [array.tobytes() for array in theirs]
            assert outcome.result.metrics == alone.result.metrics
        elif isinstance(op, OptimStepOp):
            self.note("stepped")
            assert metrics_of(outcome) == {**metrics_of(alone), "skipped_passes": run.num_skipped}
            run.num_skipped = 0
        elif not isinstance(op, LoadWeightsOp) and op.__class__.__name__ == "SaveWeightsOp":
            key = str(outcome.result.blob_key)  # type: ignore[union-attr]
            run.saves.append(key)
            run.snapshots.append((run.seq, key))
        elif op.__class__.__name__ == "CreateModelOp":
            run.snapshots = []

    def calm_state(self, run: Run) -> bytes:
        held = self.calm.worker._slots.tag(run.run)
        assert held is not None
        state = self.calm.worker._slots.state(run.run)
        return cycle_module.encode_state(state, self.calm.worker._base, with_optimizer=True, applied_seq=run.seq)

    def compare_states(self) -> None:
        for run in self.runs:
            if run.is_held:
                self.snapshot(run)
                run.snapshots.pop()

    def check_memory(self) -> None:
        """The pool's taken blocks are those of the runs in memory and of passes on their way, and no other."""
        slots, passes = self.worker._slots, self.worker._runner._open_passes.values()
        expected = sum((3 if one.grads is None else 4) * one.weights.flat.nbytes for one in slots._states.values())
        expected += sum(part.state.weights.flat.nbytes for part in passes if part._scratch is not None)
        assert self.base.arenas.num_taken_bytes == expected
        assert self.shelf._num_taken == len(slots._parked)
        assert {part.op.model_id for part in passes} <= {run.run for run in self.runs if run.part is not None}


@pytest.fixture(scope="module")
def bases() -> tuple[BaseModel, BaseModel]:
    def load() -> BaseModel:
        return load_base_model(
            str(bundled_model_dir()), name="treadle/tiny", device="cpu", dtype="float32", num_threads=1
        )

    return load(), load()


def live_through(
    seed: int, num_cycles: int, bases: tuple[BaseModel, BaseModel], directory: Path, patch: pytest.MonkeyPatch
) -> Day:
    base, calm_base = bases
    real_kernel = base.kernel
    day = Day(seed, base, calm_base, directory)

    def is_guilty(segments: Any) -> bool:
        if day.faults.guilty is None or day.faults.guilty not in day.worker._slots._states:
            return False
        weights = day.worker._slots._states[day.faults.guilty].weights
        return any(segment.adapter is weights for segment in segments)

    real_pwrite, real_placed, real_steps = os.pwrite, parking.placed_state, cycle_module.adamw_steps

    def pwrite(*args: Any) -> int:
        if day.is_disk_full and day.chance(0.5):
            day.note("disk full")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_pwrite(*args)

    def placed(base_: Any, *args: Any, **kwargs: Any) -> Any:
        if base_ is base:
            day.faults.unpark_at -= 1
            if day.faults.unpark_at == 0:
                day.note("unpark out of memory")
                day.faults.strike(torch.OutOfMemoryError("CUDA out of memory"))
        return real_placed(base_, *args, **kwargs)

    def steps(due: Sequence[Any]) -> Any:
        if day.faults.step_oom and due:
            day.faults.step_oom = False
            day.note("step out of memory")
            day.faults.strike(torch.OutOfMemoryError("CUDA out of memory"))
        return real_steps(due)

    patch.setattr(os, "pwrite", pwrite)
    patch.setattr(parking, "placed_state", placed)
    patch.setattr(cycle_module, "adamw_steps", steps)
    base.kernel = FaultyKernel(real_kernel, day.faults, is_guilty)  # type: ignore[assignment]
    try:
        for _ in range(num_cycles):
            day.cycle()
        day.compare_states()
        day.worker.evict([run.run for run in day.runs])
        day.check_memory()
        assert day.shelf.num_bytes == 0
    finally:
        base.kernel = real_kernel
    return day


@pytest.mark.parametrize("seed", SEEDS)
def test_random_days_leave_every_run_as_it_would_be_alone(
    seed: int, bases: tuple[BaseModel, BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = live_through(seed, NUM_CYCLES, bases, tmp_path, monkeypatch)
    assert {"stepped", "strikes", "parked", "restored", "split", "poisoned", "step out of memory"} <= day.seen.keys()
