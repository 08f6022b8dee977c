"""stable_reinforce with the official SDK: sample on record, name the sequences, train. Passes without an adapter."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tinker
from e2e_support import ServerProcess, batch, failure_of, logprobs_of, new_key, train_step
from tinker import types
from tinker.types.optimizer import DimuonOptimizerConfig

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

PROMPT = types.ModelInput.from_ints([20, 21, 22, 23, 24])
METRICS = {
    "loss:sum",
    "treadle_objective_tokens:sum",
    "clipped_tokens:sum",
    "importance_weight:sum",
    "kl_to_sampler:sum",
}


def recording_client(client: tinker.TrainingClient, *, on_record: bool = True) -> tinker.SamplingClient:
    return client.save_weights_and_get_sampling_client(record_stability_info=on_record).result(timeout=60)


def draw(
    sampler: tinker.SamplingClient, prompt: types.ModelInput = PROMPT, *, num_samples: int = 3, seed: int = 5
) -> list[types.SampledSequence]:
    params = types.SamplingParams(max_tokens=12, seed=seed, stop=[])
    return list(sampler.sample(prompt, num_samples, params).result(timeout=60).sequences)


def recipe_datum(sequence: types.SampledSequence, advantage: float, *, sequence_id: str = "") -> types.Datum:
    """As the cookbook's rl_loop builds it: prompt targets are 0, and the sampler's logprobs go along."""
    num_before = PROMPT.length - 1
    tokens, logprobs = list(sequence.tokens), list(sequence.logprobs or [])
    id_ = sequence_id or sequence.sequence_id
    assert id_ is not None
    return types.Datum(
        model_input=PROMPT.append(types.EncodedTextChunk(tokens=tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": np.array([0] * num_before + tokens),
            "logprobs": np.array([0.0] * num_before + logprobs, np.float32),
            "advantages": np.array([0.0] * num_before + [advantage] * len(tokens), np.float32),
        },
    ).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=id_, length=PROMPT.length),
            types.SampledProvenanceSpan(sequence_id=id_, length=len(tokens) - 1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=id_, offset=1, length=num_before),
            types.SampledProvenanceSpan(sequence_id=id_, length=len(tokens)),
        ],
    )


def run(client: tinker.TrainingClient, data: list[types.Datum], **config: float) -> types.ForwardBackwardOutput:
    return client.forward_backward(data, "stable_reinforce", config or None).result(timeout=60)  # type: ignore[arg-type]


def test_the_recipe_trains_and_stays_honest_off_policy(server: ServerProcess) -> None:
    client = server.training_client()
    # B is 0 in a fresh run; a policy that differs from the base model shows that its own logprobs are on record.
    train_step(client, batch(2, seed=3), lr=5e-3)
    sequences = draw(recording_client(client))
    advantages = [1.0, -0.5, 0.25]
    data = [recipe_datum(sequence, value) for sequence, value in zip(sequences, advantages, strict=True)]

    on_policy = run(client, data, kl_coeff=0.01)
    assert on_policy.metrics.keys() == METRICS
    assert on_policy.metrics["treadle_objective_tokens:sum"] == 36
    assert on_policy.metrics["clipped_tokens:sum"] == 0
    assert on_policy.metrics["importance_weight:sum"] == pytest.approx(36, abs=1e-3)
    assert 0 <= on_policy.metrics["kl_to_sampler:sum"] < 1e-6
    sampled = [row[PROMPT.length - 1 :] for row in logprobs_of(on_policy)]
    plain = -sum(advantage * sum(row) for advantage, row in zip(advantages, sampled, strict=True))
    assert on_policy.metrics["loss:sum"] == pytest.approx(plain, abs=1e-3)

    client.optim_step(types.AdamParams(learning_rate=1e-3, beta1=0.0)).result(timeout=60)
    off_policy = run(client, data)
    assert off_policy.metrics["kl_to_sampler:sum"] > 1e-2
    assert off_policy.metrics["importance_weight:sum"] != pytest.approx(36, abs=0.1)
    returns = [
        sum(advantage * sum(row[PROMPT.length - 1 :]) for advantage, row in zip(advantages, rows, strict=True))
        for rows in (logprobs_of(on_policy), logprobs_of(off_policy))
    ]
    assert returns[1] > returns[0], "what had an advantage has become likelier"
    with_penalty = run(client, data, kl_coeff=2.0).metrics
    assert with_penalty["loss:sum"] == pytest.approx(
        off_policy.metrics["loss:sum"] + 2.0 * with_penalty["kl_to_sampler:sum"], rel=1e-4
    )


def test_what_the_objective_computes_is_what_the_docs_say(server: ServerProcess) -> None:
    """The loss of an off-policy pass, from its logprobs and the sampler's, in float64."""
    client = server.training_client()
    sequences = draw(recording_client(client))
    train_step(client, batch(2, seed=8), lr=2e-2)
    output = run(client, [recipe_datum(sequence, 1.0 + index) for index, sequence in enumerate(sequences)])
    expected = 0.0
    for index, (row, sequence) in enumerate(zip(logprobs_of(output), sequences, strict=True)):
        trained, sampled = np.array(row[PROMPT.length - 1 :]), np.array(sequence.logprobs)
        difference = trained - sampled
        assert abs(difference).max() > 0.1
        weights = min(1.0, np.exp(difference.mean())) * np.minimum(np.exp(difference), 2.0)
        expected -= float((weights * (1.0 + index) * trained).sum())
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)


