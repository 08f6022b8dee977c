"""The official SDK against a gateway on a loopback port, with a clerk in place of scheduler and workers.

The clerk answers every request at once with numbers that mean nothing; what is tested is the wire.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tinker
import uvicorn
from gateway_support import POOL, Harness, facts, open_tenant
from tinker import types

from treadle.blobs import LocalBlobs
from treadle.domain.ids import BlobKey, PoolName
from treadle.domain.limits import JWT_LIFE_S
from treadle.domain.ops import (
    CreateModelOp,
    LoadWeightsOp,
    Op,
    OptimStepOp,
    PassOp,
    SampleOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    UnloadModelOp,
)
from treadle.domain.outcome import EncodedResult, PassResult, SampledSequence, SampleResult, StepResult
from treadle.domain.records import FinishedCycle, FinishedRequest, RequestRecord, SamplingSessionRecord
from treadle.domain.states import RequestState, StopReason
from treadle.gateway import GatewaySettings, PoolView, create_app
from treadle.store import Store
from treadle.testing.clock import ManualClock
from treadle.wire import results

KEY = "tml-sdk"
SETTINGS = GatewaySettings(is_loopback=True, hold_s=5)


class Clerk:
    """Finishes whatever is queued, in the order of its line."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._store = harness.store
        self._work = asyncio.Event()
        self._store.events.on_enqueued(lambda _pool, _kind: self._work.set())

    async def run(self) -> None:
        lease = await self._harness.lease()
        while True:
            await self._work.wait()
            self._work.clear()
            for line in await self._store.requests.heads(PoolName(POOL)):
                for row in line:
                    if row.state is RequestState.QUEUED:
                        await self._store.cycles.finish(lease, await self._outcome(row))
            for row in await self._store.requests.queued_samples(PoolName(POOL)):
                result = _result_of(await self._harness.op(row.request_id))
                await self._store.cycles.finish_samples(lease, [FinishedRequest(row.request_id, result=result)])

    async def _outcome(self, row: RequestRecord) -> FinishedCycle:
        op = await self._harness.op(row.request_id)
        finished = FinishedRequest(row.request_id, result=_result_of(op))
        if not isinstance(op, SaveForSamplerOp) or op.sampling_session_id is None:
            return FinishedCycle(finished=(finished,))
        model = await self._store.models.get(op.model_id)
        assert model is not None
        session = SamplingSessionRecord(
            sampling_session_id=op.sampling_session_id,
            session_id=model.session_id,
            tenant_id=model.tenant_id,
            pool=model.pool,
            base_model=model.base_model,
            created_at=0.0,
            blob_key=BlobKey("samplers/1"),
            model_id=model.model_id,
        )
        return FinishedCycle(finished=(finished,), sampling_sessions=(session,))


def _result_of(op: Op) -> EncodedResult:
    match op:
        case CreateModelOp():
            return results.create_model_result(op.model_id)
        case LoadWeightsOp():
            return results.load_weights_result(op.path, op.model_id)
        case PassOp():
            logprobs = tuple(np.full(datum.num_tokens, -0.5, np.float32) for datum in op.datums)
            num_tokens = sum(datum.num_tokens for datum in op.datums)
            return results.encode_pass_result(PassResult(logprobs, {"loss:sum": 0.5 * num_tokens}))
        case OptimStepOp():
            return results.encode_step_result(StepResult({"learning_rate": op.adam.learning_rate}))
        case SaveWeightsOp():
            return results.saved_weights_result(f"tinker://{op.model_id}/weights/{op.name}")
        case SaveForSamplerOp():
            if op.sampling_session_id is not None:
                return results.saved_for_sampler_result(sampling_session_id=op.sampling_session_id)
            return results.saved_for_sampler_result(path=f"tinker://{op.model_id}/sampler_weights/{op.name}")
        case UnloadModelOp():
            return results.unload_result(op.model_id)
        case SampleOp():
            tokens = np.arange(op.params.max_tokens or 1, dtype=np.int32)
            sequence = SampledSequence(tokens, np.full(len(tokens), -1.0, np.float32), StopReason.LENGTH)
            prompt_logprobs = np.full(len(op.prompt), -2.0, np.float32) if op.wants_prompt_logprobs else None
            if prompt_logprobs is not None:
                prompt_logprobs[0] = np.nan
            return results.encode_sample_result(SampleResult((sequence,) * op.num_samples, prompt_logprobs))


