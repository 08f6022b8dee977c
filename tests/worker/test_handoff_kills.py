"""A real worker process that is killed between the answer of a save and its durable write."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from treadle.blobs import LocalBlobs
from treadle.config import bundled_model_dir
from treadle.domain.ids import SamplingSessionId
from treadle.domain.ops import AdamParams, CreateModelOp, LoraSpec, OptimStepOp, SaveForSamplerOp
from treadle.domain.outcome import BlobResult
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.testing.builders import pass_op, sample_op
from treadle.testing.driver import PATIENCE_S, read_sample, started


async def test_a_version_is_sampled_by_the_next_worker_before_and_after_it_is_durable(tmp_path: Path) -> None:
    place, staged = tmp_path / "blobs", tmp_path / "staged"
    blobs = LocalBlobs(place)
    config = WorkerConfig(
        base_model="treadle/tiny",
        source=str(bundled_model_dir()),
        revision=None,
        device="cpu",
        dtype="float32",
        num_threads=1,
        blobs_url=str(place),
        max_running_samples=8,
        max_cached_tokens=0,
        staging_dir=str(staged),
    )
    # No write can begin without it: the store is away.
    (place / ".incoming").rmdir()
    async with started(LocalExecutor(config)) as driver:
        run = driver.new_model_id()
        save = SaveForSamplerOp(run, 3, sampling_session_id=SamplingSessionId("s:sample:0"))
        outcomes = await driver.run(
            CreateModelOp(run, "treadle/tiny", LoraSpec(rank=4, seed=1)),
            pass_op(1, model_id=run),
            OptimStepOp(run, 2, AdamParams(learning_rate=1e-2)),
            save,
        )
        assert [outcome.failure for outcome in outcomes] == [None] * 4
        saved = outcomes[-1].result
        assert isinstance(saved, BlobResult)
        op = replace(sample_op(max_tokens=4), blob_key=saved.blob_key)
        (before,) = await driver.sample(op)
        assert isinstance(driver.executor, LocalExecutor)
        assert driver.executor.pid is not None
        os.kill(driver.executor.pid, signal.SIGKILL)
    assert list(place.iterdir()) == []
    async with started(LocalExecutor(config)) as driver:
        (after,) = await driver.sample(op)
        assert after.encoded == before.encoded
        assert read_sample(after).sequences
        (place / ".incoming").mkdir()
        deadline = time.monotonic() + PATIENCE_S
        while not blobs.exists(saved.blob_key):
            assert time.monotonic() < deadline, "the next worker does not write what was left behind"
            await asyncio.sleep(0.05)
    assert not staged.exists()
