"""Samples whose weights cannot be read: for now, which the client waits out, or for good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from worker_support import Driver, MemoryBlobs

from treadle.domain.ids import BlobKey, RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import SampleOp, SamplingParams
from treadle.errors import StoreUnavailable
from treadle.worker.work import DecodedSample

OP = SampleOp(
    sampling_session_id=SamplingSessionId("s:sample:0"),
    seq_id=1,
    prompt=np.array([20, 30, 40], np.int32),
    num_samples=1,
    params=SamplingParams(seed=1, max_tokens=2, use_eos=False),
    blob_key=BlobKey("states/a"),
)


def test_only_a_blob_store_that_is_away_is_waited_out(
    driver: Driver, blobs: MemoryBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_key: str) -> bytes:
        raise StoreUnavailable("the blob store could not read: timed out")

    base_only = DecodedSample(RequestId("base"), TenantId("t"), replace(OP, blob_key=None))
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "read", away)
        driver.worker.submit_samples([DecodedSample(RequestId("away"), TenantId("t"), OP), base_only])
    driver.worker.submit_samples([DecodedSample(RequestId("gone"), TenantId("t"), OP)])
    outcomes = {}
    while driver.worker.has_samples:
        outcomes |= {outcome.request_id: outcome for outcome in driver.worker.sample_step(1.0)}
    assert [outcomes[name].is_transient for name in ("away", "gone", "base")] == [True, False, False]
    assert outcomes["away"].failure is not None
    assert outcomes["gone"].failure is not None
    assert outcomes["base"].failure is None