async def _serve(
    directory: Path,
    started: threading.Event,
    server_box: list[uvicorn.Server],
    settings: GatewaySettings,
    clock: ManualClock,
) -> None:
    store = await Store.open(f"sqlite:///{directory}/treadle.db", clock=clock.now)
    harness = Harness(
        store=store,
        blobs=LocalBlobs(directory / "blobs"),
        clock=clock,
        settings=settings,
        pools=[PoolView(PoolName(POOL), facts=facts(), is_ready=True)],
    )
    config = uvicorn.Config(create_app(harness.deps()), port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    server_box.append(server)
    clerk = asyncio.create_task(Clerk(harness).run())
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    started.set()
    await serving
    clerk.cancel()
    await asyncio.gather(clerk, return_exceptions=True)
    await store.close()


@contextmanager
def _served(directory: Path, settings: GatewaySettings, clock: ManualClock | None = None) -> Iterator[str]:
    """The URL of a gateway on a thread and a loop of its own."""
    started = threading.Event()
    box: list[uvicorn.Server] = []
    # Today's time: the SDK compares the ends of its tokens with its own clock.
    clock = clock or ManualClock(time.time())
    thread = threading.Thread(target=lambda: asyncio.run(_serve(directory, started, box, settings, clock)), daemon=True)
    thread.start()
    assert started.wait(30)
    yield f"http://127.0.0.1:{box[0].servers[0].sockets[0].getsockname()[1]}"
    box[0].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _served(tmp_path_factory.mktemp("sdk"), SETTINGS) as url:
        yield url


@pytest.fixture(scope="module")
def service(base_url: str) -> Iterator[tinker.ServiceClient]:
    service = tinker.ServiceClient(base_url=base_url, api_key=KEY)
    yield service
    service.close("success").result()


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=POOL, rank=8).result()


def sdk_datum(num_tokens: int = 6, first: int = 1) -> types.Datum:
    tokens = [first, *range(2, num_tokens + 1)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": tokens, "weights": [1.0] * num_tokens},
    )


def test_train_step_save_and_sample(training: tinker.TrainingClient) -> None:
    passed = training.forward_backward([sdk_datum(), sdk_datum(4)], "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=0.5))

    output = passed.result()
    assert [len(record["logprobs"].data) for record in output.loss_fn_outputs] == [6, 4]
    assert output.metrics["loss:sum"] == pytest.approx(5.0)
    assert stepped.result().metrics == {"learning_rate": 0.5}

    assert training.save_state("0001").result().path == f"tinker://{training.model_id}/weights/0001"
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=3)
    answer = sampler.sample(types.ModelInput.from_ints([1, 2]), num_samples=2, sampling_params=params).result()
    assert [sequence.tokens for sequence in answer.sequences] == [[0, 1, 2]] * 2
    assert sampler.compute_logprobs(types.ModelInput.from_ints([1, 2, 3])).result() == [None, -2.0, -2.0]


def test_a_call_in_many_chunks_comes_back_in_order(training: tinker.TrainingClient) -> None:
    data = [sdk_datum(2 + index % 3) for index in range(2_500)]

    output = training.forward_backward(data, "cross_entropy").result()

    assert [len(record["logprobs"].data) for record in output.loss_fn_outputs] == [2 + i % 3 for i in range(2_500)]


def test_a_bad_request_is_the_users_error_and_the_run_goes_on(training: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="vocabulary"):
        training.forward_backward([sdk_datum(first=10_000)], "cross_entropy").result()

    assert training.forward_backward([sdk_datum()], "cross_entropy").result().metrics["loss:sum"] == pytest.approx(3.0)


def test_an_unknown_base_model_is_refused_by_name(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="fake/base"):
        service.create_lora_training_client(base_model="no/such", rank=8).result()


