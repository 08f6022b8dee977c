"""A language model small enough to read, for the fake executor: the next token is the last one plus a difference.

    p(y | x) = softmax(base + w)[(y - x) mod V]      base_d = cos(d), w float64 [V], all zeros in a fresh run

Everything the API returns follows from it by honest mathematics, so training learns (a fixed phrase, a reward),
sampling draws from what was trained, and the logprobs of both agree. It knows no tags, no plans and no blobs.

    pass: grad_w += sum_t g_t * (onehot(d_t) - p), g_t = d loss / d logp_t; mass += sum_t |g_t|
    step: w -= min(3, 300 * learning_rate) * grad_w / mass

That is gradient descent on a convex loss with a step below 4 = 2 / (largest curvature 1/2), so cross_entropy with
weights >= 0 never gets worse. The other optimiser settings, the LoRA spec and the seed change nothing here.
Invariant: states are values. Nothing changes in place, so an op that fails has left no trace.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from treadle.domain.adapter_file import CONFIG_NAME, WEIGHTS_NAME, config_file
from treadle.domain.losses import Loss
from treadle.domain.ops import AdamParams, LoraSpec, PassOp, SampleOp, SamplingParams
from treadle.domain.outcome import PassResult, SampledSequence, SampleResult, TopkLogprobs
from treadle.domain.states import StopReason
from treadle.errors import InvalidRequest, NoGradient, NonFiniteResult, NotSupported

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

STEP_PER_LEARNING_RATE = 300.0
MAX_STEP = 3.0


@dataclass(frozen=True, slots=True)
class FakeState:
    """A run: weights [V], the gradient [V] since the last step with its mass, and how many passes and steps it saw."""

    lora: LoraSpec
    weights: Floats
    grad: Floats
    grad_mass: float = 0.0
    num_open_passes: int = 0
    num_steps: int = 0


def new_state(lora: LoraSpec, vocab_size: int) -> FakeState:
    """A run that nothing has trained yet."""
    return FakeState(lora=lora, weights=np.zeros(vocab_size), grad=np.zeros(vocab_size))


def log_differences(weights: Floats) -> Floats:
    """log p of every difference, float64 [V]."""
    logits = np.cos(np.arange(len(weights))) + weights
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float64)


def run_pass(state: FakeState, op: PassOp) -> tuple[PassResult, FakeState]:
    """The result, and the state with the gradient added (the same state for forward_only).

    Raises InvalidRequest for ids outside the vocabulary, NotSupported for a loss it does not know, NonFiniteResult.
    """
    vocab_size = len(state.weights)
    log_p = log_differences(state.weights if op.uses_adapter else np.zeros(vocab_size))
    logprobs: list[NDArray[np.float32]] = []
    total_loss = 0.0
    grad, mass = state.grad.copy(), state.grad_mass
    for index, datum in enumerate(op.datums):
        targets = datum.inputs["target_tokens"].astype(np.int64)
        for name, ids in (("tokens", datum.tokens), ("target_tokens", targets)):
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise InvalidRequest(f"datum {index}: {name} hold an id outside the vocabulary of {vocab_size}")
        tokens = datum.tokens.astype(np.int64).reshape(-1, *[1] * (targets.ndim - 1))
        differences = (targets - tokens) % vocab_size
        logp = log_p[differences]
        loss_terms, slope = _loss(op.loss, logp, datum.inputs)
        total_loss += float(loss_terms.sum())
        np.add.at(grad, differences, slope)
        grad -= slope.sum() * np.exp(log_p)
        mass += float(np.abs(slope).sum())
        logprobs.append(logp.astype(np.float32))
    if not (np.isfinite(total_loss) and np.isfinite(grad).all()):
        raise NonFiniteResult(f"the {op.loss.name} loss or its gradient is not finite")
    result = PassResult(logprobs=tuple(logprobs), metrics={"loss:sum": total_loss})
    if op.forward_only:
        return result, state
    return result, replace(state, grad=grad, grad_mass=mass, num_open_passes=state.num_open_passes + 1)


def run_step(state: FakeState, adam: AdamParams) -> tuple[Mapping[str, float], FakeState]:
    """Metrics, and the state after the step. Raises NoGradient without a pass since the last one."""
    if state.num_open_passes == 0:
        raise NoGradient("optim_step without a successful forward_backward since the last optim_step")
    step = min(MAX_STEP, STEP_PER_LEARNING_RATE * adam.learning_rate)
    weights = state.weights - step * state.grad / max(state.grad_mass, 1e-12)
    metrics = {
        "grad_norm": float(np.linalg.norm(state.grad)),
        "update_norm": float(np.linalg.norm(weights - state.weights)),
        "num_steps": float(state.num_steps + 1),
        "learning_rate": adam.learning_rate,
    }
    return metrics, replace(new_state(state.lora, len(weights)), weights=weights, num_steps=state.num_steps + 1)


def _loss(loss: Loss, logp: Floats, inputs: Mapping[str, NDArray[Any]]) -> tuple[Floats, Floats]:
    """Loss per target and its derivative by logp; the same formulas as in the engine's losses."""
    if loss.name == "cross_entropy":
        weights = inputs["weights"].astype(np.float64) if "weights" in inputs else np.ones_like(logp)
        return -weights * logp, -weights
    if loss.name not in ("importance_sampling", "ppo"):
        raise NotSupported(f"the fake executor does not know loss_fn {loss.name!r}")
    advantages = inputs["advantages"].astype(np.float64)
    ratio = np.exp(logp - inputs["logprobs"].astype(np.float64))
    free = ratio * advantages
    if loss.name == "importance_sampling":
        return -free, -free
    low, high = (inputs.get(name, loss.config[name]) for name in ("clip_low_threshold", "clip_high_threshold"))
    clipped = np.clip(ratio, low, high) * advantages
    return -np.minimum(free, clipped), np.where(clipped < free, 0.0, -free)


