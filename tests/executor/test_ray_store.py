"""The Ray executor with an object store that a message does not fit into, and the end of its cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.config import ExecutorSettings
from treadle.executor.messages import WorkerConfig
from treadle.executor.ray import RayCluster, RayExecutor
from treadle.testing.driver import started
from treadle.testing.executor_contract import Run

# About the least that Ray takes.
STORE_BYTES = 80_000_000
PAYLOAD_BYTES = 100_000_000
# The tag of field 1000 of a protobuf message, bytes; no reader knows it.
UNKNOWN_FIELD = b"\xc2\x3e"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_message_larger_than_the_object_store_arrives(
    config: WorkerConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray puts it on disk. The cluster then ends without a complaint."""
    cluster = RayCluster(ExecutorSettings(kind="ray", object_store_bytes=STORE_BYTES))
    try:
        async with started(RayExecutor(config, cluster=cluster)) as driver:
            run = await Run(driver).trained()
            for _ in range(2):
                item = driver.item(run.backward())
                payload = item.payload + UNKNOWN_FIELD + varint(PAYLOAD_BYTES) + bytes(PAYLOAD_BYTES)
                outcome = await driver.run_items([replace(item, payload=payload)])
                assert [one.failure for one in outcome.outcomes] == [None]
            assert not driver.deaths
    finally:
        await cluster.stop()
    said = capfd.readouterr().err
    assert "Ray cluster ready" in said
    assert "Z error " not in said


def varint(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])
