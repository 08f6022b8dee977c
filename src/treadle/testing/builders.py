"""Small valid domain objects for tests: name what matters, the rest is filled in.

Everything built here would pass admission for a vocabulary of at least 64 tokens. Seeds make arrays reproducible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from treadle.domain.ids import ModelId, RequestId, SamplingSessionId, TenantId, op_request_id
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import (
    AdamParams,
    CreateModelOp,
    Datum,
    LoraSpec,
    OpKind,
    OptimStepOp,
    PassOp,
    SampleOp,
    SamplingParams,
)
from treadle.domain.plan import ModelQueue, PolicyInput, PolicyState, QueuedOp

MODEL_ID = ModelId("session:train:0")
TENANT_ID = TenantId("tenant")
# Token ids that every tokenizer has.
VOCAB_SIZE = 64


def datum(num_tokens: int = 8, *, seed: int = 0, weights: Sequence[float] | None = None) -> Datum:
    """A cross_entropy datum of random tokens; weights default to 1 everywhere."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB_SIZE, num_tokens + 1)
    return Datum(
        tokens=ids[:-1].astype(np.int32),
        inputs={
            "target_tokens": ids[1:].astype(np.int64),
            "weights": np.ones(num_tokens, np.float32) if weights is None else np.array(weights, np.float32),
        },
    )


def policy_gradient_datum(num_tokens: int = 8, *, seed: int = 0) -> Datum:
    """An importance_sampling or ppo datum: random tokens, sampling logprobs and advantages."""
    rng = np.random.default_rng(seed)
    plain = datum(num_tokens, seed=seed)
    return Datum(
        tokens=plain.tokens,
        inputs={
            "target_tokens": plain.inputs["target_tokens"],
            "logprobs": -rng.random(num_tokens).astype(np.float32),
            "advantages": rng.standard_normal(num_tokens).astype(np.float32),
        },
    )


def create_op(
    model_id: ModelId = MODEL_ID, *, base_model: str = "fake/base", rank: int = 8, seed: int = 0
) -> CreateModelOp:
    return CreateModelOp(model_id, base_model=base_model, lora=LoraSpec(rank=rank, seed=seed))


def pass_op(
    seq_id: int,
    *,
    model_id: ModelId = MODEL_ID,
    datums: Iterable[Datum] | None = None,
    loss: str = "cross_entropy",
    loss_config: Mapping[str, float] | None = None,
    forward_only: bool = False,
) -> PassOp:
    """One datum of eight tokens unless `datums` are given."""
    return PassOp(
        model_id=model_id,
        seq_id=seq_id,
        datums=tuple(datums) if datums is not None else (datum(seed=seq_id),),
        loss=resolve_loss(loss, loss_config or {}),
        forward_only=forward_only,
    )


def step_op(seq_id: int, *, model_id: ModelId = MODEL_ID, learning_rate: float = 1e-2) -> OptimStepOp:
    return OptimStepOp(model_id, seq_id, AdamParams(learning_rate=learning_rate))


def sample_op(
    seq_id: int = 1,
    *,
    sampling_session_id: str = "session:sample:0",
    prompt: Sequence[int] = (1, 2, 3),
    num_samples: int = 1,
    max_tokens: int | None = 4,
    seed: int = 0,
    temperature: float = 1.0,
    wants_prompt_logprobs: bool = False,
    topk_prompt_logprobs: int = 0,
) -> SampleOp:
    """A sample of the bare base model that never stops early."""
    return SampleOp(
        sampling_session_id=SamplingSessionId(sampling_session_id),
        seq_id=seq_id,
        prompt=np.array(prompt, np.int32),
        num_samples=num_samples,
        params=SamplingParams(seed=seed, max_tokens=max_tokens, temperature=temperature, use_eos=False),
        wants_prompt_logprobs=wants_prompt_logprobs,
        topk_prompt_logprobs=topk_prompt_logprobs,
    )


def queued(
    kind: OpKind,
    seq_id: int,
    *quantum_tokens: int,
    num_quanta_done: int = 0,
    queued_s: float = 0.0,
) -> QueuedOp:
    """A queued op as planning sees it; `model_queue` gives it its request id."""
    return QueuedOp(
        request_id=op_request_id(MODEL_ID, seq_id),
        seq_id=seq_id,
        kind=kind,
        quantum_tokens=quantum_tokens,
        num_quanta_done=num_quanta_done,
        queued_s=queued_s,
    )


def model_queue(
    *ops: QueuedOp,
    model_id: ModelId = MODEL_ID,
    tenant_id: TenantId = TENANT_ID,
    next_seq_id: int = 1,
    settled_seq_ids: Iterable[int] = (),
) -> ModelQueue:
    """A run's queue; its ops get the request ids that admission gives them."""
    return ModelQueue(
        model_id,
        tenant_id,
        next_seq_id,
        ops=tuple(replace(op, request_id=op_request_id(model_id, op.seq_id)) for op in ops),
        settled_seq_ids=frozenset(settled_seq_ids),
    )


def policy_input(
    *models: ModelQueue,
    state: PolicyState | None = None,
    budget_tokens: int = 8_192,
    tenant_cap_tokens: int = 8_192,
    gap_wait_s: float = 30.0,
    weights: Mapping[TenantId, float] | None = None,
    quarantined: Iterable[RequestId] = (),
) -> PolicyInput:
    return PolicyInput(
        models=models,
        state=state or PolicyState(),
        budget_tokens=budget_tokens,
        tenant_cap_tokens=tenant_cap_tokens,
        gap_wait_s=gap_wait_s,
        weights=weights or {},
        quarantined=frozenset(quarantined),
    )
