"""What the Tinker documentation promises, with the official SDK against a real server process."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e_support import MODEL, ServerProcess, batch, datum, failure_of, logprobs_of, new_key, new_run, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")


def test_training_lowers_the_loss_and_sampling_reproduces_what_was_trained(server: ServerProcess) -> None:
    client = server.training_client(rank=16)
    tokenizer = client.get_tokenizer()
    tokens = tokenizer.encode("The loom says: clack, clatter, cloth.\n")
    data = [datum(tokens)]
    losses = [train_step(client, data, lr=5e-3) for _ in range(25)]
    assert losses[-1] < 0.05 * losses[0]
    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    prompt = types.ModelInput.from_ints(tokens[:6])
    params = types.SamplingParams(max_tokens=len(tokens) - 6, temperature=0.0)
    response = sampler.sample(prompt=prompt, sampling_params=params, num_samples=2).result(timeout=60)
    assert [list(sequence.tokens) for sequence in response.sequences] == [tokens[6:]] * 2


def test_sampling_logprobs_equal_the_trainers(server: ServerProcess) -> None:
    client = server.training_client()
    data = batch(1, 24)
    train_step(client, data, lr=3e-3)
    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    tokens = data[0].model_input.to_ints()
    sampled = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result(timeout=60)
    trained = logprobs_of(client.forward([datum(tokens)], "cross_entropy").result(timeout=60))[0]
    assert sampled[0] is None
    assert sampled[1:] == pytest.approx(trained, abs=1e-3)


def test_topk_prompt_logprobs_hold_the_best_tokens_first(server: ServerProcess) -> None:
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    prompt = types.ModelInput.from_ints([20, 30, 40, 50, 60])
    response = sampler.sample(
        prompt=prompt,
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=5,
    ).result(timeout=60)
    assert response.prompt_logprobs is not None
    assert response.topk_prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs[0] is None
    for position in range(1, 5):
        row = response.topk_prompt_logprobs[position]
        assert row is not None
        values = [logprob for _, logprob in row]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        own = dict(row).get(prompt.to_ints()[position])
        assert own is None or own == pytest.approx(response.prompt_logprobs[position], abs=1e-5)


def test_saved_state_restores_to_the_same_loss_and_the_same_future(server: ServerProcess) -> None:
    key = new_key()
    service = server.service(key)
    client = new_run(service)
    data = batch(2, 16)
    for _ in range(3):
        train_step(client, data)
    path = client.save_state("three").result(timeout=60).path
    restored = service.create_training_client_from_state_with_optimizer(path).result(timeout=60)
    before = client.forward(data, "cross_entropy").result(timeout=60)
    after = restored.forward(data, "cross_entropy").result(timeout=60)
    assert logprobs_of(after) == logprobs_of(before)
    assert train_step(client, data) == train_step(restored, data)
    assert train_step(client, data) == train_step(restored, data)


def test_weights_only_load_starts_the_optimizer_afresh(server: ServerProcess) -> None:
    service = server.service()
    client = new_run(service)
    data = batch(2, 16)
    for _ in range(3):
        train_step(client, data)
    path = client.save_state("three").result(timeout=60).path
    fresh = service.create_training_client_from_state(path).result(timeout=60)
    assert fresh.forward(data, "cross_entropy").result(timeout=60).metrics == (
        client.forward(data, "cross_entropy").result(timeout=60).metrics
    )
    assert failure_of(fresh.optim_step(types.AdamParams())) is not None
    train_step(fresh, data)
    train_step(client, data)
    # Moments differ, so after one more step the two runs have parted.
    assert train_step(fresh, data) != train_step(client, data)


def test_named_sampler_weights_and_a_sampling_client_by_path(server: ServerProcess) -> None:
    service = server.service()
    client = new_run(service)
    train_step(client, batch())
    path = client.save_weights_for_sampler("first").result(timeout=60).path
    assert path.endswith("/sampler_weights/first")
    sampler = service.create_sampling_client(model_path=path).result(timeout=60)
    params = types.SamplingParams(max_tokens=8, seed=7)
    prompt = types.ModelInput.from_ints([11, 12, 13])
    first = sampler.sample(prompt=prompt, sampling_params=params, num_samples=2).result(timeout=60)
    again = sampler.sample(prompt=prompt, sampling_params=params, num_samples=2).result(timeout=60)
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    assert first.sequences[0].tokens != first.sequences[1].tokens
    for sequence in first.sequences:
        assert sequence.logprobs is not None
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert all(math.isfinite(value) and value <= 0 for value in sequence.logprobs)


def test_a_snapshot_does_not_follow_later_training(server: ServerProcess) -> None:
    client = server.training_client()
    data = batch(1, 12)
    train_step(client, data)
    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    prompt = data[0].model_input
    before = sampler.compute_logprobs(prompt).result(timeout=60)
    train_step(client, data, lr=1e-2)
    assert sampler.compute_logprobs(prompt).result(timeout=60) == before


def test_custom_loss_runs_on_the_client(server: ServerProcess) -> None:
    client = server.training_client()

    def squared(data, logprobs):  # type: ignore[no-untyped-def]
        loss = sum((values**2).sum() for values in logprobs)
        return loss, {"squared": float(loss.detach())}

    output = client.forward_backward_custom(batch(), squared).result(timeout=60)
    assert output.metrics["squared"] == pytest.approx(output.metrics["loss:sum"], rel=1e-5)
    client.optim_step(types.AdamParams()).result(timeout=60)


def test_many_chunks_of_one_call_arrive_out_of_order_and_add_up(server: ServerProcess) -> None:
    """1,030 datums are two requests, of which the SDK sends the first one last."""
    client = server.training_client()
    data = batch(1030, 4)
    output = client.forward_backward(data, "cross_entropy").result(timeout=100)
    assert len(output.loss_fn_outputs) == 1030
    metrics = client.optim_step(types.AdamParams()).result(timeout=60).metrics
    assert metrics is not None
    assert metrics["num_steps"] == 1


def test_rl_losses_train_on_the_samplers_logprobs(server: ServerProcess) -> None:
    client = server.training_client()
    sampler = client.save_weights_and_get_sampling_client().result(timeout=60)
    prompt = [15, 16, 17]
    response = sampler.sample(
        prompt=types.ModelInput.from_ints(prompt),
        num_samples=4,
        sampling_params=types.SamplingParams(max_tokens=6, seed=3),
    ).result(timeout=60)
    for loss_fn in ("importance_sampling", "ppo"):
        data = []
        for index, sequence in enumerate(response.sequences):
            tokens = prompt + list(sequence.tokens)
            padding = [0.0] * (len(prompt) - 1)
            advantage = 1.0 if index % 2 else -1.0
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": tokens[1:],
                        "logprobs": padding + list(sequence.logprobs or []),
                        "advantages": padding + [advantage] * len(sequence.tokens),
                    },
                )
            )
        output = client.forward_backward(data, loss_fn).result(timeout=60)
        # On-policy the ratio is 1, so the loss is minus the sum of the advantages.
        expected = -sum(sum(item.loss_fn_inputs["advantages"].tolist()) for item in data)
        assert output.metrics["loss:sum"] == pytest.approx(expected, abs=1e-2)
    client.optim_step(types.AdamParams()).result(timeout=60)


def test_a_short_sample_overtakes_a_long_one(server: ServerProcess) -> None:
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    prompt = types.ModelInput.from_ints([21, 22, 23])
    order: list[str] = []
    long = sampler.sample(prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=512, stop=[]))
    short = sampler.sample(prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=4, stop=[]))
    with ThreadPoolExecutor(2) as threads:
        waits = [
            threads.submit(lambda: (long.result(timeout=100), order.append("long"))),
            threads.submit(lambda: (short.result(timeout=100), order.append("short"))),
        ]
        for wait in waits:
            wait.result()
    assert order == ["short", "long"]


def test_tenants_train_side_by_side_without_feeling_each_other(server: ServerProcess) -> None:
    """Each of four concurrent tenants sees the losses that it would have seen alone, to the bit."""

    def losses(index: int) -> list[float]:
        client = server.training_client(rank=4 * (index + 1), seed=index)
        return [train_step(client, batch(2, 10 + 3 * index, seed=index)) for _ in range(4)]

    alone = [losses(index) for index in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(losses, range(4)))
    assert together == alone


def test_runs_and_checkpoints_are_listed_for_their_owner_only(server: ServerProcess) -> None:
    key = new_key()
    service = server.service(key)
    client = new_run(service, user_metadata={"purpose": "test"})
    train_step(client, batch())
    path = client.save_state("one").result(timeout=60).path
    rest = server.rest_client(key)
    runs = rest.list_training_runs().result(timeout=60)
    assert [run.training_run_id for run in runs.training_runs] == [client.model_id]
    assert runs.training_runs[0].user_metadata == {"purpose": "test"}
    checkpoints = rest.list_checkpoints(client.model_id).result(timeout=60).checkpoints
    assert [checkpoint.tinker_path for checkpoint in checkpoints] == [path]
    assert checkpoints[0].size_bytes
    info = rest.get_weights_info_by_tinker_path(path).result(timeout=60)
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)
    stranger = server.rest_client(new_key())
    assert stranger.list_training_runs().result(timeout=60).training_runs == []


def test_capabilities_name_the_model_and_its_context(server: ServerProcess) -> None:
    capabilities = server.rest_client(new_key()).get_server_capabilities().result(timeout=60)
    names = {model.model_name: model for model in capabilities.supported_models}
    assert names[MODEL].max_context_length == 2048