def test_a_client_for_a_base_model_samples_through_the_poller(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=POOL).result()
    params = types.SamplingParams(max_tokens=2)
    futures = [
        sampler.sample(types.ModelInput.from_ints([1]), num_samples=1, sampling_params=params) for _ in range(40)
    ]

    assert all(future.result().sequences[0].tokens == [0, 1] for future in futures)


def test_a_bad_sample_is_the_users_error(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=POOL).result()
    params = types.SamplingParams(max_tokens=2)
    with pytest.raises(tinker.RequestFailedError, match="vocabulary"):
        sampler.sample(types.ModelInput.from_ints([10_000]), num_samples=1, sampling_params=params).result()


def test_the_rest_client_lists_what_was_made(base_url: str, training: tinker.TrainingClient) -> None:
    rest = tinker.RestClient(base_url=base_url, api_key=KEY)

    runs = rest.list_training_runs().result().training_runs
    assert training.model_id in {run.training_run_id for run in runs}
    assert rest.get_training_run(training.model_id).result().lora_rank == 8
    assert rest.list_user_checkpoints().result().checkpoints == []
    [model] = rest.get_server_capabilities().result().supported_models
    assert model.model_name == POOL


def test_a_client_that_floods_is_slowed_down_and_loses_nothing(tmp_path: Path) -> None:
    """Far more than may wait, pipelined: calls in many chunks, steps and samples all come back, in order."""
    narrow = replace(
        SETTINGS,
        hold_s=1,
        max_datums_per_request=2,
        max_queued_tokens_per_tenant=100,
        max_queued_samples_per_tenant=4,
    )
    with _served(tmp_path, narrow) as url:
        service = tinker.ServiceClient(base_url=url, api_key=KEY)
        training = service.create_lora_training_client(base_model=POOL, rank=8).result()
        futures = []
        for _ in range(4):
            # 12 chunks of 12 tokens: more than the limit on its own.
            futures.append(training.forward_backward([sdk_datum() for _ in range(24)], "cross_entropy"))
            futures.append(training.optim_step(types.AdamParams(learning_rate=0.5)))
        sampler = service.create_sampling_client(base_model=POOL).result()
        params = types.SamplingParams(max_tokens=2)
        samples = [
            sampler.sample(types.ModelInput.from_ints([1]), num_samples=1, sampling_params=params) for _ in range(12)
        ]
        for passed, stepped in zip(futures[::2], futures[1::2], strict=True):
            assert passed.result(120).metrics["loss:sum"] == pytest.approx(72.0)
            assert stepped.result(120).metrics == {"learning_rate": 0.5}
        assert all(sample.result(120).sequences[0].tokens == [0, 1] for sample in samples)
        service.close("success").result()


def test_the_sdk_works_below_a_prefix(tmp_path: Path) -> None:
    with _served(tmp_path, replace(SETTINGS, root_path="/twinkle")) as url:
        service = tinker.ServiceClient(base_url=f"{url}/twinkle", api_key="tml-prefixed")
        training = service.create_lora_training_client(base_model=POOL, rank=8).result()
        path = training.save_state("one").result().path
        assert path == f"tinker://{training.model_id}/weights/one"
        rest = tinker.RestClient(base_url=f"{url}/twinkle", api_key="tml-prefixed")
        runs = rest.list_training_runs().result().training_runs
        assert [run.training_run_id for run in runs] == [training.model_id]
        service.close("success").result()
        with pytest.raises(tinker.NotFoundError):
            tinker.RestClient(base_url=url, api_key="tml-prefixed").list_training_runs().result()


def test_the_sdk_gets_a_new_token_when_the_server_takes_the_old_one_no_longer(tmp_path: Path) -> None:
    """By the server's clock the token is over, by the SDK's it is not: only the answer can tell it."""
    clock = ManualClock(time.time())
    with _served(tmp_path, SETTINGS, clock) as url:
        rest = tinker.RestClient(base_url=url, api_key="tml-patient")
        assert rest.list_sessions().result().sessions == []
        first = rest.whoami().result()
        clock.advance(JWT_LIFE_S + 1)
        assert rest.list_sessions().result().sessions == []
        assert rest.whoami().result() == first
        assert first.user_urn == f"tml:{open_tenant('tml-patient')}"