def run_sample(
    weights: Floats, op: SampleOp, *, max_context_length: int, eos_token_ids: frozenset[int]
) -> SampleResult:
    """The sequences and what was asked about the prompt. A sequence depends on (seed, its index) alone.

    Raises InvalidRequest for a prompt that does not fit, and for string stops: there is no tokenizer here.
    """
    vocab_size, prompt = len(weights), op.prompt.astype(np.int64)
    if not 1 <= len(prompt) <= max_context_length:
        raise InvalidRequest(f"the prompt has {len(prompt)} tokens; this model takes 1 to {max_context_length}")
    if not 0 <= prompt.min() <= prompt.max() < vocab_size:
        raise InvalidRequest(f"the prompt holds an id outside the vocabulary of {vocab_size}")
    asks_for_more = op.topk_sample_logprobs or op.prompt_alt_tokens_k or op.prompt_logprobs_last_n is not None
    if asks_for_more or op.target_prompt_logprobs is not None:
        raise NotSupported("the fake executor knows only logprobs and top-k logprobs of the whole prompt")
    if op.params.stop_strings:
        raise InvalidRequest(f"stop string {op.params.stop_strings[0]!r} cannot be matched: send token ids")
    log_p = log_differences(weights)
    places = max(1, max_context_length - len(prompt))
    max_tokens = places if op.params.max_tokens is None else min(places, op.params.max_tokens)
    stops = frozenset(op.params.stop_token_ids) | (eos_token_ids if op.params.use_eos else frozenset())
    draw_from = _cumulative(log_p, op.params)
    prompt_logprobs = None
    if op.wants_prompt_logprobs:
        known = log_p[np.diff(prompt) % vocab_size]
        prompt_logprobs = np.concatenate([[np.nan], known]).astype(np.float32)
    return SampleResult(
        sequences=tuple(
            _draw_sequence(int(prompt[-1]), log_p, draw_from, _generator(op.params.seed, index), max_tokens, stops)
            for index in range(op.num_samples)
        ),
        prompt_logprobs=prompt_logprobs,
        topk_prompt_logprobs=_topk(prompt, log_p, op.topk_prompt_logprobs) if op.topk_prompt_logprobs else None,
    )


