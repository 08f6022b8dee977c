"""Virtual time: a queue of moments, each with what happens then.

It knows nothing of what happens. Invariant: moments come in order of time, those of one time in the order in which
they were asked for; so a run depends on nothing but its seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Event = Callable[[], None]


class Timeline:
    """`now` is virtual seconds since the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._queue: list[tuple[float, int, Event]] = []
        self._num_asked = 0

    def after(self, delay_s: float, event: Event) -> None:
        """Have `event` called `delay_s` from now."""
        assert delay_s >= 0, "nothing happens in the past"
        heapq.heappush(self._queue, (self.now + delay_s, self._num_asked, event))
        self._num_asked += 1

    def run(self, until_s: float, *, after_each: Event | None = None) -> None:
        """Let time pass until `until_s`, or until nothing more can happen."""
        while self._queue and self._queue[0][0] <= until_s:
            self.now, _, event = heapq.heappop(self._queue)
            self.num_events += 1
            event()
            if after_each is not None:
                after_each()
        self.now = max(self.now, until_s)
