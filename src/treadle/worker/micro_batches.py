"""Quanta of any number of open passes, packed into as few forwards as memory allows.

What goes wrong costs the guilty op only. When memory runs out, the ops involved start again in smaller packs, a quantum
alone with stronger recompute, at last once more with idle runs parked; when anything else breaks, they start again one
by one. Packing, order of retries and recompute never change an op's bits, so a disturbed op ends as an undisturbed one.
It knows no plans, tags or outcomes. Invariant: quanta of one op run in order, each counted once.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from treadle.domain.outcome import Failure
from treadle.domain.states import Category
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.memory import PassLimits, is_out_of_memory
from treadle.engine.passes import QuantumResult, run_micro_batch
from treadle.errors import InvalidRequest
from treadle.telemetry.logs import get_logger
from treadle.worker.device_loss import reraise_if_device_is_lost
from treadle.worker.failures import internal_failure
from treadle.worker.open_pass import OpenPass

log = get_logger(__name__)

QuantumRef = tuple[OpenPass, int]


def check_fits(open_pass: OpenPass, limits: PassLimits) -> None:
    """Raise InvalidRequest when a quantum is longer than any pass can be, whatever is recomputed.

    A forward_only pass keeps no activations, so it is not bound by what a recorded one would keep.
    """
    if open_pass.op.forward_only:
        return
    held = f"this server's memory holds {limits.full} in one forward_backward"
    for index, (start, stop) in enumerate(open_pass.quanta):
        if (num_tokens := open_pass.num_tokens(index)) <= limits.full:
            continue
        for place in range(start, stop):
            if (length := open_pass.op.datums[place].num_tokens) > limits.full:
                raise InvalidRequest(f"datum {place} has {length} tokens; {held}")
        raise InvalidRequest(
            f"datums {start} to {stop - 1} together have {num_tokens} tokens, and short datums of a request run "
            f"together; {held}: send fewer datums in a request"
        )


class MicroBatches:
    """Runs quanta within limits, which fall, for the rest of the worker's life, whenever memory runs out all the same.

    make_room: frees memory that the quanta at hand do not need; called before a request fails for want of it.
    """

    def __init__(self, base: BaseModel, limits: PassLimits, *, make_room: Callable[[], object]) -> None:
        self._base = base
        self._make_room = make_room
        self.limits = limits
        # Those of the current `run`, which fall faster: what did not fit a moment ago is not tried again in it.
        self._limits_now = limits
        # Ops that break: each runs apart from all others, a quantum at a time, and fails when it breaks again.
        self._suspects: set[OpenPass] = set()
        # Forwards since the owner last set it to 0.
        self.num_forwards = 0

    def run(self, refs: Sequence[QuantumRef]) -> Iterator[None]:
        """Run these quanta; afterwards each op has taken their results or failed. Yields after every forward."""
        queue = deque(refs)
        self._limits_now = self.limits
        self._suspects.clear()
        while batch := self._next_batch(queue):
            queue.extendleft(reversed(self._run_batch(batch)))
            yield

    def _next_batch(self, queue: deque[QuantumRef]) -> list[QuantumRef]:
        """Whole quanta in order, up to the limit together; a larger one alone, and a suspect's alone. Empty: done."""
        batch: list[QuantumRef] = []
        num_tokens = 0
        while queue:
            open_pass, index = queue[0]
            if open_pass.failure is not None:
                queue.popleft()
                continue
            num_tokens += open_pass.num_tokens(index)
            if batch and (num_tokens > self._limits_now.packed or open_pass in self._suspects):
                break
            batch.append(queue.popleft())
            if open_pass in self._suspects:
                break
        return batch

    def _run_batch(self, batch: Sequence[QuantumRef]) -> Sequence[QuantumRef]:
        """One forward and backward; the quanta that must run again, because it broke."""
        num_tokens = sum(open_pass.num_tokens(index) for open_pass, index in batch)
        keeps_activations = any(not open_pass.op.forward_only for open_pass, _ in batch)
        recompute = self._limits_now.mode_of(num_tokens) if keeps_activations else Recompute.FULL
        try:
            results = self._forward_backward(batch, recompute)
        except Exception as error:  # noqa: BLE001 (worker entry: any breakage is retried, then it is one op's)
            reraise_if_device_is_lost(error)
            ran_out = is_out_of_memory(error)
            log.error("micro-batch failed", quanta=len(batch), tokens=num_tokens, recompute=recompute, exc=error)
        else:
            for (open_pass, index), result in zip(batch, results, strict=True):
                open_pass.take(index, result)
            return ()
        # Only here, behind the handler, are the frames gone that held the broken pass's activations.
        if ran_out:
            self._free_caches()
            if len(batch) > 1 or recompute is not Recompute.FULL:
                self._lower_limits(num_tokens, len(batch))
                return _from_the_start(batch)
            self._make_room()
        if len(batch) == 1 and (guilty := batch[0][0]) in self._suspects:
            guilty.fail(_no_memory(num_tokens) if ran_out else internal_failure("this request"))
            return ()
        self._suspects.update(open_pass for open_pass, _ in batch)
        return _from_the_start(batch)

    def _free_caches(self) -> None:
        gc.collect()
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _lower_limits(self, num_tokens: int, num_quanta: int) -> None:
        """The next try is smaller or recomputes more."""
        self._limits_now = self._limits_now.below(num_tokens, num_quanta)
        self.limits = self.limits.towards(self._limits_now)
        log.warning("memory ran out; limits of one pass lowered", now=self._limits_now, from_now_on=self.limits)

    def _forward_backward(self, batch: Sequence[QuantumRef], recompute: Recompute) -> list[QuantumResult]:
        self.num_forwards += 1
        return run_micro_batch(
            self._base, [open_pass.quantum(index) for open_pass, index in batch], recompute=recompute
        )


def _from_the_start(batch: Sequence[QuantumRef]) -> list[QuantumRef]:
    """All quanta of the ops involved, up to those of the batch: half a gradient may be in their scratch."""
    stops: dict[OpenPass, int] = {open_pass: index + 1 for open_pass, index in batch}
    for open_pass in stops:
        open_pass.restart()
    return [(open_pass, index) for open_pass, stop in stops.items() for index in range(stop)]


def _no_memory(num_tokens: int) -> Failure:
    return Failure(
        message=f"out of memory: {num_tokens} tokens that have to run together did not fit, not even with everything "
        "recomputed; nothing of this request was applied",
        category=Category.SERVER,
    )
