"""Clients: what each asks for, and when. They see what a client of the SDK sees, the commit of their own requests.

Invariant: a client's requests depend on its seed and on when its results came, on nothing else.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from treadle.domain.ops import OpKind
from treadle.domain.quanta import cut_quanta, quantum_tokens
from treadle.testing.simulation.draws import Gaps, Lengths
from treadle.testing.simulation.rows import Row
from treadle.testing.simulation.timeline import Timeline

# (kind, quanta) becomes a row now.
Submit = Callable[[OpKind, Sequence[int]], Row]
# All requests of a step have their results.
StepDone = Callable[[Sequence[Row]], None]


@dataclass(frozen=True, slots=True)
class Habit:
    """How a client works.

    lengths: of its sequences; datums: of each pass. passes_per_step: whose gradients one step applies. is_paired: the
    step is sent with its passes, as the SDK's documentation advises; otherwise it waits for their results. depth: steps
    in flight at once. publishes: each step is followed by save_weights_for_sampler. pause: between a step's result and
    the next step, such as an RL client's sampling. arrivals: steps come at these gaps whatever became of the last.
    """

    lengths: Lengths
    datums: int
    passes_per_step: int = 1
    is_paired: bool = True
    depth: int = 1
    publishes: bool = False
    pause: Gaps | None = None
    arrivals: Gaps | None = None

    @property
    def behind_passes(self) -> tuple[OpKind, ...]:
        """What a step sends behind its passes."""
        publish = (OpKind.SAVE_FOR_SAMPLER,) if self.publishes else ()
        return (OpKind.OPTIM_STEP, *publish)


# Steps that an open-loop client has in flight at most: it gives up then, as a real one would.
_MOST_IN_FLIGHT = 256


class Client:
    """One run of one tenant. `rng` is its own, so no client's draws depend on another's.

    turn: from a result to the next request; submit_gap: between requests that are sent together.
    """

    def __init__(
        self,
        *,
        habit: Habit,
        rng: random.Random,
        timeline: Timeline,
        turn: Gaps,
        submit_gap: Gaps,
        submit: Submit,
        on_step: StepDone,
    ) -> None:
        self.habit = habit
        self._rng = rng
        self._timeline = timeline
        self._turn = turn
        self._submit_gap = submit_gap
        self._submit = submit
        self._on_step = on_step
        # Steps in flight, the oldest first; each the rows it has sent.
        self._steps: list[list[Row]] = []
        # What is on its way to the server: one after the other, as the SDK sends a run's requests.
        self._outbox: deque[tuple[list[Row], OpKind]] = deque()
        self._is_sending = False
        self._is_stopped = False

    def start(self) -> None:
        """Create the run; steps begin with its result."""
        self._submit(OpKind.CREATE_MODEL, ())

    def stop(self) -> None:
        """Begin no step from now on. Those that were begun are still finished."""
        self._is_stopped = True

    def on_finished(self, row: Row) -> None:
        """The outcome of one of its requests was committed."""
        if row.record.kind is OpKind.CREATE_MODEL:
            self._begin()
            return
        habit, step = self.habit, self._steps[0]
        assert row in step, "results come in the order of the requests"
        if not habit.is_paired and row is step[-1] and len(step) == habit.passes_per_step:
            self._timeline.after(self._turn.draw(self._rng), partial(self._send, step, habit.behind_passes))
        if row is not step[-1] or len(step) < habit.passes_per_step + len(habit.behind_passes):
            return
        self._steps.pop(0)
        self._on_step(step)
        if habit.arrivals is None:
            pause = habit.pause.draw(self._rng) if habit.pause else 0.0
            self._timeline.after(self._turn.draw(self._rng) + pause, self._next_step)

    def _begin(self) -> None:
        if self.habit.arrivals is not None:
            self._timeline.after(self.habit.arrivals.draw(self._rng), self._arrive)
            return
        # Not all clients of a real service start their steps in the same millisecond.
        for _ in range(self.habit.depth):
            delay = self.habit.pause.draw(self._rng) if self.habit.pause else 0.0
            self._timeline.after(self._turn.draw(self._rng) + delay, self._next_step)

    def _arrive(self) -> None:
        assert self.habit.arrivals is not None
        if self._is_stopped:
            return
        if len(self._steps) < _MOST_IN_FLIGHT:
            self._next_step()
        self._timeline.after(self.habit.arrivals.draw(self._rng), self._arrive)

    def _next_step(self) -> None:
        if self._is_stopped:
            return
        habit = self.habit
        step: list[Row] = []
        self._steps.append(step)
        passes = (OpKind.FORWARD_BACKWARD,) * habit.passes_per_step
        self._send(step, passes + (habit.behind_passes if habit.is_paired else ()))

    def _send(self, step: list[Row], kinds: Iterable[OpKind]) -> None:
        self._outbox.extend((step, kind) for kind in kinds)
        if not self._is_sending:
            self._send_next()

    def _send_next(self) -> None:
        self._is_sending = False
        while self._outbox:
            step, kind = self._outbox.popleft()
            lengths = [
                self.habit.lengths.draw(self._rng)
                for _ in range(self.habit.datums if kind is OpKind.FORWARD_BACKWARD else 0)
            ]
            step.append(self._submit(kind, quantum_tokens(lengths, cut_quanta(lengths))))
            if self._outbox and (gap_s := self._submit_gap.draw(self._rng)):
                self._is_sending = True
                self._timeline.after(gap_s, self._send_next)
                return
