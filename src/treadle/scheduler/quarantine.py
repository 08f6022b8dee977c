"""Who may have ended a worker, and in what company suspects run until that is known.

At a worker's death everything that was in flight may be to blame. Training ops are suspects at once: they run one per
cycle, while samples wait. Samples have no state to lose, so they are suspects only at their second death, and are
then thinned out, death by death, until one runs alone and cycles wait. Only a death while alone counts, and the third
is final. Each worker of a pool has a quarantine of its own, and they share what they know of requests: a run that moves
and a sample that is handed over again take their deaths along. Pure: it knows no worker, no store and no clock; the
loops ask it. Invariant: what it condemns ended a worker MAX_DEATHS times with nothing else in flight there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.limits import MAX_SUSPECTS

# A request that was in flight, alone, at this many worker deaths is poison.
MAX_DEATHS = 3
# One that was alone in flight when so many leaders ended: something outside ends leaders far more often than a request
# that takes its whole machine along, but without an end to it such a one would have the pool start for ever.
MAX_LEADER_ENDS = 10
# Samples that were in flight at so many deaths are suspects: one death is far more often the machine's doing.
DEATHS_TO_SUSPECT_A_SAMPLE = 2
# Of the suspects among samples every death leaves one in so many to run together: a few deaths find one in hundreds.
THINNING = 8


class Suspicions:
    """What is known of requests, shared by the quarantines of one pool.

    suspects: training ops with their deaths while alone; those without one are suspects all the same. died_at: where
    a sample was in flight at its last death. inherited: training ops that were in flight when the leader before ended.
    """

    def __init__(self) -> None:
        self.suspects: dict[RequestId, int] = {}
        self.inherited: set[RequestId] = set()
        self.unstorable: Counter[RequestId] = Counter()
        self.leader_ends: Counter[RequestId] = Counter()
        self.sample_deaths: Counter[RequestId] = Counter()
        self.sample_deaths_alone: Counter[RequestId] = Counter()
        self.died_at: dict[RequestId, Quarantine] = {}


class Quarantine:
    """Shared by the loops that feed one worker and its successors."""

    def __init__(self, suspicions: Suspicions | None = None) -> None:
        """suspicions: of its pool; None: it is the only one."""
        self._known = suspicions or Suspicions()
        self._cycle: tuple[RequestId, ...] = ()
        self._samples: set[RequestId] = set()
        self._max_samples_together: int | None = None
        # Its worker was taken away for good, or could not be loaded again.
        self.is_closed = False
        self._has_cycle_suspects = False
        self._has_sample_suspects = False
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever one side may run again."""
        self._listeners.append(listener)

    # What runs, as the loops tell it.

    def cycle_begins(self, request_ids: Iterable[RequestId]) -> None:
        """These training ops are with the worker from now on."""
        self._cycle = tuple(request_ids)

    def cycle_ended(self) -> None:
        """The worker answered."""
        self._cycle = ()
        self._tell_if_thinned()

    def samples_begin(self, request_ids: Iterable[RequestId]) -> None:
        """These samples are with the worker from now on."""
        self._samples.update(request_ids)

    def sample_ended(self, request_id: RequestId) -> None:
        """The sampler answered: it is no suspect."""
        self._samples.discard(request_id)
        self._known.sample_deaths.pop(request_id, None)
        self._known.sample_deaths_alone.pop(request_id, None)
        self._known.died_at.pop(request_id, None)
        self._tell_if_thinned()

    def sample_handed_back(self, request_id: RequestId) -> None:
        """It is not with the worker any more, and how it ends is not known yet."""
        self._samples.discard(request_id)
        self._tell_if_thinned()

    def worker_died(self) -> None:
        """Everything in flight was there at the end of the worker."""
        is_alone = len(self._cycle) + len(self._samples) == 1
        self.suspect(self._cycle, deaths=int(is_alone))
        # One that dies while it starts clears nobody.
        self._has_cycle_suspects |= bool(self._cycle)
        if self._samples:
            self._note_sample_deaths(is_alone=is_alone)
        self._cycle = ()
        self._samples.clear()

    def _note_sample_deaths(self, *, is_alone: bool) -> None:
        were_suspects = any(self._is_suspect_sample(request_id) for request_id in self._samples)
        for request_id in self._samples:
            self._known.sample_deaths[request_id] += 1
            self._known.died_at[request_id] = self
            self._known.sample_deaths_alone[request_id] += int(is_alone)
        if any(self._is_suspect_sample(request_id) for request_id in self._samples):
            together = len(self._samples) // THINNING
            # Cycles that died beside suspects do not clear these.
            limit = self._max_samples_together if were_suspects else None
            self._max_samples_together = max(1, together if limit is None else min(together, limit))

    # Training.

    @property
    def suspects(self) -> frozenset[RequestId]:
        """Training ops that run one per cycle."""
        return frozenset(self._known.suspects)

    def suspect(self, request_ids: Iterable[RequestId], *, deaths: int = 0) -> None:
        """These training ops may have ended a worker; `deaths`: how many of those count."""
        for request_id in request_ids:
            self._known.suspects[request_id] = self._known.suspects.get(request_id, 0) + deaths
        while len(self._known.suspects) > MAX_SUSPECTS:
            del self._known.suspects[next(iter(self._known.suspects))]

    def inherit(self, in_flight: Sequence[RequestId]) -> None:
        """What was in flight when the leader before ended, as `note_of` put it."""
        num_ends = Counter(in_flight)
        self.suspect(num_ends)
        self._known.inherited.update(num_ends)
        if len(num_ends) == 1:
            self._known.leader_ends.update(num_ends)

    def note_of(self, request_ids: Sequence[RequestId]) -> list[RequestId]:
        """What the next leader should find of a cycle: its requests; one alone once more per leader that it outlived.

        Deaths of workers are not in it: a new leader counts those anew.
        """
        is_alone = len(request_ids) == 1
        return [id_ for id_ in request_ids for _ in range(1 + self._known.leader_ends[id_] * is_alone)]

    def suspect_unstorable(self, request_ids: Sequence[RequestId]) -> None:
        """The outcome of one of these training ops could not be stored; it is found as poison is found."""
        self.suspect(request_ids)
        if len(request_ids) == 1:
            self._known.unstorable[request_ids[0]] += 1

    def verdict(self, request_id: RequestId) -> str | None:
        """Why a training op is given up, or None."""
        if self._known.suspects.get(request_id, 0) >= MAX_DEATHS:
            return f"this request ended its worker {MAX_DEATHS} times"
        if self._known.leader_ends[request_id] >= MAX_LEADER_ENDS:
            return f"its server ended {MAX_LEADER_ENDS} times while it ran nothing but this request"
        if self._known.unstorable[request_id] >= MAX_DEATHS:
            return f"the outcome of this request could not be stored {MAX_DEATHS} times"
        return None

    def clear(self, request_ids: Iterable[RequestId]) -> None:
        """These training ops are over, so they are no suspects any more.

        Not before: a pass that kills its worker in a later part would be cleared by each earlier one.
        """
        for request_id in request_ids:
            self._known.suspects.pop(request_id, None)
            self._known.unstorable.pop(request_id, None)
            self._known.leader_ends.pop(request_id, None)
            self._known.inherited.discard(request_id)

    def isolated(
        self, lines: Mapping[ModelId, Collection[RequestId]], replayed: Collection[RequestId]
    ) -> ModelId | None:
        """The only run that may be planned, or None when all may. `lines`: what could run of each run.

        Runs go one at a time once a suspect has killed alone, so that its next death costs nobody else a restore, and
        when one of the suspects is a replayed op, without which its run cannot go on. Innocents first.
        """
        waiting = [
            (self._known.suspects[request_id], model_id, request_id)
            for model_id, request_ids in lines.items()
            for request_id in request_ids
            if request_id in self._known.suspects
        ]
        self._note_cycle_suspects(bool(waiting))
        if any(deaths > 0 or request_id in replayed for deaths, _, request_id in waiting):
            worst: dict[ModelId, int] = {}
            for deaths, model_id, _ in waiting:
                worst[model_id] = max(deaths, worst.get(model_id, 0))
            return min(worst, key=lambda model_id: (worst[model_id], model_id))
        return None

    def _note_cycle_suspects(self, are_waiting: bool) -> None:
        has_changed = self._has_cycle_suspects != are_waiting
        self._has_cycle_suspects = are_waiting
        if has_changed:
            self._tell()

    @property
    def may_train(self) -> bool:
        """False while one sample has to run alone."""
        return self._has_cycle_suspects or not (self._has_sample_suspects and self._max_samples_together == 1)

    # Sampling.

    def holder(self, request_id: RequestId) -> Quarantine | None:
        """Where a suspect is to be found out, in the company that was there at its death; None: anywhere."""
        holder = self._known.died_at.get(request_id) if self._is_suspect_sample(request_id) else None
        return None if holder is None or holder.is_closed else holder

    @property
    def is_thinning(self) -> bool:
        """Suspects among samples are being found out: no other sample comes in."""
        return self._max_samples_together is not None

    def is_condemned(self, request_id: RequestId) -> bool:
        """A sample that is given up."""
        return self._known.sample_deaths_alone[request_id] >= MAX_DEATHS

    def admit_samples(self, waiting: Sequence[RequestId]) -> list[RequestId]:
        """Those of the waiting samples that may go to the sampler now, in their order."""
        suspects = [request_id for request_id in waiting if self._is_suspect_sample(request_id)]
        is_one_running = any(self._is_suspect_sample(request_id) for request_id in self._samples)
        self._has_sample_suspects = bool(suspects) or is_one_running
        if not self._has_sample_suspects:
            self._max_samples_together = None
        if self._has_cycle_suspects:
            return []
        if self._max_samples_together is None:
            return list(waiting)
        if self._max_samples_together == 1 and self._cycle:
            return []
        return suspects[: max(0, self._max_samples_together - len(self._samples))]

    def _is_suspect_sample(self, request_id: RequestId) -> bool:
        return self._known.sample_deaths[request_id] >= DEATHS_TO_SUSPECT_A_SAMPLE

    def _tell_if_thinned(self) -> None:
        """While samples are thinned out the other side, or the next of them, may have waited for this."""
        if self._max_samples_together is not None:
            self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
