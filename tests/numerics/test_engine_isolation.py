"""A run's numbers depend on its own requests alone: not on neighbours, splitting, order of creation or failures.

Every comparison here is bit for bit (tolerance 0), because whole runs are replayed on that promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_builders import VOCAB_SIZE, load_tiny, make_datum, make_datums, make_state, quantum_of

from treadle.domain.ops import AdamParams, Datum, LoraSpec
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel
from treadle.engine.optim import adamw_step
from treadle.engine.passes import QuantumInput, QuantumResult, run_micro_batch
from treadle.engine.state import TrainingState, commit_scratch

NUM_STEPS = 3
ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=1.0)


@dataclass(frozen=True)
class Tenant:
    """One run's settings and its datums per step."""

    spec: LoraSpec
    loss: str
    steps: tuple[tuple[Datum, ...], ...]


def make_tenants(rng: np.random.Generator) -> list[Tenant]:
    """Runs that differ in rank, flags, loss, lengths and number of datums; lengths are odd on purpose."""
    losses = ("cross_entropy", "ppo", "importance_sampling")
    tenants = []
    for index, rank in enumerate((8, 1, 16, 3, 5)):
        lengths = [int(length) for length in rng.integers(1, 70, size=1 + index)]
        # The head skips rows without a gradient, together for all runs of a group: some runs have none to skip.
        idle = (0.0, 1 / 3, 0.0, 0.9, 1 / 3)[index]
        tenants.append(
            Tenant(
                spec=LoraSpec(rank=rank, seed=index, train_mlp=index != 1, train_unembed=index != 2),
                loss=losses[index % 3],
                steps=tuple(make_datums(rng, lengths, losses[index % 3], idle=idle) for _ in range(NUM_STEPS)),
            )
        )
    return tenants


def train_together(base: BaseModel, tenants: Sequence[Tenant]) -> tuple[list[TrainingState], list[QuantumResult]]:
    """Every step of all tenants in one pass each; final states, and the results of all passes in tenant order."""
    states = [make_state(base, tenant.spec) for tenant in tenants]
    results: list[list[QuantumResult]] = [[] for _ in tenants]
    for step in range(NUM_STEPS):
        quanta = [
            quantum_of(state, tenant.steps[step], tenant.loss) for state, tenant in zip(states, tenants, strict=True)
        ]
        for index, result in enumerate(run_micro_batch(base, quanta)):
            assert result.failure is None
            results[index].append(result)
            take_step(quanta[index])
    return states, [result for tenant_results in results for result in tenant_results]


def take_step(quantum: QuantumInput) -> None:
    assert quantum.scratch is not None
    commit_scratch(quantum.state, quantum.scratch)
    adamw_step(quantum.state, ADAM)


def assert_same_state(left: TrainingState, right: TrainingState) -> None:
    assert torch.equal(left.weights.flat, right.weights.flat)
    assert torch.equal(left.exp_avg, right.exp_avg)
    assert torch.equal(left.exp_avg_sq, right.exp_avg_sq)
    assert left.step == right.step


def assert_same_results(left: Sequence[QuantumResult], right: Sequence[QuantumResult]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.metrics == other.metrics
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("architecture", "dtype"), [("qwen3", "float32"), ("llama", "float32"), ("qwen3", "bfloat16")])
def test_training_alone_equals_training_in_company(
    model_dir_of: Callable[[str, bool], Path], architecture: str, dtype: str
) -> None:
    base = load_tiny(model_dir_of(architecture, True), dtype=dtype)
    tenants = make_tenants(np.random.default_rng(1))
    together, results = train_together(base, tenants)
    for index, tenant in enumerate(tenants):
        alone, results_alone = train_together(base, [tenant])
        assert_same_results(results[index * NUM_STEPS : (index + 1) * NUM_STEPS], results_alone)
        assert_same_state(together[index], alone[0])
    assert len({state.weights.flat.double().sum().item() for state in together}) == len(tenants)


def test_two_threads_keep_the_bits_too(model_dir_of: Callable[[str, bool], Path]) -> None:
    before = torch.get_num_threads()
    rng = np.random.default_rng(2)
    try:
        base = load_tiny(model_dir_of("qwen3", False), num_threads=2)
        # Long enough that torch does split the work of the larger operations.
        quanta = [
            quantum_of(make_state(base, LoraSpec(rank=4 + seed, seed=seed)), make_datums(rng, [301 + seed, 65]))
            for seed in range(3)
        ]
        together = run_micro_batch(base, quanta)
        for quantum, result in zip(quanta, together, strict=True):
            alone = replace(quantum, scratch=quantum.state.new_scratch())
            assert_same_results(run_micro_batch(base, [alone]), [result])
            assert quantum.scratch is not None
            assert alone.scratch is not None
            assert torch.equal(alone.scratch.flat, quantum.scratch.flat)
    finally:
        torch.set_num_threads(before)


