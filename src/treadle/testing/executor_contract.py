"""What every executor does, whatever runs behind it: checks to run against a started one.

Each check is an async function of a `Driver` and raises AssertionError when the executor breaks the rule. Checks use
runs of their own, so they may share one executor and come in any order:

    async with started(make_executor()) as driver:
        for check in (*CHECKS, *RECOVERY_CHECKS):
            await check(driver)

Those of state tags, fencing, snapshots and restores are in recovery_contract.py.

They need a vocabulary of 64 ids, a context of 64 tokens, rank 8, and determinism: the same run twice gives the same
numbers to the bit. Nothing here knows what the model computes, only that training on a datum makes it likelier.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from treadle.domain.ids import BlobKey, ModelId, RequestId
from treadle.domain.limits import QUANTUM_TOKENS
from treadle.domain.ops import (
    CreateModelOp,
    Datum,
    LoadWeightsOp,
    LoraSpec,
    OptimStepOp,
    PassOp,
    SaveForSamplerOp,
    SaveWeightsOp,
    UnloadModelOp,
)
from treadle.domain.outcome import (
    BlobResult,
    ModelResult,
    OpOutcome,
    PassResult,
    StepResult,
)
from treadle.domain.plan import FIRST_INCARNATION, StateTag
from treadle.domain.quanta import cut_quanta
from treadle.domain.states import Category
from treadle.testing.builders import datum, pass_op, sample_op, step_op
from treadle.testing.driver import Driver, Floats, pass_logprobs, pass_loss, read_sample

Check = Callable[[Driver], Awaitable[None]]

LORA = LoraSpec(rank=8, seed=7)
LEARNING_RATE = 3e-3
NAN_WEIGHTS = (float("nan"),) * 8


@dataclass(slots=True)
class Run:
    """A training run of its own for one check; every op it makes takes the next sequence number."""

    driver: Driver
    model_id: ModelId = field(init=False)
    last_seq_id: int = 0

    def __post_init__(self) -> None:
        self.model_id = self.driver.new_model_id()

    def next_seq_id(self) -> int:
        self.last_seq_id += 1
        return self.last_seq_id

    def tag(self, seq_id: int) -> StateTag:
        """The tag of its first incarnation after `seq_id`."""
        return StateTag(self.model_id, FIRST_INCARNATION, seq_id)

    def create(self, *, lora: LoraSpec = LORA) -> CreateModelOp:
        return CreateModelOp(self.model_id, base_model=self.driver.facts.base_model, lora=lora)

    def backward(self, *, seed: int = 0, weights: Sequence[float] | None = None) -> PassOp:
        return self.backward_on([datum(seed=seed, weights=weights)])

    def backward_on(self, data: Sequence[Datum]) -> PassOp:
        return pass_op(self.next_seq_id(), model_id=self.model_id, datums=data)

    def forward(self) -> PassOp:
        return replace(self.backward(), forward_only=True)

    def step(self) -> OptimStepOp:
        return step_op(self.next_seq_id(), model_id=self.model_id, learning_rate=LEARNING_RATE)

    def load(self, key: BlobKey, *, creates_model: bool = False, with_optimizer: bool = True) -> LoadWeightsOp:
        return LoadWeightsOp(
            model_id=self.model_id,
            seq_id=self.next_seq_id(),
            path="tinker://contract/weights/one",
            blob_key=key,
            lora=LORA,
            with_optimizer=with_optimizer,
            creates_model=creates_model,
        )

    async def trained(self) -> Run:
        """The run itself, created and one step on."""
        outcomes = await self.driver.run(self.create(), self.backward(), self.step())
        assert all(outcome.failure is None for outcome in outcomes)
        return self

    async def logprobs(self) -> Floats:
        """What the run's present weights give on the datum of seed 0; costs a sequence number, leaves no trace."""
        (outcome,) = await self.driver.run(self.forward())
        (array,) = pass_logprobs(outcome)
        return array


def assert_same(actual: Floats | None, expected: Floats) -> None:
    """Equal to the bit; NaN equals NaN."""
    np.testing.assert_array_equal(actual, expected)


def assert_user_failure(outcome: OpOutcome) -> None:
    assert outcome.result is None
    assert outcome.failure is not None
    assert outcome.failure.category is Category.USER, outcome.failure
    assert not outcome.must_restore


