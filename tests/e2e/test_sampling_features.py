"""Every sampling feature of the SDK against a real server, in numbers of plain transformers on the same weights."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from e2e_support import MODEL, ServerProcess, batch, failure_of, new_key, new_run, train_step
from tinker import types
from transformers import AutoModelForCausalLM

import treadle

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

# float32 against float32: other kernels, another order of sums.
TOLERANCE = 2e-5
PROMPT = np.random.default_rng(7).integers(10, 900, size=150).tolist()
GREEDY = types.SamplingParams(max_tokens=12, temperature=0.0, stop=[])
ONE = types.SamplingParams(max_tokens=1, seed=3)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The bundled model in plain transformers."""
    directory = Path(treadle.__file__).parent / "bundled" / "tiny"
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def base(server: ServerProcess) -> tinker.SamplingClient:
    """A sampling client of the base model."""
    return sampler_of(server.service(), base_model=MODEL)


def sampler_of(service: tinker.ServiceClient, **weights: str) -> tinker.SamplingClient:
    return service.create_sampling_client(**weights).result(timeout=60)


def logprobs_of(reference: Any, tokens: list[int]) -> torch.Tensor:
    """log p(. | tokens[: i + 1]) for each i, float32 [T, V]."""
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor([tokens])).logits[0].float(), dim=-1)


def sample(
    client: tinker.SamplingClient,
    prompt: list[int] | None = None,
    params: types.SamplingParams = ONE,
    num_samples: int = 1,
    **options: Any,
) -> types.SampleResponse:
    tokens = types.ModelInput.from_ints(PROMPT if prompt is None else prompt)
    return client.sample(tokens, num_samples, params, **options).result(timeout=60)


def test_topk_sample_logprobs(base: tinker.SamplingClient, reference: Any) -> None:
    response = sample(base, PROMPT[:20], GREEDY, num_samples=2, topk_sample_logprobs=4)
    for sequence in response.sequences:
        expected = logprobs_of(reference, PROMPT[:20] + sequence.tokens)[19:-1].topk(4, dim=-1)
        assert sequence.topk_logprobs_np is not None
        assert sequence.topk_logprobs_np.token_ids.tolist() == expected.indices.tolist()
        np.testing.assert_allclose(sequence.topk_logprobs_np.logprobs, expected.values.numpy(), atol=TOLERANCE)
        assert sequence.topk_logprobs is not None
        assert [row[0][0] for row in sequence.topk_logprobs if row] == sequence.tokens, "greedy takes the first"


@pytest.mark.parametrize("is_sparse", [False, True])
def test_target_prompt_logprobs(base: tinker.SamplingClient, reference: Any, is_sparse: bool) -> None:
    ids = torch.full((len(PROMPT) - 1, 5), -1, dtype=torch.int64)
    for row, column, token in [(0, 4, 17), (3, 0, 2), (70, 1, 900), (148, 0, 5), (148, 4, 6)]:
        ids[row, column] = token
    make = types.TensorData.from_torch_sparse if is_sparse else types.TensorData.from_torch
    target = make(ids, pad_value=-1) if is_sparse else make(ids)
    answer = sample(base, target_prompt_logprobs=target).target_prompt_logprobs
    assert answer is not None
    assert (answer.sparse_crow_indices is not None) == is_sparse
    expected = torch.where(ids < 0, 0.0, logprobs_of(reference, PROMPT)[:-1].gather(1, ids.clamp(min=0)))
    np.testing.assert_allclose(answer.to_torch().to_dense().numpy(), expected.numpy(), atol=TOLERANCE)


def test_prompt_alt_tokens(base: tinker.SamplingClient, reference: Any) -> None:
    first, again = (sample(base, prompt_alt_tokens_k=3).prompt_alt_tokens for _ in range(2))
    other = sample(base, params=types.SamplingParams(max_tokens=1, seed=4), prompt_alt_tokens_k=3).prompt_alt_tokens
    assert first is not None
    assert again is not None
    assert other is not None
    tokens = first.tokens.to_torch()
    assert tokens.shape == (len(PROMPT) - 1, 3)
    expected = logprobs_of(reference, PROMPT)[:-1].gather(1, tokens)
    np.testing.assert_allclose(first.logprobs.to_torch().numpy(), expected.numpy(), atol=TOLERANCE)
    assert torch.equal(again.tokens.to_torch(), tokens)
    assert not torch.equal(other.tokens.to_torch(), tokens)


def test_prompt_logprobs_and_their_last_n(base: tinker.SamplingClient, reference: Any) -> None:
    model_input = types.ModelInput.from_ints(PROMPT)
    whole = base.compute_logprobs(model_input).result(timeout=60)
    last = base.compute_logprobs(model_input, prompt_logprobs_last_n=9).result(timeout=60)
    assert last == [None] * (len(PROMPT) - 9) + whole[-9:], "the same bits"
    expected = logprobs_of(reference, PROMPT)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    assert whole[0] is None
    np.testing.assert_allclose(np.array(whole[1:], np.float32), expected.numpy(), atol=TOLERANCE)
    options = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 2}
    rows = sample(base, **options).topk_prompt_logprobs
    assert rows is not None
    assert rows[:-2] == [None] * (len(PROMPT) - 2)
    best = logprobs_of(reference, PROMPT)[-3:-1].topk(2, dim=-1).indices.tolist()
    assert [[token for token, _ in row] for row in rows[-2:] if row] == best