def test_order_of_neighbours_changes_nothing(base: BaseModel) -> None:
    tenants = make_tenants(np.random.default_rng(7))
    forward, _ = train_together(base, tenants)
    backward, _ = train_together(base, tenants[::-1])
    for one, other in zip(forward, backward[::-1], strict=True):
        assert_same_state(one, other)


def test_request_split_over_micro_batches_gives_the_same_bits(base: BaseModel) -> None:
    rng = np.random.default_rng(3)
    parts = [make_datums(rng, lengths) for lengths in ([5, 40], [33], [1, 2, 3], [64])]
    company = quantum_of(make_state(base, LoraSpec(rank=2, seed=99)), make_datums(rng, [21]))

    def gradient(batches: Sequence[Sequence[int]]) -> torch.Tensor:
        state = make_state(base, LoraSpec(rank=8, seed=1))
        scratch = state.new_scratch()
        for batch in batches:
            quanta = [
                QuantumInput(state=state, datums=parts[part], loss=company.loss, scratch=scratch) for part in batch
            ]
            run_micro_batch(base, [*quanta, company] if len(batch) == 1 else [company, *quanta])
        return scratch.flat

    whole = gradient([[0, 1, 2, 3]])
    assert torch.equal(whole, gradient([[0], [1], [2], [3]]))
    assert torch.equal(whole, gradient([[0, 1], [2, 3]]))
    assert whole.abs().max() > 0


def test_equal_lengths_share_one_attention_call_without_changing_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 16, 33, 130, 200):
        for num_kv_heads in (1, 2, 4):
            count = 5
            query = torch.randn(1, 4, count * length, 16, generator=generator)
            key = torch.randn(1, num_kv_heads, count * length, 16, generator=generator)
            value = torch.randn(1, num_kv_heads, count * length, 16, generator=generator)
            together = PackedCausalAttention([length] * count, count * length).attend(0, query, key, value, 0.25)
            for index in range(count):
                rows = slice(index * length, (index + 1) * length)
                one = PackedCausalAttention([length], length)
                alone = one.attend(0, query[:, :, rows], key[:, :, rows], value[:, :, rows], 0.25)
                assert torch.equal(together[:, rows], alone)


@pytest.mark.parametrize("intruder", ["nan weights", "huge weights", "huge advantage", "nan weight of a token"])
def test_intruder_fails_alone(base: BaseModel, intruder: str) -> None:
    tenants = make_tenants(np.random.default_rng(5))
    victim = tenants[3]
    spec = LoraSpec(rank=4, seed=50)

    def run(with_intruder: bool) -> tuple[list[QuantumResult], torch.Tensor]:
        state = make_state(base, victim.spec)
        quanta = [quantum_of(state, victim.steps[0], victim.loss)]
        if with_intruder:
            bad = bad_quantum(base, spec, intruder)
            untouched = bad.state.weights.flat.clone()
            quanta = [bad_quantum(base, spec, intruder), *quanta, bad]
        results = run_micro_batch(base, quanta)
        if with_intruder:
            for result in (results[0], results[2]):
                assert result.failure is not None
                assert "datum 1:" in result.failure.message
                assert result.logprobs == ()
            assert torch.equal(bad.state.weights.flat.nan_to_num(1.5), untouched.nan_to_num(1.5))
            assert bad.state.grads is None
        index = 1 if with_intruder else 0
        scratch = quanta[index].scratch
        assert scratch is not None
        return [results[index]], scratch.flat

    alone, gradient_alone = run(with_intruder=False)
    in_company, gradient = run(with_intruder=True)
    assert alone[0].failure is None
    assert_same_results(alone, in_company)
    assert torch.equal(gradient_alone, gradient)