async def check_start_gives_facts(driver: Driver) -> None:
    facts = driver.facts
    assert facts.base_model
    assert facts.revision
    assert facts.vocab_size >= 64
    assert facts.max_context_length >= 64


async def check_a_run_learns_and_its_tag_follows(driver: Driver) -> None:
    run = Run(driver)
    (created,) = await driver.run(run.create())
    assert created.result == ModelResult(run.model_id)
    assert created.tag_after == run.tag(0)
    losses = []
    for _ in range(3):
        passed, stepped = await driver.run(run.backward(), run.step())
        assert isinstance(passed.result, PassResult)
        assert isinstance(stepped.result, StepResult)
        assert stepped.encoded is not None
        assert np.isfinite(list(stepped.result.metrics.values())).all()
        assert passed.num_tokens == 8
        assert (passed.tag_after, stepped.tag_after) == (run.tag(run.last_seq_id - 1), run.tag(run.last_seq_id))
        assert np.isclose(pass_loss(passed), -sum(float(array.sum()) for array in pass_logprobs(passed)), rtol=1e-4)
        losses.append(pass_loss(passed))
    assert losses[0] > losses[1] > losses[2], losses


async def check_one_cycle_equals_many(driver: Driver) -> None:
    together, apart = Run(driver), Run(driver)
    await driver.run(together.create(), together.backward(), together.backward(seed=1), together.step())
    for op in (apart.create(), apart.backward(), apart.backward(seed=1), apart.step()):
        await driver.run(op)
    assert_same(await together.logprobs(), await apart.logprobs())


async def check_neighbours_change_nothing(driver: Driver) -> None:
    alone, accompanied, neighbour = Run(driver), Run(driver), Run(driver)
    await driver.run(alone.create(), alone.backward(), alone.step())
    await driver.run(neighbour.create(lora=LoraSpec(rank=4, seed=1)), accompanied.create())
    good, bad = neighbour.backward(seed=3), neighbour.backward(weights=NAN_WEIGHTS)
    outcomes = await driver.run(good, bad, accompanied.backward(), accompanied.step())
    assert [outcome.failure is None for outcome in outcomes] == [True, False, True, True]
    assert outcomes[1].tag_after == neighbour.tag(2)
    assert_same(await accompanied.logprobs(), await alone.logprobs())


async def check_forward_leaves_no_trace(driver: Driver) -> None:
    run = await Run(driver).trained()
    before = await run.logprobs()
    (stepped,) = await driver.run(run.step())
    assert_user_failure(stepped)
    assert stepped.tag_after == run.tag(run.last_seq_id)
    assert_same(await run.logprobs(), before)


async def check_a_forward_without_the_adapter_is_that_of_a_fresh_run(driver: Driver) -> None:
    run = Run(driver)
    await driver.run(run.create())
    fresh = await run.logprobs()
    await driver.run(run.backward(), run.step())
    bare, adapted = await driver.run(replace(run.forward(), uses_adapter=False), run.forward())
    assert_same(pass_logprobs(bare)[0], fresh)
    assert (pass_logprobs(adapted)[0] != fresh).any()
    assert_same(await run.logprobs(), pass_logprobs(adapted)[0])


async def check_a_failed_op_leaves_the_state_as_it_was(driver: Driver) -> None:
    run = await Run(driver).trained()
    before = await run.logprobs()
    (failed,) = await driver.run(run.backward(weights=NAN_WEIGHTS))
    assert_user_failure(failed)
    assert failed.tag_after == run.tag(run.last_seq_id), "its sequence number is consumed"
    (lost,) = await driver.run(run.load(driver.new_key()))
    assert lost.failure is not None
    assert_same(await run.logprobs(), before)
    (stepped,) = await driver.run(run.step())
    assert_user_failure(stepped)


async def check_an_unreadable_payload_fails_its_own_op_only(driver: Driver) -> None:
    run = await Run(driver).trained()
    items = [driver.item(run.backward()), driver.item(run.backward()), driver.item(run.step())]
    items[1] = replace(items[1], payload=b"\xff not a pass")
    outcomes = (await driver.run_items(items)).outcomes
    assert [outcome.failure is None for outcome in outcomes] == [True, False, True]
    assert [outcome.tag_after for outcome in outcomes] == [run.tag(3), run.tag(4), run.tag(5)]


