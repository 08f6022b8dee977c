"""What this process knows of requests without asking the database: those it admitted, and how it saw them end.

A client asks for a result once its request is committed here, and again while it waits; with this, neither costs a
query. It is a memory and never the truth: a request that is not in it is read from the table. It refuses to know who
may see what. Invariants: nothing is in it that was not committed; a final state in it is the table's; a queued one may
be older than the table's, for as long as nobody looks (`correct` does, with every poll of the table).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from treadle.domain.ids import RequestId
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.records import FinishedRequest, FutureRecord, NewRequest
from treadle.domain.states import RequestState

# The oldest entries go first. A request is of interest for seconds; these are minutes of a busy server.
_MAX_ENTRIES = 65_536
_MAX_RESULT_BYTES = 32 * 2**20


class RecentFutures:
    """Futures by request id, bounded in number and in bytes of results."""

    def __init__(self, *, max_entries: int = _MAX_ENTRIES, max_result_bytes: int = _MAX_RESULT_BYTES) -> None:
        self._max_entries = max_entries
        self._max_result_bytes = max_result_bytes
        self._futures: OrderedDict[RequestId, FutureRecord] = OrderedDict()
        self._result_bytes = 0

    def get(self, request_id: RequestId) -> FutureRecord | None:
        """What is known of a request; None says nothing about whether it exists."""
        return self._futures.get(request_id)

    def admitted(self, request: NewRequest) -> None:
        """A new row was committed."""
        self._put(
            FutureRecord(
                request_id=request.request_id,
                tenant_id=request.tenant_id,
                kind=request.kind,
                state=RequestState.QUEUED if request.failure is None else RequestState.FAILED,
                failure=request.failure,
            )
        )

    def finished(self, outcomes: Iterable[FinishedRequest], request_ids: Iterable[RequestId]) -> None:
        """Requests became final in one commit, by these outcomes. Those that were not admitted here are not kept."""
        by_id = {outcome.request_id: outcome for outcome in outcomes}
        for request_id in request_ids:
            queued, outcome = self._pop(request_id), by_id.get(request_id)
            if queued is not None and outcome is not None:
                self._put(_final(queued, outcome.result, outcome.failure, is_transient=outcome.is_transient))

    def correct(self, states: Mapping[RequestId, RequestState]) -> None:
        """The table says so: forget what is older."""
        for request_id, state in states.items():
            known = self._futures.get(request_id)
            if known is not None and known.state is not state:
                self._pop(request_id)

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """The results of these were dropped."""
        for request_id in request_ids:
            self._pop(request_id)

    def forget_final(self) -> None:
        """Some results were dropped."""
        self.forget([id_ for id_, known in self._futures.items() if known.state is not RequestState.QUEUED])

    def _put(self, future: FutureRecord) -> None:
        self._pop(future.request_id)
        self._futures[future.request_id] = future
        self._result_bytes += _num_bytes(future)
        while len(self._futures) > self._max_entries or self._result_bytes > self._max_result_bytes:
            _, oldest = self._futures.popitem(last=False)
            self._result_bytes -= _num_bytes(oldest)

    def _pop(self, request_id: RequestId) -> FutureRecord | None:
        future = self._futures.pop(request_id, None)
        if future is not None:
            self._result_bytes -= _num_bytes(future)
        return future


def _final(
    queued: FutureRecord, result: EncodedResult | None, failure: Failure | None, *, is_transient: bool
) -> FutureRecord:
    state = RequestState.DONE if failure is None else RequestState.FAILED
    return replace(queued, state=state, result=result, failure=failure, is_transient=is_transient)


def _num_bytes(future: FutureRecord) -> int:
    return 0 if future.result is None else len(future.result.body)
