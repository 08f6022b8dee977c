"""Versions of the bundled model in a blob store, the truth about them from transformers and peft, and the two samplers
that the contract is run on."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sampler_support import BUNDLED
from transformers import AutoModelForCausalLM

from treadle.blobs import BlobStore, open_blobs
from treadle.domain.ids import BlobKey, RequestId
from treadle.domain.ops import LoraSpec
from treadle.domain.outcome import PoolFacts
from treadle.domain.plan import SampleWork
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.files import encode_state, export_peft
from treadle.engine.state import new_training_state
from treadle.executor.base import DeathCallback, PartsCallback, SamplesCallback
from treadle.executor.codec import decode_samples, encode_samples
from treadle.executor.messages import WorkerConfig
from treadle.sampler.tokenizer import load_token_bytes
from treadle.testing.sampler_contract import Floats
from treadle.worker.build import build_worker
from treadle.worker.worker import Worker


class BundledSubject:
    """See Subject: the bundled model and adapters on it."""

    # "7 + 15 = ", which the model goes on with for two lines before it ends.
    ending_prompt = (27, 357, 225, 21, 25, 298, 225)
    eos_ids = frozenset({0, 2})

    def __init__(self, directory: Path) -> None:
        self.blobs_url = str(directory / "blobs")
        self.blobs: BlobStore = open_blobs(self.blobs_url)
        self._exports = directory / "exports"
        token_bytes = load_token_bytes(BUNDLED)
        assert token_bytes is not None
        self.token_bytes = token_bytes
        self._base = _loaded("treadle/tiny")
        self._foreign = _loaded("somebody/else")
        self._plain: Any = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
        self._adapted: dict[BlobKey, Any] = {}
        self._num_versions = 0

    def new_version(self, *, seed: int, rank: int = 8, is_finite: bool = True, scale: float = 1.0) -> BlobKey:
        """See Subject."""
        data = _version(self._base, seed=seed, rank=rank, is_finite=is_finite, scale=scale)
        key = self._stored(data)
        if is_finite:
            path = self._exports / key.replace("/", "-")
            path.mkdir(parents=True)
            for name, content in export_peft(data).items():
                (path / name).write_bytes(content)
            model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
            with warnings.catch_warnings():
                # peft warns of what merging a tied output layer would do; nothing is merged here.
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                warnings.simplefilter("ignore", FutureWarning)
                self._adapted[key] = PeftModel.from_pretrained(model, str(path)).eval()
        return key

    def damaged_version(self) -> BlobKey:
        """See Subject."""
        data = bytearray(_version(self._base, seed=1, rank=8))
        data[len(data) // 2] ^= 1
        return self._stored(bytes(data))

    def foreign_version(self) -> BlobKey:
        """See Subject."""
        return self._stored(_version(self._foreign, seed=1, rank=8))

    def logprobs(self, key: BlobKey | None, tokens: Sequence[int]) -> Floats:
        """See Subject."""
        model = self._plain if key is None else self._adapted[key]
        with torch.no_grad():
            logits = model(torch.tensor([list(tokens)])).logits[0].float()
        rows: Floats = torch.log_softmax(logits, dim=-1).numpy()
        return rows

    def _stored(self, data: bytes) -> BlobKey:
        self._num_versions += 1
        key = BlobKey(f"contract/version/{self._num_versions}")
        self.blobs.write(key, data)
        return key


def _loaded(name: str) -> BaseModel:
    return load_base_model(str(BUNDLED), name=name, device="cpu", dtype="float32")


def _version(base: BaseModel, *, seed: int, rank: int, is_finite: bool = True, scale: float = 1.0) -> bytes:
    state = new_training_state(base, LoraSpec(rank=rank, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for module in state.weights.modules:
        state.weights.b(module).normal_(std=0.05 * scale, generator=generator)
    if not is_finite:
        state.weights.flat[:: max(1, len(state.weights.flat) // 50)] = float("nan")
    return encode_state(state, base, with_optimizer=False, applied_seq=1)


def worker_config(subject: BundledSubject, *, max_running: int) -> WorkerConfig:
    """Of a worker that samples the bundled model on one thread."""
    return WorkerConfig(
        base_model="treadle/tiny",
        source=str(BUNDLED),
        revision=None,
        device="cpu",
        dtype="auto",
        num_threads=1,
        blobs_url=subject.blobs_url,
        max_running_samples=max_running,
        max_cached_tokens=0,
    )


class InProcessExecutor:
    """A SamplingExecutor over a worker of this process: the built-in sampler behind the same forms, without a child."""

    def __init__(self, subject: BundledSubject, on_parts: PartsCallback, *, max_running: int) -> None:
        self._subject = subject
        self._on_parts = on_parts
        self._max_running = max_running
        self._worker: Worker | None = None
        self._stepping: asyncio.Task[None] | None = None

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        config = worker_config(self._subject, max_running=self._max_running)
        worker = self._worker = build_worker(
            base_model=config.base_model,
            source=config.source,
            revision=None,
            device="cpu",
            dtype="float32",
            num_threads=1,
            blobs=self._subject.blobs,
            max_running_samples=config.max_running_samples,
            max_cached_tokens=0,
            micro_batch_tokens=0,
        )
        self._on_samples = on_samples
        self._stepping = asyncio.create_task(self._step_forever(worker))
        return worker.facts

    async def _step_forever(self, worker: Worker) -> None:
        while True:
            if finished := worker.sample_step(0.02):
                self._on_samples(encode_samples(finished))
            if parts := worker.sampled_parts():
                self._on_parts(parts)
            await asyncio.sleep(0.001)

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        assert self._worker is not None
        decoded, refused = decode_samples(samples)
        self._worker.submit_samples(decoded)
        self._on_samples(refused)

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        assert self._worker is not None
        self._worker.cancel_samples(request_ids)

    async def stop(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
