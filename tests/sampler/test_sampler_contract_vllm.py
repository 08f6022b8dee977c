"""The same contract on vLLM, in processes of its own and an environment of its own. Slow: vLLM takes half a minute."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sampler_contract_subject import BundledSubject, worker_config

from treadle.executor.vllm import VllmExecutor
from treadle.sampler.vllm_options import VllmOptions
from treadle.testing.sampler_contract import CHECKS, SamplerDriver, started
from treadle.testing.vllm_environment import NOT_FOUND, find_vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAX_RUNNING = 16
OPTIONS = VllmOptions(max_adapters=3, cpu_cache_bytes=256 * 2**20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SamplerDriver]:
    python = find_vllm_python()
    if python is None:
        pytest.skip(NOT_FOUND)
    subject = BundledSubject(tmp_path_factory.mktemp("contract"))
    config = worker_config(subject, max_running=MAX_RUNNING)
    async with started(
        lambda on_parts: VllmExecutor(config, options=OPTIONS, python=python, on_parts=on_parts),
        subject,
        hands_over=True,
        num_places=OPTIONS.max_adapters,
    ) as driver:
        yield driver


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_vllm(driver: SamplerDriver, check: object) -> None:
    assert callable(check)
    await check(driver)
