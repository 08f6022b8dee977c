"""A sampler that breaks: the guilty request fails, the others get what they would have had."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from treadle.config import bundled_model_dir
from treadle.domain.ids import RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import SampleOp, SamplingParams
from treadle.domain.outcome import SampleOutcome
from treadle.domain.states import Category
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.sampler.base import Sampler, SampleRequest
from treadle.sampler.builtin import open_sampler
from treadle.worker.guarded_sampler import GuardedSampler


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model(str(bundled_model_dir()), name="treadle/tiny", device="cpu", dtype="float32", num_threads=1)


def request(name: str, *, seed: int = 0) -> SampleRequest:
    op = SampleOp(
        sampling_session_id=SamplingSessionId("s:sample:0"),
        seq_id=1,
        prompt=np.array([20, 30, 40 + seed], np.int32),
        num_samples=1,
        params=SamplingParams(seed=seed, max_tokens=6, use_eos=False),
    )
    return SampleRequest(request_id=RequestId(name), tenant_id=TenantId("t"), op=op)


class Fragile:
    """A real sampler that breaks in a pass while a request called poison is inside."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner
        self._poison: set[RequestId] = set()

    @property
    def has_work(self) -> bool:
        return self._inner.has_work

    @property
    def num_waiting(self) -> int:
        return self._inner.num_waiting

    @property
    def num_running(self) -> int:
        return self._inner.num_running

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        self._poison |= {one.request_id for one in requests if one.request_id.startswith("poison")}
        self._inner.submit(requests)

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        self._poison -= set(request_ids)
        self._inner.cancel(request_ids)

    def step(self, max_seconds: float) -> list[SampleOutcome]:
        finished = self._inner.step(max_seconds)
        if self._poison:
            raise RuntimeError("broken in a pass")
        return finished


def drain(sampler: Sampler) -> dict[str, SampleOutcome]:
    outcomes: list[SampleOutcome] = []
    for _ in range(1_000):
        if not sampler.has_work:
            break
        outcomes += sampler.step(0.0)
    names = [str(outcome.request_id) for outcome in outcomes]
    assert len(names) == len(set(names)), "one outcome per request"
    return dict(zip(names, outcomes, strict=True))


def tokens(outcome: SampleOutcome) -> list[int]:
    assert outcome.result is not None, outcome.failure
    return list(outcome.result.sequences[0].tokens)


def test_only_the_guilty_request_fails_and_the_others_keep_their_tokens(base: BaseModel) -> None:
    undisturbed = GuardedSampler(lambda: open_sampler(base))
    undisturbed.submit([request("a", seed=1), request("b", seed=2), request("late", seed=3)])
    expected = drain(undisturbed)
    sampler = GuardedSampler(lambda: Fragile(open_sampler(base)))
    sampler.submit([request("a", seed=1), request("poison"), request("b", seed=2)])
    assert sampler.step(0.0) == []
    sampler.submit([request("late", seed=3)])
    outcomes = drain(sampler)
    assert set(outcomes) == {"a", "poison", "b", "late"}
    for name in ("a", "b", "late"):
        assert tokens(outcomes[name]) == tokens(expected[name])
    failure = outcomes["poison"].failure
    assert failure is not None
    assert failure.category is Category.SERVER
    assert "broken" not in failure.message, "details stay in the log"


def test_a_lone_breaker_fails_at_once(base: BaseModel) -> None:
    sampler = GuardedSampler(lambda: Fragile(open_sampler(base)))
    sampler.submit([request("poison")])
    assert set(drain(sampler)) == {"poison"}
    sampler.submit([request("a", seed=1)])
    assert drain(sampler)["a"].failure is None


def test_cancelled_requests_leave_wherever_they_are(base: BaseModel) -> None:
    sampler = GuardedSampler(lambda: Fragile(open_sampler(base)))
    sampler.submit([request("a", seed=1), request("poison"), request("b", seed=2)])
    sampler.step(0.0)
    sampler.submit([request("late", seed=3)])
    sampler.cancel([RequestId("poison"), RequestId("late"), RequestId("a"), RequestId("unknown")])
    assert set(drain(sampler)) == {"b"}


class Cramped(Fragile):
    """Breaks for want of memory as long as there is more inside than `room` holds."""

    room = 0

    def step(self, max_seconds: float) -> list[SampleOutcome]:
        if self.num_waiting + self.num_running > type(self).room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().step(max_seconds)


def test_memory_that_can_be_had_is_had_before_a_sample_fails(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two do not fit together, and one only once idle runs have made room; what never fits fails and says why."""
    sampler = GuardedSampler(
        lambda: Cramped(open_sampler(base)), make_room=lambda: monkeypatch.setattr(Cramped, "room", 1)
    )
    sampler.submit([request("a", seed=1), request("b", seed=2)])
    outcomes = drain(sampler)
    undisturbed = GuardedSampler(lambda: open_sampler(base))
    undisturbed.submit([request("a", seed=1), request("b", seed=2)])
    assert {name: tokens(one) for name, one in outcomes.items()} == {
        name: tokens(one) for name, one in drain(undisturbed).items()
    }
    monkeypatch.setattr(Cramped, "room", 0)
    calls: list[None] = []
    sampler = GuardedSampler(lambda: Cramped(open_sampler(base)), make_room=lambda: calls.append(None))
    sampler.submit([request("a")])
    failure = drain(sampler)["a"].failure
    assert failure is not None
    assert "out of memory" in failure.message
    assert len(calls) == 2
