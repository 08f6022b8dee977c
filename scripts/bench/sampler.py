"""The built-in sampler by itself: what a crowd, many adapters and known prompts are worth.

    python scripts/bench/sampler.py [--model 27m] [--threads 2] [--tokens 64] [--repetitions 5]
                                    [--json FILE] [--save] [--baseline FILE]

All sides run in one process, in turn, repetition by repetition:
- crowd: 16 samples at once over one alone, in tokens per second; the aim is 4.
- adapters: 16 samples under 8 adapters over 16 under one adapter; the aim is 0.85.
- transformers: our 16 at once over its batched generate of 16 prompts with the key-value cache; the aim is 1.
- prefix: time to the first token of a prompt of 1,024 tokens that was read before, over that of one that was not; the
  aim is at most 0.15. The ratio that is stored is its inverse, which is better when larger.
Before anything is timed, the sampled tokens of the greedy crowd must be those of transformers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import report
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from treadle.domain.ids import BlobKey, RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import LoraSpec, SampleOp, SamplingParams
from treadle.domain.outcome import SampleOutcome
from treadle.engine.adapter import AdapterWeights
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.state import new_training_state
from treadle.sampler.base import SampleRequest
from treadle.sampler.builtin import BuiltinSampler, open_sampler

CROWD = 16
NUM_ADAPTERS = 8
PROMPT_TOKENS = 32
LONG_PROMPT_TOKENS = 1_024
RANK = 16
MARGIN = 0.25
FOREVER_S = 1e9


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="treadle-bench-") as folder:
        directory = models.make_model(Path(folder), args.model)
        result = measure(directory, num_tokens=args.tokens, repetitions=args.repetitions)
    result = {"benchmark": "sampler", "model": args.model, "threads": args.threads, **report.context(), **result}
    show(result)
    report.write(report.path_of(args, "sampler"), result)
    return report.compare(args, result, margin=MARGIN)


def measure(directory: Path, *, num_tokens: int, repetitions: int) -> dict[str, Any]:
    """All figures of one model."""
    base = load_base_model(str(directory), name="bench", device="cpu", dtype="float32")
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sampler = open_sampler(base)
    adapters = [_adapter(base, seed) for seed in range(NUM_ADAPTERS)]
    prompts = [_prompt(base, PROMPT_TOKENS, seed) for seed in range(CROWD)]
    _check_against(sampler, peer, prompts, num_tokens)
    sides: dict[str, Callable[[], int]] = {
        "alone": lambda: _sample(sampler, prompts[:1], num_tokens, [None]),
        "crowd": lambda: _sample(sampler, prompts, num_tokens, [None]),
        "one adapter": lambda: _sample(sampler, prompts, num_tokens, adapters[:1]),
        "8 adapters": lambda: _sample(sampler, prompts, num_tokens, adapters),
        "transformers": lambda: _generate(peer, prompts, num_tokens),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cold: list[float] = []
    warm: list[float] = []
    for repetition in range(repetitions + 1):
        for name, side in sides.items():
            seconds, num_sampled = _timed(side)
            if repetition:  # the first one warms up
                rates[name].append(num_sampled / seconds)
        long = _prompt(base, LONG_PROMPT_TOKENS, 1_000 + repetition)
        times = [_timed(lambda: _sample(sampler, [long], 1, [None]))[0] for _ in range(2)]  # noqa: B023  # called at once
        if repetition:
            cold.append(times[0])
            warm.append(times[1])
    pairs = {
        "crowd over alone": ("crowd", "alone"),
        "8 adapters over one": ("8 adapters", "one adapter"),
        "crowd over transformers": ("crowd", "transformers"),
    }
    ratios = {
        name: report.spread([a / b for a, b in zip(rates[one], rates[other], strict=True)])
        for name, (one, other) in pairs.items()
    }
    ratios["cold prompt over known one"] = report.spread([a / b for a, b in zip(cold, warm, strict=True)])
    return {
        "tokens_per_second": {name: report.spread(values) for name, values in rates.items()},
        "first_token_ms": {
            "cold": report.spread([1e3 * value for value in cold]),
            "known": report.spread([1e3 * value for value in warm]),
        },
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    rows = [[name, values["median"], values["min"], values["max"]] for name, values in result["ratios"].items()]
    rates = {name: round(values["median"]) for name, values in result["tokens_per_second"].items()}
    report.print_table(f"Sampler, {result['model']}, tokens/s {rates}", ["ratio", "median", "min", "max"], rows)


def _sample(
    sampler: BuiltinSampler,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    adapters: Sequence[AdapterWeights | None],
) -> int:
    """How many tokens were sampled, greedily, from all prompts at once; adapters take turns."""
    return sum(len(tokens) for tokens in _sampled(sampler, prompts, num_tokens, adapters))


def _sampled(
    sampler: BuiltinSampler,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    adapters: Sequence[AdapterWeights | None],
) -> list[list[int]]:
    requests = []
    for index, prompt in enumerate(prompts):
        which = index % len(adapters)
        op = SampleOp(
            sampling_session_id=SamplingSessionId("bench"),
            seq_id=index,
            prompt=np.array(prompt, dtype=np.int32),
            num_samples=1,
            params=SamplingParams(seed=index, max_tokens=num_tokens, temperature=0.0, use_eos=False),
            blob_key=None if adapters[which] is None else BlobKey(f"adapter-{which}"),
        )
        requests.append(SampleRequest(RequestId(str(index)), TenantId(f"tenant-{index % 8}"), op, adapters[which]))
    sampler.submit(requests)
    outcomes: list[SampleOutcome] = []
    while sampler.has_work:
        outcomes += sampler.step(FOREVER_S)
    by_id = {outcome.request_id: outcome for outcome in outcomes}
    found = []
    for request in requests:
        result = by_id[request.request_id].result
        assert result is not None, by_id[request.request_id].failure
        found.append(result.sequences[0].tokens.tolist())
    return found


def _generate(peer: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
    return int(_generated(peer, prompts, num_tokens).numel())


def _generated(peer: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> torch.Tensor:
    tokens = torch.tensor(prompts)
    with torch.no_grad():
        out = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[:, tokens.shape[1] :]


def _check_against(
    sampler: BuiltinSampler, peer: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int
) -> None:
    """Raises when the two do not sample the same tokens: then no figure means anything."""
    ours = _sampled(sampler, prompts, num_tokens, [None])
    theirs = _generated(peer, prompts, num_tokens).tolist()
    assert ours == theirs, "greedy samples differ from transformers'"


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _prompt(base: BaseModel, length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(10, base.vocab_size, size=length)]


def _adapter(base: BaseModel, seed: int) -> AdapterWeights:
    """One whose B is not zero."""
    weights = new_training_state(base, LoraSpec(rank=RANK, seed=seed)).weights
    generator = torch.Generator().manual_seed(seed)
    for module in weights.modules:
        weights.b(module).normal_(std=0.01, generator=generator)
    return weights


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(models.SHAPES), default="27m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="sampled for each prompt")
    parser.add_argument("--repetitions", type=int, default=5)
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