def test_what_is_out_of_bounds_is_a_user_error(base: tinker.SamplingClient) -> None:
    ids = types.TensorData.from_torch(torch.full((3, 1), 1, dtype=torch.int64))
    bad: dict[str, dict[str, Any]] = {
        "[149, K] is due": {"target_prompt_logprobs": ids},
        "allowed are 1 to 149": {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 150},
        "prompt_alt_tokens_k": {"prompt_alt_tokens_k": 1_000},
        "topk_sample_logprobs": {"topk_sample_logprobs": 1_000},
    }
    for words, options in bad.items():
        error = failure_of(base.sample(types.ModelInput.from_ints(PROMPT), 1, ONE, **options))
        assert error is not None, words
        assert words in str(error)
        assert "user" in str(error.category)


def test_a_prompt_that_comes_again_is_served_and_the_same(server: ServerProcess) -> None:
    client = sampler_of(server.service(), base_model=MODEL)
    params = types.SamplingParams(max_tokens=20, seed=5, stop=[])
    first, again = (sample(client, params=params, num_samples=2, topk_sample_logprobs=2) for _ in range(2))
    assert (first.prompt_cache_hit_tokens, again.prompt_cache_hit_tokens) == (0, 128)
    for left, right in zip(first.sequences, again.sequences, strict=True):
        assert (left.tokens, left.logprobs, left.topk_logprobs) == (right.tokens, right.logprobs, right.topk_logprobs)
    turn = PROMPT + first.sequences[0].tokens + PROMPT[:60]
    assert sample(client, turn).prompt_cache_hit_tokens == 128
    # Scoring a short end of a long prompt costs about as much as the end.
    scored = sample(client, turn, include_prompt_logprobs=True, prompt_logprobs_last_n=5)
    assert scored.prompt_cache_hit_tokens == 192
    assert sample(client, turn, include_prompt_logprobs=True).prompt_cache_hit_tokens == 0
    # Another tenant learns nothing of it.
    assert sample(sampler_of(server.service(), base_model=MODEL)).prompt_cache_hit_tokens == 0


def test_training_and_sampler_checkpoints_are_sampled_alike(server: ServerProcess) -> None:
    service = server.service(new_key())
    training = new_run(service)
    train_step(training, batch(), lr=2e-2)
    trained = training.save_state("a").result(timeout=60).path
    for_sampling = training.save_weights_for_sampler("b").result(timeout=60).path
    fresh = training.save_weights_and_get_sampling_client().result(timeout=60)
    clients = [
        sampler_of(service, model_path=trained),
        sampler_of(service, model_path=for_sampling),
        sampler_of(service, model_path=trained, base_model=MODEL),
        fresh,
    ]
    answers = [sample(client, PROMPT[:30], GREEDY).sequences[0] for client in clients]
    assert all((a.tokens, a.logprobs) == (answers[0].tokens, answers[0].logprobs) for a in answers)
    base = sample(sampler_of(service, base_model=MODEL), PROMPT[:30], GREEDY).sequences[0]
    assert base.logprobs != answers[0].logprobs, "the training is in the weights"


def test_inflight_clients_follow_the_training(server: ServerProcess) -> None:
    training = server.training_client()

    def logprobs(client: tinker.SamplingClient) -> list[float]:
        found = client.compute_logprobs(types.ModelInput.from_ints(PROMPT[:20])).result(timeout=60)
        return [logprob for logprob in found if logprob is not None]

    def publish(kind: Any) -> tinker.SamplingClient:
        train_step(training, batch(), lr=2e-2)
        return training.save_weights_and_get_sampling_client(kind=kind).result(timeout=60)

    first, frozen = publish("inflight"), publish("snapshot")
    at_first, at_frozen = logprobs(first), logprobs(frozen)
    assert at_first != at_frozen, "a snapshot is not published to inflight clients"
    second = publish("inflight")
    at_second = logprobs(second)
    assert at_second not in (at_first, at_frozen)
    assert logprobs(first) == at_second, "a client that was there before takes the newer weights"
    assert logprobs(frozen) == at_frozen
    # Samples under way while weights are published end with one of the versions, never with an older one.
    seen: list[list[float]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(logprobs(first))

    watcher = threading.Thread(target=watch)
    watcher.start()
    third = publish("inflight")
    at_third = logprobs(third)
    stop.set()
    watcher.join(timeout=60)
    assert logprobs(first) == at_third
    order = [[at_second, at_third].index(one) for one in seen]
    assert order == sorted(order)
