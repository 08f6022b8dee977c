"""What is asked about prompts and beside sampled tokens: as plain transformers has it, the same bits in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sampler_support import (
    adapter_of,
    ask,
    bits,
    open_sampler,
    prompt_of,
    reference_logprobs,
    reference_model,
    run_all,
    sample,
)

from treadle.domain.limits import MAX_TOPK_LOGPROBS
from treadle.domain.ops import TargetTokens
from treadle.domain.outcome import SampleResult
from treadle.engine.base_model import BaseModel
from treadle.sampler.base import SamplerLimits
from treadle.sampler.prompt import SCORE_ROWS, PromptScores

# float32 against float32: other kernels, another order of sums.
TOLERANCE = 2e-5
PROMPT = prompt_of(90, vocab_size=1_000)


def dense(ids: list[list[int]]) -> TargetTokens:
    return TargetTokens(np.array(ids, np.int32).reshape(-1), len(ids[0]))


def sparse(num_rows: int, num_columns: int, cells: dict[tuple[int, int], int]) -> TargetTokens:
    """Cells by (row, column), in the order of rows and columns."""
    assert list(cells) == sorted(cells)
    rows = np.array([row for row, _ in cells])
    return TargetTokens(
        token_ids=np.array(list(cells.values()), np.int32),
        num_columns=num_columns,
        row_starts=np.searchsorted(rows, np.arange(num_rows + 1)),
        columns=np.array([column for _, column in cells]),
    )


def one(base: BaseModel, prompt: list[int] | None = None, **options: Any) -> SampleResult:
    return sample(base, [ask("a", prompt or PROMPT, **options)])["a"]


def test_the_most_likely_tokens_beside_sampled_ones(tiny: BaseModel) -> None:
    result = one(tiny, max_tokens=12, num_samples=2, fields={"topk_sample_logprobs": 5}, use_eos=False)
    model = reference_model(tiny)
    for sequence in result.sequences:
        expected = reference_logprobs(model, [*PROMPT, *sequence.tokens.tolist()])[len(PROMPT) - 1 : -1]
        top = sequence.topk_logprobs
        assert top is not None
        assert top.token_ids.shape == top.logprobs.shape == (12, 5)
        assert top.token_ids.tolist() == expected.topk(5, dim=-1).indices.tolist()
        np.testing.assert_allclose(top.logprobs, expected.topk(5, dim=-1).values.numpy(), atol=TOLERANCE)
        in_top = top.token_ids == sequence.tokens[:, None]
        assert in_top.any(), "some sampled token is among the most likely five"
        assert (top.logprobs[in_top] == sequence.logprobs[in_top.any(axis=1)]).all(), "the same logprob, to the bit"


def test_named_tokens_have_the_logprobs_of_the_model(tiny: BaseModel) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, tiny.vocab_size, size=(len(PROMPT) - 1, 3))
    ids[rng.random(ids.shape) < 0.4] = -1
    expected = reference_logprobs(reference_model(tiny), PROMPT)[:-1].numpy()
    wanted = np.where(ids < 0, 0.0, np.take_along_axis(expected, np.maximum(ids, 0), axis=1))
    got = one(tiny, max_tokens=1, fields={"target_prompt_logprobs": dense(ids.tolist())}).target_prompt_logprobs
    assert got is not None
    assert got.logprobs.dtype == np.float32
    np.testing.assert_allclose(got.logprobs.reshape(ids.shape), wanted, atol=TOLERANCE)
    assert (got.logprobs.reshape(ids.shape)[ids < 0] == 0.0).all()


def test_sparse_and_dense_targets_are_the_same_bits(tiny: BaseModel) -> None:
    num_rows = len(PROMPT) - 1
    cells = {(0, 3): 17, (40, 0): 5, (40, 2): -1, (num_rows - 1, 1): 900}
    table = [[-1] * 4 for _ in range(num_rows)]
    for (row, column), token in cells.items():
        table[row][column] = token
    from_sparse = one(tiny, max_tokens=1, fields={"target_prompt_logprobs": sparse(num_rows, 4, cells)})
    from_dense = one(tiny, max_tokens=1, fields={"target_prompt_logprobs": dense(table)})
    assert from_sparse.target_prompt_logprobs is not None
    assert from_dense.target_prompt_logprobs is not None
    full = from_dense.target_prompt_logprobs.logprobs.reshape(num_rows, 4)
    assert from_sparse.target_prompt_logprobs.logprobs.tolist() == [full[cell] for cell in cells]
    assert from_sparse.target_prompt_logprobs.logprobs[2] == 0.0


def test_targets_that_are_the_prompts_own_tokens_are_its_logprobs(tiny: BaseModel) -> None:
    own = dense([[token] for token in PROMPT[1:]])
    result = one(tiny, max_tokens=1, wants_prompt_logprobs=True, fields={"target_prompt_logprobs": own})
    assert result.prompt_logprobs is not None
    assert result.target_prompt_logprobs is not None
    assert result.target_prompt_logprobs.logprobs.tobytes() == result.prompt_logprobs[1:].tobytes()


def test_drawn_alternatives_have_the_logprobs_of_the_model(tiny: BaseModel) -> None:
    drawn = one(tiny, max_tokens=1, temperature=1.5, fields={"prompt_alt_tokens_k": 4}).prompt_alt_tokens
    assert drawn is not None
    assert drawn.tokens.shape == drawn.logprobs.shape == (len(PROMPT) - 1, 4)
    expected = reference_logprobs(reference_model(tiny), PROMPT)[:-1]
    wanted = expected.gather(1, torch.from_numpy(drawn.tokens.astype(np.int64))).numpy()
    np.testing.assert_allclose(drawn.logprobs, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_alternatives_are_drawn_at_the_temperature_from_the_whole_vocabulary(
    tiny: BaseModel, temperature: float
) -> None:
    """The mean logprob of many draws is that of the tempered distribution; a top-k or top-p would raise it."""
    asked = {"prompt_alt_tokens_k": MAX_TOPK_LOGPROBS}
    drawn = one(tiny, max_tokens=1, temperature=temperature, top_k=2, top_p=0.3, fields=asked).prompt_alt_tokens
    assert drawn is not None
    logprobs = reference_logprobs(reference_model(tiny), PROMPT)[:-1].double()
    tempered = torch.softmax(logprobs / temperature, dim=-1)
    mean = (tempered * logprobs).sum(-1)
    deviation = ((tempered * logprobs**2).sum(-1) - mean**2).sqrt() / MAX_TOPK_LOGPROBS**0.5
    errors = (drawn.logprobs.mean(axis=1) - mean.numpy()) / np.maximum(deviation.numpy(), 1e-6)
    # 89 means of 128 draws each: their errors, in standard deviations, scatter around 0 by about 1.
    assert abs(errors.mean()) < 0.45
    assert np.abs(errors).max() < 6.0


def test_alternatives_follow_the_seed_alone(tiny: BaseModel) -> None:
    def drawn(**options: Any) -> bytes:
        alternatives = one(tiny, max_tokens=1, fields={"prompt_alt_tokens_k": 6}, **options).prompt_alt_tokens
        assert alternatives is not None
        return alternatives.tokens.tobytes()

    assert drawn(seed=5) == drawn(seed=5, num_samples=3, top_k=3)
    assert drawn(seed=5) != drawn(seed=6)
    greedy = np.frombuffer(drawn(temperature=0.0), np.int32).reshape(-1, 6)
    best = reference_logprobs(reference_model(tiny), PROMPT)[:-1].argmax(-1)
    assert greedy.tolist() == [[token] * 6 for token in best.tolist()]


@pytest.mark.parametrize("last_n", [1, 7, len(PROMPT) - 1])
def test_only_the_last_positions_are_scored_when_only_they_are_wanted(tiny: BaseModel, last_n: int) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "wants_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    whole, last = one(tiny, **options), one(tiny, **options, fields={"prompt_logprobs_last_n": last_n})
    assert whole.prompt_logprobs is not None
    assert last.prompt_logprobs is not None
    assert whole.topk_prompt_logprobs is not None
    assert last.topk_prompt_logprobs is not None
    assert np.isnan(last.prompt_logprobs[:-last_n]).all()
    assert np.isnan(last.topk_prompt_logprobs.logprobs[:-last_n]).all()
    assert last.prompt_logprobs[-last_n:].tobytes() == whole.prompt_logprobs[-last_n:].tobytes()
    for column in ("token_ids", "logprobs"):
        ends = [getattr(table, column)[-last_n:] for table in (last.topk_prompt_logprobs, whole.topk_prompt_logprobs)]
        assert ends[0].tobytes() == ends[1].tobytes()
    assert last.sequences[0].tokens.tolist() == whole.sequences[0].tokens.tolist()


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({}, 89),
        ({"wants_prompt_logprobs": True}, 0),
        ({"topk_prompt_logprobs": 1}, 0),
        ({"wants_prompt_logprobs": True, "prompt_logprobs_last_n": 3}, 86),
        ({"wants_prompt_logprobs": True, "prompt_logprobs_last_n": 3, "prompt_alt_tokens_k": 1}, 0),
        ({"target_prompt_logprobs": sparse(89, 2, {(50, 1): -1, (60, 0): 4})}, 60),
        ({"target_prompt_logprobs": dense([[-1, -1]] * 88 + [[-1, 3]])}, 88),
        ({"wants_prompt_logprobs": True, "prompt_logprobs_last_n": 3, "target_prompt_logprobs": dense([[1]] * 89)}, 0),
    ],
)
def test_rows_before_the_first_that_is_wanted_are_left_out(fields: dict[str, Any], first: int) -> None:
    op = ask("a", PROMPT).op
    wanted = {"num_samples": 1, "prompt": op.prompt, "params": op.params, **fields}
    assert PromptScores(type(op)(op.sampling_session_id, 1, **wanted)).next_row == first


def everything(num_tokens: int) -> dict[str, Any]:
    targets = sparse(num_tokens - 1, 3, {(5, 0): 11, (num_tokens - 2, 2): 12})
    return {"topk_sample_logprobs": 3, "prompt_alt_tokens_k": 2, "target_prompt_logprobs": targets}


def test_all_features_have_the_same_bits_alone_and_in_a_crowd(qwen: BaseModel) -> None:
    adapters = [None, adapter_of(qwen, seed=1), adapter_of(qwen, seed=2, rank=8)]
    crowd = [
        ask(
            f"r{index}",
            prompt_of(20 + 67 * index, seed=index),
            tenant=f"t{index % 2}",
            adapter=adapters[index % 3],
            seed=index,
            num_samples=1 + index % 2,
            max_tokens=6 + index,
            wants_prompt_logprobs=index % 2 == 1,
            topk_prompt_logprobs=2 * (index % 3),
            fields=everything(20 + 67 * index) | {"topk_sample_logprobs": 1 + index},
        )
        for index in range(6)
    ]
    limits = SamplerLimits(max_running=7, prefill_chunk_tokens=128)
    together = sample(qwen, crowd, limits=limits)
    for asked in crowd:
        alone = sample(qwen, [asked], limits=limits)[asked.request_id]
        assert bits(alone) == bits(together[asked.request_id]), asked.request_id


def test_all_features_survive_a_job_that_starts_over(qwen: BaseModel) -> None:
    """Memory runs out while sequences decode; the newest job starts over, and nothing of it is drawn twice."""
    asked = [
        ask(
            f"r{i}",
            prompt_of(100, seed=i),
            seed=i,
            num_samples=2,
            max_tokens=150,
            use_eos=False,
            fields=everything(100),
        )
        for i in range(3)
    ]
    limits = SamplerLimits(max_cached_tokens=1_000)
    together = sample(qwen, asked, limits=limits)
    for request in asked:
        assert bits(sample(qwen, [request])[request.request_id]) == bits(together[request.request_id])


def test_a_long_prompts_tables_are_two_arrays(qwen: BaseModel) -> None:
    num_tokens = 2 * SCORE_ROWS + 10
    result = one(qwen, prompt_of(num_tokens), max_tokens=1, topk_prompt_logprobs=MAX_TOPK_LOGPROBS)
    top = result.topk_prompt_logprobs
    assert top is not None
    assert top.token_ids.nbytes + top.logprobs.nbytes == num_tokens * MAX_TOPK_LOGPROBS * 8
    assert not np.isnan(top.logprobs[1:]).any()


def test_more_of_the_most_likely_than_there_are_is_refused(qwen: BaseModel) -> None:
    sampler = open_sampler(qwen)
    bad = {
        "topk_sample_logprobs is 129": {"topk_sample_logprobs": 129},
        "prompt_alt_tokens_k is -1": {"prompt_alt_tokens_k": -1},
        "prompt_logprobs_last_n is 90; allowed: 1 to 89": {"prompt_logprobs_last_n": 90},
        "has 88 rows; due are 89": {"target_prompt_logprobs": dense([[1]] * 88)},
        "token 331, outside the vocabulary": {"target_prompt_logprobs": dense([[331]] * 89)},
    }
    prompt = prompt_of(90)
    sampler.submit([ask(words, prompt, fields=fields) for words, fields in bad.items()])
    for words, outcome in run_all(sampler).items():
        assert outcome.failure is not None
        assert words in outcome.failure.message


@pytest.mark.parametrize("fields", [{"prompt_alt_tokens_k": 1}, {"target_prompt_logprobs": dense([[1]] * 5)}])
def test_weights_that_are_not_finite_fail_whatever_is_asked(qwen: BaseModel, fields: dict[str, Any]) -> None:
    broken = adapter_of(qwen, seed=9)
    broken.flat.fill_(float("nan"))
    sampler = open_sampler(qwen)
    sampler.submit([ask("bad", prompt_of(6), adapter=broken, max_tokens=3, fields=fields)])
    failure = run_all(sampler)["bad"].failure
    assert failure is not None
    assert "not finite" in failure.message
