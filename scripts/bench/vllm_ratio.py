"""vLLM against the built-in sampler, both behind their executors, on this machine's CPU: tokens per second, as a ratio.

    python scripts/bench/vllm_ratio.py [--model 27m] [--threads 1] [--tokens 48] [--repetitions 3]
                                       [--json FILE] [--save] [--baseline FILE]

Samples are drawn at temperature 1 by a process of its own on either side, which has the same number of threads, and
come back as the bytes that clients get. Sides take turns, repetition by repetition, while the other one idles. Sides
differ by how many samples run at once and under how many adapters of rank 16 (0: the base model). The ratio is vLLM's
rate over the built-in sampler's: above 1 vLLM is faster. Before anything is timed both must give the same greedy
tokens. Needs an environment with vLLM (docs/vllm.md), found as the tests find it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

import models
import numpy as np
import report
import torch

from treadle.blobs import open_blobs
from treadle.domain.ids import BlobKey, RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import LoraSpec, SampleOp, SamplingParams
from treadle.domain.outcome import SampleOutcome
from treadle.domain.plan import SampleWork
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.files import encode_state
from treadle.engine.state import new_training_state
from treadle.executor.base import SamplingExecutor
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.executor.vllm import VllmExecutor
from treadle.sampler.vllm_options import VllmOptions
from treadle.testing.vllm_environment import NOT_FOUND, find_vllm_python
from treadle.wire.payloads import encode_payload
from treadle.wire.sampled import decode_sample_result

# (samples at once, adapters among them)
SIDES = ((1, 0), (16, 0), (1, 1), (8, 1), (8, 8), (16, 1), (16, 8))
NUM_ADAPTERS = 8
PROMPT_TOKENS = 32
RANK = 16
MARGIN = 0.3
TIMEOUT_S = 300.0


class Sampler:
    """A started executor that is asked and waited for."""

    def __init__(self, executor: SamplingExecutor) -> None:
        self._executor = executor
        self._waiting: dict[RequestId, asyncio.Future[SampleOutcome]] = {}
        self._ids = count()

    async def start(self) -> None:
        await self._executor.start(on_samples=self._take, on_death=lambda reason: print(f"died: {reason}"))

    async def stop(self) -> None:
        await self._executor.stop()

    def _take(self, outcomes: Sequence[SampleOutcome]) -> None:
        for outcome in outcomes:
            self._waiting.pop(outcome.request_id).set_result(outcome)

    async def run(self, ops: Sequence[SampleOp]) -> list[SampleOutcome]:
        works, waiting = [], []
        for op in ops:
            request_id = RequestId(f"bench-{next(self._ids)}")
            future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
            waiting.append(future)
            works.append(SampleWork(request_id, TenantId(f"t{len(works) % 4}"), encode_payload(op)))
        self._executor.submit_samples(works)
        async with asyncio.timeout(TIMEOUT_S):
            outcomes = [await future for future in waiting]
        failed = [outcome for outcome in outcomes if outcome.encoded is None]
        assert not failed, failed[:1]
        return outcomes


def main() -> int:
    args = _arguments()
    python = find_vllm_python()
    if python is None:
        print(NOT_FOUND)
        return 2
    with tempfile.TemporaryDirectory(prefix="treadle-bench-") as folder:
        result = asyncio.run(measure(Path(folder), python, args))
    result = {"benchmark": "vllm_ratio", "model": args.model, "threads": args.threads, **report.context(), **result}
    show(result)
    report.write(report.path_of(args, "vllm_ratio"), result)
    return report.compare(args, result, margin=MARGIN)


async def measure(folder: Path, python: Path, args: argparse.Namespace) -> dict[str, Any]:
    directory = models.make_model(folder, args.model)
    blobs_url = str(folder / "blobs")
    base = load_base_model(str(directory), name="bench", device="cpu", dtype="float32", num_threads=1)
    keys = _versions(base, blobs_url)
    config = WorkerConfig(
        base_model="bench",
        source=str(directory),
        revision=None,
        device="cpu",
        dtype="float32",
        num_threads=args.threads,
        blobs_url=blobs_url,
        max_running_samples=32,
        max_cached_tokens=0,
    )
    options = VllmOptions(max_adapters=NUM_ADAPTERS, cpu_cache_bytes=512 * 2**20)
    sides = {
        "builtin": Sampler(LocalExecutor(config)),
        "vllm": Sampler(VllmExecutor(config, options=options, python=python)),
    }
    rates: dict[str, dict[str, list[float]]] = {_label(side): {"builtin": [], "vllm": []} for side in SIDES}
    async with AsyncExitStack() as stack:
        for sampler in sides.values():
            stack.push_async_callback(sampler.stop)
            await sampler.start()
        await _check_alike(sides, base, keys)
        for number in range(args.repetitions):
            for side in SIDES:
                ops = _ops(base, keys, side, num_tokens=args.tokens, seed=number)
                for name, sampler in sides.items():
                    start = time.perf_counter()
                    outcomes = await sampler.run(ops)
                    seconds = time.perf_counter() - start
                    rates[_label(side)][name].append(sum(one.num_sampled_tokens for one in outcomes) / seconds)
    return {
        "tokens": args.tokens,
        "tokens_per_s": {
            label: {name: report.spread(values) for name, values in by_name.items()} for label, by_name in rates.items()
        },
        "ratios": {
            label: statistics.median(v / b for v, b in zip(by_name["vllm"], by_name["builtin"], strict=True))
            for label, by_name in rates.items()
        },
    }


def _label(side: tuple[int, int]) -> str:
    return f"{side[0]} at once, {side[1]} adapters"


def _versions(base: BaseModel, blobs_url: str) -> list[BlobKey]:
    blobs = open_blobs(blobs_url)
    keys = []
    for seed in range(NUM_ADAPTERS):
        state = new_training_state(base, LoraSpec(rank=RANK, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        for module in state.weights.modules:
            state.weights.b(module).normal_(std=0.02, generator=generator)
        key = BlobKey(f"bench/version/{seed}")
        blobs.write(key, encode_state(state, base, with_optimizer=False, applied_seq=1))
        keys.append(key)
    return keys


def _ops(
    base: BaseModel, keys: Sequence[BlobKey], side: tuple[int, int], *, num_tokens: int, seed: int, greedy: bool = False
) -> list[SampleOp]:
    num_samples, num_adapters = side
    # Prompts of their own in every repetition: none was read before.
    generator = np.random.default_rng([seed, num_samples, num_adapters])
    return [
        SampleOp(
            sampling_session_id=SamplingSessionId("bench"),
            seq_id=1,
            prompt=generator.integers(10, base.vocab_size, size=PROMPT_TOKENS).astype(np.int32),
            num_samples=1,
            params=SamplingParams(seed=index, max_tokens=num_tokens, temperature=0.0 if greedy else 1.0, use_eos=False),
            blob_key=keys[index % num_adapters] if num_adapters else None,
        )
        for index in range(num_samples)
    ]


async def _check_alike(sides: dict[str, Sampler], base: BaseModel, keys: Sequence[BlobKey]) -> None:
    """Both sides warm, and of one opinion."""
    for side in SIDES:
        ops = _ops(base, keys, side, num_tokens=8, seed=1_000, greedy=True)
        texts = []
        for sampler in sides.values():
            results = [decode_sample_result(one.encoded.body) for one in await sampler.run(ops) if one.encoded]
            texts.append([one.sequences[0].tokens.tolist() for one in results])
        assert texts[0] == texts[1], f"the samplers differ with {_label(side)}"


def show(result: dict[str, Any]) -> None:
    rows = [
        [label, by_name["builtin"]["median"], by_name["vllm"]["median"], result["ratios"][label]]
        for label, by_name in result["tokens_per_s"].items()
    ]
    title = (
        f"Tokens per second, {result['model']}, {result['threads']} thread(s), load {result['load_average_at_start']}"
    )
    report.print_table(title, ["", "built in", "vLLM", "vLLM / built in"], rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="27m", choices=sorted(models.SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
