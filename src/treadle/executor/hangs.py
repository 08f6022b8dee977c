"""Telling a worker that hangs from one that is slow, by how long it has been silent with work at hand.

Only time in which this process itself ran counts: a server that was stopped, or whose machine slept, has not heard
its worker either. It refuses to know what the work is.
"""

from __future__ import annotations

from treadle.domain.limits import PROGRESS_EVERY_S


class Silence:
    """Seconds of silence, counted by whoever calls `tick` about every `tick_s`."""

    def __init__(self, *, tick_s: float = PROGRESS_EVERY_S) -> None:
        self._tick_s = tick_s
        self._last_tick: float | None = None
        self.seconds = 0.0

    def heard(self) -> None:
        """The worker said something."""
        self.seconds = 0.0

    def tick(self, now: float, *, has_work: bool) -> None:
        """Count the time since the last tick, at most twice what it should have been. now: on a monotonic clock."""
        elapsed_s = 0.0 if self._last_tick is None else now - self._last_tick
        self._last_tick = now
        self.seconds = self.seconds + min(elapsed_s, 2 * self._tick_s) if has_work else 0.0
