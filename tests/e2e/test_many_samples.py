"""Many futures of one client at once, abandoned ones, and results of many megabytes: a real server and the SDK."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from functools import partial

import numpy as np
import psutil
import pytest
import tinker
from e2e_support import MODEL, ServerProcess, new_key
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

# The SDK sends at most so many samples at once (_sample_dispatch_semaphore, 0.38); each may leave a connection behind.
SDK_SUBMISSIONS = 400
SUBMIT_AT_ONCE = 50
# Heartbeats, the poller, retrievals, configuration, and this test's own.
OTHER_CONNECTIONS = 100
PROMPT = types.ModelInput.from_ints(list(range(20, 36)))


def count(server: ServerProcess, route: str, status: str) -> int:
    """Answers so far."""
    with server.http() as http:
        text = http.get(f"{server.url}/metrics").text
    found = re.search(rf'treadle_http_requests_total{{route="{route}",status="{status}"}} (\S+)', text)
    return 0 if found is None else int(float(found.group(1)))


def wait_until(is_so: Callable[[], bool], *, timeout_s: float = 60.0, pause_s: float = 0.1) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(pause_s)


def process_of(server: ServerProcess) -> psutil.Process:
    assert server.process is not None
    return psutil.Process(server.process.pid)


def num_connections(server: ServerProcess) -> int:
    """Connections to the server's port that are open on its side."""
    open_now = process_of(server).net_connections(kind="tcp")
    return sum(found.status == psutil.CONN_ESTABLISHED and found.laddr.port == server.port for found in open_now)


