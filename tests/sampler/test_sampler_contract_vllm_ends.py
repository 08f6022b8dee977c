"""How vLLM's processes end: whatever is killed, the executor says so once, and none of them is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sampler_contract_subject import BundledSubject, worker_config

from treadle.errors import ConfigError
from treadle.executor.vllm import VllmExecutor
from treadle.executor.vllm_processes import members
from treadle.sampler.vllm_options import VllmOptions
from treadle.testing.vllm_environment import NOT_FOUND, find_vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = VllmOptions(max_adapters=2, cpu_cache_bytes=64 * 2**20)
GONE_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def python() -> Path:
    found = find_vllm_python()
    if found is None:
        pytest.skip(NOT_FOUND)
    return found


@pytest.fixture
def subject(tmp_path: Path) -> BundledSubject:
    return BundledSubject(tmp_path)


def executor_of(subject: BundledSubject, python: Path) -> VllmExecutor:
    return VllmExecutor(worker_config(subject, max_running=4), options=OPTIONS, python=python)


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def assert_nothing_left(group: int, directory: Path | None) -> None:
    assert list(members(group, with_trackers=True)) == []
    assert directory is not None
    assert not directory.exists()


@pytest.mark.parametrize("victim", [b"vllm_child", b"EngineCore", b"VLLM::Worker"])
async def test_any_of_its_processes_takes_the_others_along(
    subject: BundledSubject, python: Path, victim: bytes
) -> None:
    deaths: asyncio.Queue[str] = asyncio.Queue()
    executor = executor_of(subject, python)
    try:
        await executor.start(on_samples=lambda _: None, on_death=deaths.put_nowait)
        group = executor.pid
        assert group is not None
        (pid,) = [pid for pid in members(group) if victim in command_of(pid)]
        os.kill(pid, signal.SIGKILL)
        reason = await asyncio.wait_for(deaths.get(), 60)
        assert "status" in reason
        assert_nothing_left(group, executor.directory)
    finally:
        await executor.stop()
    assert deaths.empty()


async def test_a_stop_leaves_nothing(subject: BundledSubject, python: Path) -> None:
    executor = executor_of(subject, python)
    await executor.start(on_samples=lambda _: None, on_death=lambda reason: pytest.fail(reason))
    group = executor.pid
    assert group is not None
    await executor.stop()
    await executor.stop()
    assert_nothing_left(group, executor.directory)


def test_it_ends_with_its_server(tmp_path: Path, python: Path) -> None:
    """The server is killed: the child sees its pipe end, and takes the engine along."""
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from sampler_contract_subject import BundledSubject, worker_config
from treadle.executor.vllm import VllmExecutor
from treadle.sampler.vllm_options import VllmOptions
async def main():
    config = worker_config(BundledSubject(Path({str(tmp_path)!r})), max_running=4)
    options = VllmOptions(max_adapters=2, cpu_cache_bytes=64 * 2**20)
    executor = VllmExecutor(config, options=options, python=Path({str(python)!r}))
    await executor.start(on_samples=print, on_death=print)
    print("started", executor.pid, executor.directory, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("started "))
        group, directory = int(line.split()[1]), Path(line.split()[2])
        assert directory.is_dir()
        assert len(list(members(group))) >= 2
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    deadline = time.monotonic() + GONE_WITHIN_S
    while list(members(group, with_trackers=True)):
        assert time.monotonic() < deadline, "vLLM outlives its server"
        time.sleep(0.1)
    assert not directory.exists()


async def test_an_environment_without_vllm_is_the_operators_to_mend(subject: BundledSubject) -> None:
    executor = executor_of(subject, Path(sys.executable))
    with pytest.raises(ConfigError, match="has no vllm"):
        await executor.start(on_samples=lambda _: None, on_death=lambda _: None)
    await executor.stop()


async def test_a_python_that_is_not_there_is_the_operators_to_mend(subject: BundledSubject, tmp_path: Path) -> None:
    executor = executor_of(subject, tmp_path / "no" / "python")
    with pytest.raises(ConfigError, match=r"sampler\.vllm\.python"):
        await executor.start(on_samples=lambda _: None, on_death=lambda _: None)
    await executor.stop()
