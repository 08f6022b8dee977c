"""The sampler contract on the built-in sampler, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sampler_contract_subject import BundledSubject, InProcessExecutor

from treadle.testing.sampler_contract import CHECKS, SamplerDriver, started

MAX_RUNNING = 16


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SamplerDriver]:
    subject = BundledSubject(tmp_path_factory.mktemp("contract"))
    async with started(
        lambda on_parts: InProcessExecutor(subject, on_parts, max_running=MAX_RUNNING),
        subject,
        hands_over=False,
        num_places=3,
    ) as driver:
        yield driver


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_builtin(driver: SamplerDriver, check: object) -> None:
    assert callable(check)
    await check(driver)