async def check_a_step_applies_what_succeeded_and_counts_the_rest(driver: Driver) -> None:
    run, reference = Run(driver), Run(driver)
    await driver.run(reference.create(), reference.backward(), reference.step())
    bad = run.create(), run.backward(weights=NAN_WEIGHTS)
    *_, stepped = await driver.run(*bad, run.backward(), run.step())
    assert isinstance(stepped.result, StepResult)
    assert stepped.result.metrics["skipped_passes"] == 1
    assert_same(await run.logprobs(), await reference.logprobs())


async def check_a_save_loads(driver: Driver) -> None:
    run = await Run(driver).trained()
    saved_at = await run.logprobs()
    (saved,) = await driver.run(SaveWeightsOp(run.model_id, run.next_seq_id(), name="one"))
    assert isinstance(saved.result, BlobResult)
    assert saved.result.num_bytes > 0
    assert saved.result.lora == LORA
    await driver.run(run.backward(), run.step())
    continued = await run.logprobs()
    assert not np.array_equal(continued, saved_at)
    (loaded,) = await driver.run(run.load(saved.result.blob_key))
    assert loaded.result == ModelResult(run.model_id)
    assert loaded.tag_after == run.tag(run.last_seq_id)
    assert_same(await run.logprobs(), saved_at)
    await driver.run(run.backward(), run.step())
    assert_same(await run.logprobs(), continued)
    other = Run(driver, last_seq_id=-1)
    (created,) = await driver.run(other.load(saved.result.blob_key, creates_model=True))
    assert created.tag_after == other.tag(0)
    assert_same(await other.logprobs(), saved_at)


async def check_skipped_seq_ids_are_no_obstacle(driver: Driver) -> None:
    run = await Run(driver).trained()
    run.last_seq_id += 5
    (passed,) = await driver.run(run.forward())
    assert passed.failure is None
    assert passed.tag_after == run.tag(run.last_seq_id)


