"""A clock that a test moves by hand, so that no test sleeps."""

from __future__ import annotations


class ManualClock:
    """`now` is seconds since the epoch, `monotonic` seconds since the clock was made; both move by `advance` only."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._start = start
        self._elapsed_s = 0.0

    def now(self) -> float:
        return self._start + self._elapsed_s

    def monotonic(self) -> float:
        return self._elapsed_s

    def advance(self, seconds: float) -> None:
        """Let time pass. It never runs backwards."""
        assert seconds >= 0, "time does not run backwards"
        self._elapsed_s += seconds