def _cumulative(log_p: Floats, params: SamplingParams) -> Floats:
    """Cumulative probabilities of the differences after temperature, top_k and top_p, in that order."""
    if params.temperature == 0.0:
        probs = np.zeros_like(log_p)
        probs[log_p.argmax()] = 1.0
        return np.cumsum(probs)
    probs = np.exp((log_p - log_p.max()) / params.temperature)
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0.0
    probs /= probs.sum()
    if params.top_p < 1.0:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0.0
    cumulative = np.cumsum(probs)
    return np.asarray(cumulative / cumulative[-1], dtype=np.float64)


def _draw_sequence(
    last: int, log_p: Floats, draw_from: Floats, rng: np.random.Generator, max_tokens: int, stops: frozenset[int]
) -> SampledSequence:
    tokens: list[int] = []
    logprobs: list[float] = []
    reason = StopReason.LENGTH
    while len(tokens) < max_tokens:
        difference = min(int(np.searchsorted(draw_from, rng.random(), side="right")), len(log_p) - 1)
        last = (last + difference) % len(log_p)
        tokens.append(last)
        logprobs.append(float(log_p[difference]))
        if last in stops:
            reason = StopReason.STOP
            break
    return SampledSequence(np.array(tokens, np.int32), np.array(logprobs, np.float32), reason)


def _topk(prompt: Ids, log_p: Floats, k: int) -> TopkLogprobs:
    best = np.argsort(-log_p, kind="stable")[:k]
    token_ids = np.zeros((len(prompt), k), dtype=np.int32)
    logprobs = np.full((len(prompt), k), np.nan, dtype=np.float32)
    token_ids[1:] = (prompt[:-1, None] + best) % len(log_p)
    logprobs[1:] = log_p[best]
    return TopkLogprobs(token_ids, logprobs)


def _generator(seed: int, index: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def encode_state(state: FakeState) -> bytes:
    """The state as a .npz file."""
    file = io.BytesIO()
    scalars = {
        "lora": asdict(state.lora),
        "grad_mass": state.grad_mass,
        "num_open_passes": state.num_open_passes,
        "num_steps": state.num_steps,
    }
    np.savez(file, weights=state.weights, grad=state.grad, scalars=np.array(json.dumps(scalars)))
    return file.getvalue()


def decode_state(data: bytes, vocab_size: int) -> FakeState:
    """The state that `encode_state` wrote. Raises InvalidRequest when it is none, or of another vocabulary."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            weights, grad, scalars = arrays["weights"], arrays["grad"], json.loads(str(arrays["scalars"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidRequest("this checkpoint was not written by the fake executor") from error
    if len(weights) != vocab_size:
        raise InvalidRequest(f"this checkpoint is for a vocabulary of {len(weights)}, the model has {vocab_size}")
    return FakeState(weights=weights, grad=grad, **{**scalars, "lora": LoraSpec(**scalars["lora"])})


def export_state(state: FakeState, *, base_model: str) -> dict[str, bytes]:
    """Files named like those of a PEFT directory, with the weights in one tensor. No library makes a model of them."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.lora.rank,
        "lora_alpha": state.lora.alpha,
        "target_modules": [],
    }
    return {
        CONFIG_NAME: config_file(config),
        WEIGHTS_NAME: safetensors.numpy.save({"fake.weights": state.weights}, {"format": "pt"}),
    }


def weights_only(state: FakeState) -> FakeState:
    """What a load without the optimiser takes over: no gradient and no step count."""
    return replace(new_state(state.lora, len(state.weights)), weights=state.weights)