def test_a_conversation_of_two_turns_is_one_datum(server: ServerProcess) -> None:
    client = server.training_client()
    sampler = recording_client(client)
    (first,) = draw(sampler, num_samples=1)
    # The second prompt continues the first turn; its datum covers both answers.
    history = [*PROMPT.to_ints(), *first.tokens]
    (second,) = draw(sampler, types.ModelInput.from_ints([*history, 30, 31]), num_samples=1)
    assert first.sequence_id is not None
    assert second.sequence_id is not None
    tokens = [*history, 30, 31, *second.tokens]
    spans: list[types.PromptProvenanceSpan | types.SampledProvenanceSpan] = [
        types.PromptProvenanceSpan(sequence_id=first.sequence_id, length=PROMPT.length),
        types.SampledProvenanceSpan(sequence_id=first.sequence_id, length=12),
        types.PromptProvenanceSpan(sequence_id=second.sequence_id, offset=len(history), length=2),
    ]
    advantages = [0.0] * (PROMPT.length - 1) + [1.0] * 12 + [0.0] * 2 + [-1.0] * 12
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "advantages": advantages},
    ).with_provenance(
        model_input=[*spans, types.SampledProvenanceSpan(sequence_id=second.sequence_id, length=11)],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=first.sequence_id, offset=1, length=PROMPT.length - 1),
            *spans[1:],
            types.SampledProvenanceSpan(sequence_id=second.sequence_id, length=12),
        ],
    )
    assert run(client, [datum]).metrics["treadle_objective_tokens:sum"] == 24


def test_sequences_that_are_not_on_record_are_named(server: ServerProcess) -> None:
    key = new_key()
    client = server.training_client(key)
    (unrecorded, _, _) = draw(recording_client(client, on_record=False))
    (recorded, _, _) = draw(recording_client(client))
    for bad in (unrecorded.sequence_id, f"{recorded.sequence_id}9"):
        assert bad is not None
        failure = failure_of(
            client.forward_backward([recipe_datum(recorded, 1.0, sequence_id=bad)], "stable_reinforce")
        )
        assert failure is not None
        assert failure.category.value == "user"
        assert bad in str(failure)
    # In its own session it works; in another session of the same key it is unknown.
    assert run(client, [recipe_datum(recorded, 1.0)])
    elsewhere = server.training_client(key)
    failure = failure_of(elsewhere.forward_backward([recipe_datum(recorded, 1.0)], "stable_reinforce"))
    assert failure is not None
    assert "not on record" in str(failure)


def test_a_new_session_is_told_whose_objective_it_is(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        server.training_client()
    assert "stable_reinforce is computed by this server's own objective" in caplog.text


def test_a_forward_without_the_adapter_gives_the_base_models_logprobs(server: ServerProcess) -> None:
    """What a preference loss wants of its reference; beside a pass of another run, which keeps its adapter."""
    client, other = server.training_client(), server.training_client()
    data = batch(2, seed=4)
    before = logprobs_of(client.forward(data, "cross_entropy").result(timeout=60))
    for trained in (client, other):
        train_step(trained, data, lr=1e-2)
    trained_logprobs = logprobs_of(client.forward(data, "cross_entropy").result(timeout=60))
    assert trained_logprobs != before
    passes = [
        client.forward(data, "cross_entropy", {"disable_lora": True}),
        other.forward(data, "cross_entropy"),
        client.forward(data, "cross_entropy", {"disable_lora": 0.0}),
    ]
    bare, others, adapted = (logprobs_of(passed.result(timeout=60)) for passed in passes)
    assert bare == before, "a fresh adapter changes nothing, so it is the base model"
    assert adapted == trained_logprobs
    assert others != before
    failure = failure_of(client.forward_backward(data, "cross_entropy", {"disable_lora": True}))
    assert failure is not None
    assert "disable_lora is for forward alone" in str(failure)
    # Neither left a trace.
    assert logprobs_of(client.forward(data, "cross_entropy").result(timeout=60)) == trained_logprobs


def test_another_optimiser_is_refused_by_name(server: ServerProcess) -> None:
    client = server.training_client()
    client.forward_backward(batch(1), "cross_entropy").result(timeout=60)
    failure = failure_of(client.optim_step(types.DimuonParams(learning_rate=1e-3)))
    assert failure is not None
    assert failure.category.value == "user"
    assert "dimuon" in str(failure)
    assert "AdamW" in str(failure)
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=60)
    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        server.training_client(optimizer=DimuonOptimizerConfig())
