"""The seam between scheduler and workers.

An executor owns one worker of one pool. The scheduler awaits `run_cycle` for training and hands samples over
with `submit_samples`; finished samples come back through the `on_samples` callback, on the event loop.
Implementations: local.py (child process), fake.py (numpy, in process). They all pass testing/executor_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.outcome import CycleOutcome, PoolFacts, SampleOutcome
from treadle.domain.plan import CycleWork, SampleWork, StateTag

SamplesCallback = Callable[[Sequence[SampleOutcome]], None]
DeathCallback = Callable[[str], None]


class Executor(Protocol):
    """One worker, wherever it runs."""

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        """Load the base model. Raises ServerError or ConfigError with the reason when it cannot.

        on_death is called once, with a reason, when the worker ends without `stop`.
        """
        ...

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        """Run one cycle whole. Raises WorkerDied when the worker ends, Fenced when its token is newer."""
        ...

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        """Queue samples; each ends in exactly one SampleOutcome, unless the worker dies."""
        ...

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        """Drop samples that nobody waits for. Idempotent; unknown ids are ignored."""
        ...

    async def snapshot(self, targets: Sequence[tuple[StateTag, str]]) -> dict[ModelId, int]:
        """Write each run's whole state under the given blob key; bytes written per run.

        Runs that the worker does not hold at exactly that tag are left out.
        """
        ...

    async def evict(self, model_ids: Sequence[ModelId]) -> None:
        """Forget runs' states and free their memory. Idempotent."""
        ...

    async def stop(self) -> None:
        """End the worker. Idempotent; on_death is not called."""
        ...
