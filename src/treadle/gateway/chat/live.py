"""Tokens on their way: who wants to see a sample grow hears of its new tokens, if its worker is this server's.

A convenience and never the truth: parts may be missing (another server's worker) or come twice (a worker that died was
replaced, and draws the same again); the result is complete. It refuses to keep anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treadle.domain.ids import RequestId
from treadle.domain.outcome import SampledPart

Listener = Callable[[SampledPart], None]


class LiveSamples:
    """Listeners by request id."""

    def __init__(self) -> None:
        self._listeners: dict[RequestId, Listener] = {}

    def listen(self, request_id: RequestId, listener: Listener) -> None:
        """Call `listener` with each part of this request, until `forget`."""
        self._listeners[request_id] = listener

    def forget(self, request_id: RequestId) -> None:
        """Nobody listens any more. Idempotent."""
        self._listeners.pop(request_id, None)

    def publish(self, parts: Sequence[SampledPart]) -> None:
        """A worker of this server has sampled these; called on the event loop."""
        for part in parts:
            listener = self._listeners.get(part.request_id)
            if listener is not None:
                listener(part)