@pytest.fixture(scope="module")
def many_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for this file, whose counts no other test moves."""
    with ServerProcess(tmp_path_factory.mktemp("data")) as process:
        yield process


@contextmanager
def beating(server: ServerProcess) -> Iterator[list[float]]:
    """Seconds that the server took for each of a row of small requests, sent until the block ends."""
    seconds: list[float] = []
    stopped = threading.Event()

    def beat() -> None:
        with server.http() as http:
            while not stopped.wait(0.02):
                started_at = time.monotonic()
                http.get("healthz").raise_for_status()
                seconds.append(time.monotonic() - started_at)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield seconds
    finally:
        stopped.set()
        thread.join()


def many_samples(server: ServerProcess, num_samples: int, *, max_tokens: int) -> None:
    """So many samples of one client at once, sent a few at a time so that submitting leaves few connections behind."""
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    rss_before = process_of(server).memory_info().rss
    admitted, held, fetched = (
        count(server, f"/api/v1/{route}", status)
        for route, status in (("asample", "200"), ("retrieve_future", "408"), ("retrieve_future", "200"))
    )
    params = [types.SamplingParams(max_tokens=max_tokens, stop=[], seed=seed) for seed in range(num_samples)]
    futures: list[Future[types.SampleResponse]] = []

    def are_admitted(wanted: int) -> bool:
        return count(server, "/api/v1/asample", "200") == wanted

    for start in range(0, num_samples, SUBMIT_AT_ONCE):
        futures += [
            sampler.sample(prompt=PROMPT, num_samples=1, sampling_params=each).future()
            for each in params[start : start + SUBMIT_AT_ONCE]
        ]
        wait_until(partial(are_admitted, admitted + len(futures)), pause_s=0.01)
    seen: list[tuple[int, int]] = []
    while (num_waiting := sum(not future.done() for future in futures)) > 0:
        seen.append((num_waiting, num_connections(server)))
        time.sleep(0.1)
    responses = [future.result(timeout=1) for future in futures]

    assert [len(response.sequences[0].tokens) for response in responses] == [max_tokens] * num_samples
    # Draws of different seeds differ: nobody got somebody else's answer.
    assert len({tuple(response.sequences[0].tokens) for response in responses}) > 0.95 * num_samples
    again = sampler.sample(prompt=PROMPT, num_samples=1, sampling_params=params[7]).result(timeout=60)
    assert list(again.sequences[0].tokens) == list(responses[7].sequences[0].tokens)
    # Each was fetched once, when it was there: none waited on a connection of its own.
    assert count(server, "/api/v1/retrieve_future", "408") == held
    assert count(server, "/api/v1/retrieve_future", "200") - fetched == num_samples + 1
    num_waiting, open_then = max(seen)
    grown_mb = (process_of(server).memory_info().rss - rss_before) / 2**20
    print(f"{num_waiting} of {num_samples} waited on {open_then} connections; the server grew by {grown_mb:.0f} MiB")
    assert num_waiting > num_samples / 2, "too few waited for this to show anything"
    assert open_then < num_waiting / 2
    assert max(open_now for _, open_now in seen) <= SDK_SUBMISSIONS + OTHER_CONNECTIONS
    assert grown_mb < 200


def test_samples_that_wait_hold_no_connections(many_server: ServerProcess) -> None:
    many_samples(many_server, 300, max_tokens=256)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_samples_of_one_client(many_server: ServerProcess) -> None:
    many_samples(many_server, 2_000, max_tokens=64)


def test_samples_that_nobody_waits_for_any_more_free_the_sampler(many_server: ServerProcess) -> None:
    """Long samples are abandoned through the SDK; it tells the server, whose sampler ends them at once."""
    sampler = many_server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    long = types.SamplingParams(max_tokens=2_000, stop=[])
    short = types.SamplingParams(max_tokens=2, stop=[])
    sampler.sample(prompt=PROMPT, num_samples=1, sampling_params=short).result(timeout=60)
    num_abandoned = 4
    admitted, cancelled = (count(many_server, f"/api/v1/{route}", "200") for route in ("asample", "cancel_future"))

    async def abandon() -> None:
        waiting = [asyncio.ensure_future(sampler.sample(PROMPT, 32, long).result_async()) for _ in range(num_abandoned)]
        now_admitted = partial(count, many_server, "/api/v1/asample", "200")
        await asyncio.to_thread(wait_until, lambda: now_admitted() - admitted == num_abandoned)
        for task in waiting:
            task.cancel()
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, asyncio.CancelledError | CancelledError), answer

    asyncio.run(abandon())
    wait_until(lambda: count(many_server, "/api/v1/cancel_future", "200") - cancelled == num_abandoned)
    wait_until(lambda: queued_samples(many_server) == 0, timeout_s=10)
    sampler.sample(prompt=PROMPT, num_samples=1, sampling_params=short).result(timeout=60)


def queued_samples(server: ServerProcess) -> int:
    with server.http() as http:
        text = http.get(f"{server.url}/metrics").text
    found = re.findall(r'treadle_queued_ops{[^}]*work="sampling"[^}]*} (\S+)', text)
    assert found, "the metric is gone"
    return int(sum(map(float, found)))


@pytest.mark.timeout(300)
def test_a_result_of_fifty_megabytes_comes_through(many_server: ServerProcess) -> None:
    """Top-k tables of long samples: fetched by the SDK, while the server goes on answering others."""
    num_samples, num_tokens, k = 128, 400, 128
    sampler = many_server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    with beating(many_server) as seconds:
        response = sampler.sample(
            prompt=PROMPT,
            num_samples=num_samples,
            sampling_params=types.SamplingParams(max_tokens=num_tokens, stop=[]),
            topk_sample_logprobs=k,
        ).result(timeout=240)
    assert [len(sequence.tokens) for sequence in response.sequences] == [num_tokens] * num_samples
    table = response.sequences[-1].topk_logprobs
    assert table is not None
    print(f"longest answers beside 50 MB, ms: {[round(value * 1e3) for value in sorted(seconds)[-5:]]}")
    assert num_samples * num_tokens * k * 8 >= 50 * 2**20
    # An answer that takes httpx's 5 s, or is none, fails the thread that asks; how long they took is a benchmark's.
    assert len(seconds) > 10


def test_the_sdk_asks_for_the_size_of_a_large_pass_first(many_server: ServerProcess) -> None:
    """Two datums of 100 targets per position answer 1.5 MB, which the SDK counts before it fetches them."""
    key = new_key()
    client = many_server.training_client(key)
    tokens = np.arange(1_900) % 900 + 10
    targets = (tokens[:, None] + np.arange(100)) % 1_200
    wide = types.Datum(
        model_input=types.ModelInput.from_ints(tokens.tolist()),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(targets),
            "weights": tinker.TensorData.from_numpy(np.full(targets.shape, 1 / 100, np.float32)),
        },
    )
    before = count(many_server, "/api/v1/retrieve_future", "200")
    chunks_before = count(many_server, "/api/v1/forward_backward", "200")
    output = client.forward([wide, wide], "cross_entropy").result(timeout=110)
    assert [fields["logprobs"].to_numpy().shape for fields in output.loss_fn_outputs] == [targets.shape] * 2
    # One answer with the size, and one with the result.
    assert count(many_server, "/api/v1/forward_backward", "200") - chunks_before == 1
    assert count(many_server, "/api/v1/retrieve_future", "200") - before == 2
