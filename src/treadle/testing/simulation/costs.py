"""What things cost in virtual seconds: t(T) = a + b T for a forward and backward, and constants for all else.

Fitted to a real server by `scripts/simulate calibrate`; the numbers are data, this file only adds them up.
Invariant: a cost is never negative, and more work never costs less.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from treadle.engine.buckets import packed_length


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, unless a name says otherwise.

    Worker: cycle_s per cycle, forward_s per forward and backward of a pack, token_s per row of it (padding included),
    op_s per op, restore_s to read one run's state back, snapshot_s of the device's thread to copy one out.
    Scheduler: outside_s per cycle for reading heads, planning and committing, while the worker waits, and
    outside_token_s for each of its tokens: payloads are read and results stored.
    Client: client_s from a commit until the client's next request is a row, varying by client_cv; submit_s, submit_cv
    between requests that a client sends together.
    Beside them: write_s until a snapshot that was copied is durable, respawn_s from a worker's death until the next one
    is ready, takeover_s from a leader's death until the next one plans.
    packed_tokens: most tokens of a pack; buckets: lengths that packs are padded to, if any.
    """

    forward_s: float
    token_s: float
    cycle_s: float = 0.0
    op_s: float = 0.0
    outside_s: float = 0.0
    outside_token_s: float = 0.0
    client_s: float = 0.0
    client_cv: float = 0.0
    submit_s: float = 0.0
    submit_cv: float = 0.0
    restore_s: float = 0.0
    snapshot_s: float = 0.0
    write_s: float = 0.0
    respawn_s: float = 2.0
    takeover_s: float = 5.0
    packed_tokens: int = 8_192
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # JSON knows lists only.
        object.__setattr__(self, "buckets", tuple(self.buckets))
        assert all(getattr(self, field.name) >= 0 for field in fields(self) if field.name != "buckets"), self
        assert self.packed_tokens > 0

    def compute_s(self, packs: Sequence[int], *, num_ops: int, num_restores: int) -> float:
        """What a worker takes for a cycle whose packs have these tokens."""
        rows = sum(packed_length(tokens, self.buckets) for tokens in packs)
        return (
            self.cycle_s
            + self.forward_s * len(packs)
            + self.token_s * rows
            + self.op_s * num_ops
            + self.restore_s * num_restores
        )

    def between_s(self, num_tokens: int) -> float:
        """What a cycle of so many tokens takes beside its computing."""
        return self.outside_s + self.outside_token_s * num_tokens

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(text: str) -> Costs:
        """The "costs" of a calibration file. Raises ValueError for one that is none."""
        data = json.loads(text).get("costs", {})
        known = {field.name for field in fields(Costs)}
        if not {"forward_s", "token_s"} <= data.keys() <= known:
            raise ValueError(f"a calibration has costs out of {sorted(known)}, not {sorted(data)}")
        return Costs(**data)


@dataclass(frozen=True, slots=True)
class CycleSample:
    """One measured cycle."""

    num_tokens: int
    num_ops: int
    num_forwards: int
    compute_s: float


def fit(samples: Sequence[CycleSample]) -> Mapping[str, float]:
    """forward_s, token_s and op_s that explain measured cycles best; cycle_s is in forward_s when all had one forward.

    Least squares over the medians of equal cycles, weighted by their number and relative to their size: outliers of a
    shared machine weigh nothing, and a large cycle no more than a small one. Coefficients that come out negative are
    set to 0 and the others fitted again.
    """
    groups: dict[tuple[int, int, int], list[float]] = {}
    for sample in samples:
        groups.setdefault((sample.num_forwards, sample.num_tokens, sample.num_ops), []).append(sample.compute_s)
    shapes = np.array(list(groups), dtype=float)
    medians = np.array([float(np.median(values)) for values in groups.values()])
    weights = np.sqrt([len(values) for values in groups.values()]) / medians
    names = ["forward_s", "token_s", "op_s"]
    active = list(range(len(names)))
    while True:
        solution, *_ = np.linalg.lstsq(shapes[:, active] * weights[:, None], medians * weights, rcond=None)
        if (solution >= 0).all():
            break
        active.pop(int(np.argmin(solution)))
    fitted = dict.fromkeys(names, 0.0) | {names[i]: float(value) for i, value in zip(active, solution, strict=True)}
    predicted = shapes @ [fitted[name] for name in names]
    return fitted | {"median_error": float(np.median(np.abs(predicted / medians - 1)))}
