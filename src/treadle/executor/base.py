"""The seam between scheduler and workers.

An executor owns one worker of one pool. The scheduler awaits `run_cycle` for training and hands samples over
with `submit_samples`; finished samples come back through the `on_samples` callback, on the event loop.
Implementations: local.py (child process), ray.py (actor), fake.py (numpy, in process). They all pass
testing/executor_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.outcome import CycleOutcome, PoolFacts, SampledPart, SampleOutcome, SnapshotWritten
from treadle.domain.plan import CycleWork, SampleWork, StateTag

SamplesCallback = Callable[[Sequence[SampleOutcome]], None]
DeathCallback = Callable[[str], None]
# Tokens of running samples that somebody watches; an executor that cannot tell them has none to tell.
PartsCallback = Callable[[Sequence[SampledPart]], None]


class SamplingExecutor(Protocol):
    """One worker that samples, wherever it runs."""

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        """Load the base model. Raises ServerError or ConfigError with the reason when it cannot.

        on_death is called once, with a reason, when the worker ends without `stop`. A worker that has work and makes
        no progress for too long is ended, and that is a death as well.
        """
        ...

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        """Queue samples; each ends in exactly one SampleOutcome, unless the worker dies."""
        ...

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """Drop samples that nobody waits for. Idempotent; unknown ids are ignored."""
        ...

    async def stop(self) -> None:
        """End the worker. Idempotent; on_death is not called."""
        ...


class Executor(SamplingExecutor, Protocol):
    """One worker that trains, and samples as well."""

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """Run one cycle whole.

        Restores come first, each with its RestoreOutcome; an op whose starting state the worker does not hold comes
        back with must_restore. One cycle of a token at a time; a cycle with a newer token ends one on its way at its
        next micro-batch, and the worker forgets the runs named in it. Raises WorkerDied when the worker ends, Fenced
        when the worker has seen a newer token.
        """
        ...

    async def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool = False
    ) -> dict[ModelId, SnapshotWritten]:
        """Write each run's whole state under the given blob key; answered when the blobs are durable.

        Cycles go on meanwhile; several calls may be on their way. Left out are runs that the worker does not hold at
        exactly that tag when their turn comes, runs with a partly done pass or, unless with_open_gradient, an open
        gradient, and those that could not be written. with_open_gradient takes what is left of a run between two
        parts of a pass too: the state before that pass.
        """
        ...

    async def evict(self, model_ids: Sequence[ModelId]) -> None:
        """Forget runs' states and free their memory. Idempotent."""
        ...