def quanta_of_datums(driver: Driver, num_quanta: int) -> list[Datum]:
    """Datums that are cut into so many quanta."""
    num_tokens = min(QUANTUM_TOKENS // 2 + 1, driver.facts.max_context_length)
    per_quantum = max(1, QUANTUM_TOKENS // num_tokens)
    data = [datum(num_tokens, seed=seed) for seed in range((num_quanta - 1) * per_quantum + 1)]
    assert len(cut_quanta([num_tokens] * len(data))) == num_quanta
    return data


async def check_a_pass_in_parts_is_one_pass(driver: Driver) -> None:
    data = quanta_of_datums(driver, 3)
    whole, parted = Run(driver), Run(driver)
    (_, expected, _) = await driver.run(whole.create(), whole.backward_on(data), whole.step())
    await driver.run(parted.create())
    op = parted.backward_on(data)
    for quanta in ((0, 1), (1, 2)):
        (part,) = (await driver.run_items([driver.item(op, quanta=quanta)])).outcomes
        assert part.is_partial
        assert part.result is None
        assert part.failure is None
        assert part.encoded is None
        assert part.tag_after == parted.tag(0), "the state changes with the last part only"
    (done,) = (await driver.run_items([driver.item(op, quanta=(2, 3))])).outcomes
    assert not done.is_partial
    assert done.tag_after == parted.tag(1)
    assert len(pass_logprobs(done)) == len(data)
    assert_same(np.concatenate(pass_logprobs(done)), np.concatenate(pass_logprobs(expected)))
    await driver.run(parted.step())
    assert_same(await parted.logprobs(), await whole.logprobs())


async def check_unload_ends_a_run(driver: Driver) -> None:
    run = await Run(driver).trained()
    (unloaded,) = await driver.run(UnloadModelOp(run.model_id, run.next_seq_id()))
    assert unloaded.result == ModelResult(run.model_id)
    assert unloaded.tag_after is None


async def check_published_weights_are_sampled_and_never_change(driver: Driver) -> None:
    run = await Run(driver).trained()
    (published,) = await driver.run(SaveForSamplerOp(run.model_id, run.next_seq_id(), name="one"))
    assert isinstance(published.result, BlobResult)
    tokens = datum().tokens
    targets = datum().inputs["target_tokens"]
    prompt = [*tokens.tolist(), int(targets[-1])]
    sample = replace(sample_op(prompt=prompt, wants_prompt_logprobs=True), blob_key=published.result.blob_key)
    (first,) = await driver.sample(sample)
    scored = read_sample(first).prompt_logprobs
    assert scored is not None
    assert np.isnan(scored[0])
    trainer_logprobs = await run.logprobs()
    assert np.allclose(scored[1:], trainer_logprobs, atol=1e-3), "trainer and sampler disagree"
    await driver.run(run.backward(), run.step())
    (second,) = await driver.sample(sample)
    assert read_sample(second).sequences[0][0] == read_sample(first).sequences[0][0]
    assert_same(read_sample(second).prompt_logprobs, scored)


async def check_each_sample_ends_in_one_outcome(driver: Driver) -> None:
    ops = [
        sample_op(seed=1, num_samples=2, max_tokens=5),
        sample_op(seed=2, prompt=[driver.facts.vocab_size]),
        sample_op(seed=3, temperature=0.0),
        sample_op(seed=1, num_samples=3, max_tokens=5, wants_prompt_logprobs=True, topk_prompt_logprobs=2),
        replace(sample_op(seed=4), blob_key=driver.new_key()),
    ]
    start = len(driver.sample_outcomes)
    two, bad, greedy, three, lost = await driver.sample(*ops)
    (again,) = await driver.sample(ops[2])
    assert len(driver.sample_outcomes) - start == len(ops) + 1
    assert bad.failure is not None
    assert bad.failure.category is Category.USER
    assert lost.failure is not None
    assert (two.num_prompt_tokens, two.num_sampled_tokens) == (3, 10)
    sequences = read_sample(three).sequences
    assert [len(tokens) for tokens, _ in sequences] == [5, 5, 5]
    assert [tokens for tokens, _ in sequences[:2]] == [tokens for tokens, _ in read_sample(two).sequences]
    assert all((logprobs <= 0).all() for _, logprobs in sequences)
    topk = read_sample(three).topk_token_ids
    assert topk is not None
    assert topk.shape == (3, 2)
    assert read_sample(again).sequences[0][0] == read_sample(greedy).sequences[0][0]


async def check_what_is_sampled_on_record_is_what_the_client_gets(driver: Driver) -> None:
    op = sample_op(seed=4, max_tokens=5, num_samples=2)
    kept, plain = await driver.sample(replace(op, record_stability_info=True), op)
    assert plain.recorded == ()
    assert [record.num_prompt_tokens for record in kept.recorded] == [len(op.prompt)] * 2
    for record, (tokens, logprobs) in zip(kept.recorded, read_sample(kept).sequences, strict=True):
        assert record.token_ids().tolist() == tokens
        np.testing.assert_array_equal(record.sampling_logprobs(), logprobs)
    assert read_sample(plain).sequences[0][0] == read_sample(kept).sequences[0][0]


async def check_cancelled_samples_hurt_nobody(driver: Driver) -> None:
    start = len(driver.sample_outcomes)
    cancelled, kept = driver.submit(
        sample_op(seed=1, max_tokens=40), sample_op(seed=2), prefix=driver.new_key().replace("/", "-")
    )
    for _ in range(2):
        driver.executor.cancel_samples([cancelled, RequestId("nobody")])
    await driver.wait_for_samples([kept])
    await driver.sample(sample_op(seed=3))
    seen = [outcome.request_id for outcome in driver.sample_outcomes[start:]]
    # It may have ended before the cancel came, but never twice.
    assert seen.count(cancelled) <= 1
    assert seen.count(kept) == 1


CHECKS: tuple[Check, ...] = (
    check_start_gives_facts,
    check_a_run_learns_and_its_tag_follows,
    check_one_cycle_equals_many,
    check_neighbours_change_nothing,
    check_forward_leaves_no_trace,
    check_a_forward_without_the_adapter_is_that_of_a_fresh_run,
    check_a_failed_op_leaves_the_state_as_it_was,
    check_an_unreadable_payload_fails_its_own_op_only,
    check_a_step_applies_what_succeeded_and_counts_the_rest,
    check_a_save_loads,
    check_skipped_seq_ids_are_no_obstacle,
    check_a_pass_in_parts_is_one_pass,
    check_unload_ends_a_run,
    check_published_weights_are_sampled_and_never_change,
    check_each_sample_ends_in_one_outcome,
    check_what_is_sampled_on_record_is_what_the_client_gets,
    check_cancelled_samples_hurt_nobody,
)
