"""A pass on its way through cycles: which quanta ran, what they gave, and the gradient that is not yet the run's.

An op is applied whole or not at all: its gradient grows in a scratch arena of its own and joins the run's open
gradient only when the last quantum is done.
"""

from __future__ import annotations

from treadle.domain.ops import PassOp
from treadle.domain.outcome import Failure, PassResult
from treadle.domain.quanta import cut_quanta, quantum_tokens
from treadle.engine.arenas import GradientArena
from treadle.engine.passes import QuantumInput, QuantumResult, sum_metrics
from treadle.engine.state import TrainingState, commit_scratch
from treadle.worker.failures import failure_of


class OpenPass:
    """One forward or forward_backward op between its first and its last quantum."""

    def __init__(self, op: PassOp, state: TrainingState) -> None:
        self.op = op
        self.state = state
        datum_tokens = [datum.num_tokens for datum in op.datums]
        self.quanta = cut_quanta(datum_tokens)
        self._quantum_tokens = quantum_tokens(datum_tokens, self.quanta)
        self.failure: Failure | None = None
        # Made for the first quantum: of the passes in a cycle only those that have begun hold one.
        self._scratch: GradientArena | None = None
        self._results: list[QuantumResult] = []

    @property
    def num_done(self) -> int:
        return len(self._results)

    @property
    def is_done(self) -> bool:
        return self.failure is not None or len(self._results) == len(self.quanta)

    def quantum(self, index: int) -> QuantumInput:
        """What the engine needs to run quantum `index`."""
        start, stop = self.quanta[index]
        if self._scratch is None and not self.op.forward_only:
            self._scratch = self.state.new_scratch()
        return QuantumInput(
            state=self.state,
            datums=self.op.datums[start:stop],
            loss=self.op.loss,
            scratch=self._scratch,
            first_datum_index=start,
            uses_adapter=self.op.uses_adapter,
        )

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole op."""
        return sum(self._quantum_tokens)

    def num_tokens(self, index: int) -> int:
        """Tokens of quantum `index`."""
        return self._quantum_tokens[index]

    def take(self, index: int, result: QuantumResult) -> None:
        """Book one quantum's result, in order. A failure ends the op; what it had gathered is dropped."""
        if self.failure is not None:
            return
        assert index == len(self._results), "quanta of an op run in order"
        self._results.append(result)
        if result.failure is not None:
            self.fail(failure_of(result.failure))

    def restart(self) -> None:
        """Forget every quantum that ran; the op starts again from nothing, to the same bits."""
        if self._scratch is not None:
            self._scratch.flat.zero_()
        self._results.clear()

    def fail(self, failure: Failure) -> None:
        """End the op without a trace."""
        self.failure = failure
        self._results.clear()
        if self._scratch is not None:
            self._scratch.release()
            self._scratch = None

    def finish(self) -> PassResult:
        """Apply the op; its result. Raises NonFiniteResult, with nothing applied, when its gradient is not finite."""
        assert self.failure is None
        assert self.is_done
        if not self.op.forward_only:
            scratch, self._scratch = self._scratch, None
            assert scratch is not None, "a pass has at least one quantum"
            commit_scratch(self.state, scratch)
        logprobs = tuple(array for result in self._results for array in result.logprobs)
        assert len(logprobs) == len(self.op.datums)
        return PassResult(logprobs=logprobs, metrics=sum_metrics(self._results))
