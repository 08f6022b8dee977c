"""A sampler that outlives its own breakage: an exception inside a pass costs the guilty request only.

What was inside when it broke runs again, one request at a time, in a fresh sampler; draws are keyed, so the innocent
get the tokens they would have had. A request that breaks the sampler alone is guilty and fails; one for which memory
ran out first gets what idle runs and kept versions held. What comes in meanwhile waits. It knows nothing of how
sampling works.
Invariant: every submitted request ends in exactly one outcome, unless it is cancelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from treadle.domain.ids import RequestId
from treadle.domain.outcome import Failure, SampledPart, SampleOutcome
from treadle.domain.states import Category
from treadle.engine.memory import is_out_of_memory
from treadle.sampler.base import Sampler, SampleRequest
from treadle.telemetry.logs import get_logger
from treadle.worker.device_loss import reraise_if_device_is_lost
from treadle.worker.failures import internal_failure

log = get_logger(__name__)

_WHAT = "this sample"
_NO_MEMORY = Failure(
    "out of memory: there is no room for this sample alone; ask for fewer sequences, or a shorter prompt or answer",
    Category.SERVER,
)


class GuardedSampler:
    """Implements sampler.base.Sampler over samplers made by `make`. Not thread-safe.

    make_room: frees memory that nobody needs at this moment; called when it ran out.
    """

    def __init__(self, make: Callable[[], Sampler], *, make_room: Callable[[], object] = lambda: None) -> None:
        self._make = make
        self._make_room = make_room
        self._inner = make()
        self._inside: dict[RequestId, SampleRequest] = {}
        # Those that were inside at a breakage and have not had their turn alone, and those that came since.
        self._suspects: deque[SampleRequest] = deque()
        self._waiting: deque[SampleRequest] = deque()
        # The one inside is a suspect, which stays alone.
        self._is_trying = False
        # Memory ran out for them alone once, and they are tried again with more.
        self._tried_again: set[RequestId] = set()

    @property
    def has_work(self) -> bool:
        return bool(self._inside or self._suspects or self._waiting) or self._inner.has_work

    @property
    def num_waiting(self) -> int:
        return self._inner.num_waiting + len(self._suspects) + len(self._waiting)

    @property
    def num_running(self) -> int:
        return self._inner.num_running

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """See Sampler.submit."""
        self._waiting.extend(requests)
        self._let_in()

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See Sampler.cancel."""
        self._inner.cancel(request_ids)
        for request_id in request_ids:
            self._inside.pop(request_id, None)
            self._tried_again.discard(request_id)
        self._suspects = _without(self._suspects, request_ids)
        self._waiting = _without(self._waiting, request_ids)

    def step(self, max_seconds: float) -> list[SampleOutcome]:
        """See Sampler.step."""
        self._let_in()
        try:
            finished = self._inner.step(max_seconds)
        except Exception as error:  # noqa: BLE001 (worker entry: a bug in one sample must not end the others)
            reraise_if_device_is_lost(error)
            ran_out = is_out_of_memory(error)
            log.error("sampler broke", samples=len(self._inside), ran_out_of_memory=ran_out, exc=error)
        else:
            for outcome in finished:
                self._inside.pop(outcome.request_id, None)
                self._tried_again.discard(outcome.request_id)
            return finished
        # Behind the handler, where the failed pass's frames are gone.
        return self._after_breakage(ran_out=ran_out)

    def take_parts(self) -> list[SampledPart]:
        """See Sampler.take_parts."""
        return self._inner.take_parts()

    def _let_in(self) -> None:
        """Suspects go in alone; everybody else when no suspect is left."""
        if self._suspects:
            if not self._inside:
                self._enter([self._suspects.popleft()])
                self._is_trying = True
        elif self._waiting and not (self._is_trying and self._inside):
            self._is_trying = False
            self._enter(self._waiting)
            self._waiting.clear()

    def _enter(self, requests: Collection[SampleRequest]) -> None:
        self._inside.update((request.request_id, request) for request in requests)
        self._inner.submit(tuple(requests))

    def _after_breakage(self, *, ran_out: bool) -> list[SampleOutcome]:
        broken = list(self._inside.values())
        self._inside.clear()
        self._inner = self._make()
        if ran_out:
            self._make_room()
        if len(broken) == 1:
            (guilty,) = broken
            if not ran_out or guilty.request_id in self._tried_again:
                self._tried_again.discard(guilty.request_id)
                return [SampleOutcome(guilty.request_id, failure=_NO_MEMORY if ran_out else internal_failure(_WHAT))]
            self._tried_again.add(guilty.request_id)
        self._suspects.extendleft(reversed(broken))
        return []


def _without(requests: Iterable[SampleRequest], request_ids: Sequence[RequestId]) -> deque[SampleRequest]:
    return deque(request for request in requests if request.request_id not in request_ids)