def bad_quantum(base: BaseModel, spec: LoraSpec, intruder: str) -> QuantumInput:
    """A quantum whose first datum that is not finite is number 1 of its request."""
    rng = np.random.default_rng(8)
    loss = "importance_sampling" if intruder == "huge advantage" else "cross_entropy"
    state = make_state(base, spec)
    good, bad = make_datum(rng, 1, loss), make_datum(rng, 30, loss)
    if intruder in ("nan weights", "huge weights"):
        # Every datum suffers, so the quantum starts at datum 1 of its request.
        number = torch.nan if intruder == "nan weights" else 3e38
        state.weights.b("model.layers.0.self_attn.v_proj").fill_(number)
        return replace(quantum_of(state, (bad, good), loss), first_datum_index=1)
    if intruder == "huge advantage":
        bad.inputs["advantages"][3] = 3e38
        bad.inputs["logprobs"][3] = -80.0
    else:
        bad.inputs["weights"][3] = np.nan
    return quantum_of(state, (good, bad), loss)


def test_forward_only_leaves_no_trace_on_itself_or_others(base: BaseModel) -> None:
    rng = np.random.default_rng(11)
    datums = make_datums(rng, [20, 31])
    watched = make_state(base, LoraSpec(rank=8, seed=0))
    before = watched.weights.flat.clone()
    trained = quantum_of(make_state(base, LoraSpec(rank=4, seed=1)), make_datums(rng, [17], "ppo"), "ppo")
    trained_alone = quantum_of(make_state(base, LoraSpec(rank=4, seed=1)), trained.datums, "ppo")
    mixed = run_micro_batch(base, [quantum_of(watched, datums, forward_only=True), trained])
    alone = run_micro_batch(base, [quantum_of(watched, datums, forward_only=True)])
    run_micro_batch(base, [trained_alone])
    assert torch.equal(watched.weights.flat, before)
    assert watched.grads is None
    assert watched.num_open_passes == 0
    assert_same_results(mixed[:1], alone)
    assert trained.scratch is not None
    assert trained_alone.scratch is not None
    assert torch.equal(trained.scratch.flat, trained_alone.scratch.flat)


def test_forward_only_equals_the_training_pass(base: BaseModel) -> None:
    datums = make_datums(np.random.default_rng(12), [9, 40])
    state = make_state(base, LoraSpec(rank=8, seed=0))
    assert_same_results(
        run_micro_batch(base, [quantum_of(state, datums)]),
        run_micro_batch(base, [quantum_of(state, datums, forward_only=True)]),
    )


def test_adapter_on_the_head_alone_records_nothing_below_it(base: BaseModel) -> None:
    rng = np.random.default_rng(14)
    spec = LoraSpec(rank=4, seed=0, train_attn=False, train_mlp=False)
    quantum = quantum_of(make_state(base, spec), make_datums(rng, [30, 8]))
    recorded: list[bool] = []
    handle = base.transformer.register_forward_hook(lambda module, args, output: recorded.append(output.requires_grad))
    try:
        run_micro_batch(base, [quantum])
    finally:
        handle.remove()
    assert recorded == [False]
    again = replace(quantum, scratch=quantum.state.new_scratch())
    run_micro_batch(base, [quantum_of(make_state(base, LoraSpec(rank=2, seed=1)), make_datums(rng, [17])), again])
    assert quantum.scratch is not None
    assert again.scratch is not None
    assert quantum.scratch.flat.any()
    assert torch.equal(quantum.scratch.flat, again.scratch.flat)


def test_calls_of_one_datum_add_up_to_one_call_of_all(base: BaseModel) -> None:
    datums = make_datums(np.random.default_rng(13), [25, 4, 61, 16])
    state = make_state(base, LoraSpec(rank=8, seed=0))
    for datum in datums:
        quantum = quantum_of(state, [datum])
        run_micro_batch(base, [quantum])
        assert quantum.scratch is not None
        commit_scratch(state, quantum.scratch)
    assert state.num_open_passes == len(datums)
    whole = quantum_of(state, datums)
    run_micro_batch(base, [whole])
    assert state.grads is not None
    assert whole.scratch is not None
    # Only the grouping of a sum differs.
    torch.testing.assert_close(
        state.grads.flat, whole.scratch.flat, rtol=1e-5, atol=1e-5 * float(whole.scratch.flat.abs().max())
    )


def test_out_of_vocabulary_token_never_reaches_the_device(base: BaseModel) -> None:
    datum = Datum(tokens=np.array([VOCAB_SIZE], dtype=np.int32), inputs={"target_tokens": np.array([1])})
    with pytest.raises(AssertionError, match="checked at admission"):
        run_micro_batch(base, [quantum_of(make_state(base, LoraSpec(rank=1, seed=0)), [datum])])
