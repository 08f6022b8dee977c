"""Parsed bodies to ops: what a request asks for, completed with what its run, checkpoint and pool say.

Every value an op leaves open is fixed here, once, so that replaying a stored op is exact: seeds are drawn by the
callable that the caller injects. Honour or refuse: a feature that treadle lacks is NotSupported, by name. Knows no
store; the gateway looks up runs and checkpoints and passes what is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.domain.ids import BlobKey, SessionId, checked_name, sampler_id, training_model_id
from treadle.domain.limits import MAX_LOGPROB_CELLS, MAX_STOP_CHARS, MAX_STOP_SEQUENCES
from treadle.domain.ops import (
    AdamParams,
    CreateModelOp,
    LoadWeightsOp,
    LoraSpec,
    OptimStepOp,
    SampleOp,
    SamplingParams,
    SaveForSamplerOp,
    SaveWeightsOp,
    UnloadModelOp,
)
from treadle.errors import InvalidRequest, NotSupported
from treadle.wire.bodies import (
    AdamParamsBody,
    CreateModelBody,
    LoadWeightsBody,
    OptimStepBody,
    SampleBody,
    SamplingParamsBody,
    SaveForSamplerBody,
    SaveWeightsBody,
    UnloadModelBody,
)
from treadle.wire.passes import PassLimits
from treadle.wire.prompt_targets import prompt_targets

# A fresh seed in [0, 2**63).
SeedSource = Callable[[], int]


def create_model_op(body: CreateModelBody, *, base_model: str, max_rank: int, draw_seed: SeedSource) -> CreateModelOp:
    """A fresh run on the pool named `base_model` (the body's name may be an alias of it).

    Raises InvalidRequest for a rank outside 1 to `max_rank` or no layer to train, NotSupported without a lora_config.
    """
    lora = body.lora_config
    if lora is None:
        raise NotSupported("create_model without lora_config asks for full fine-tuning; send lora_config")
    if not 1 <= lora.rank <= max_rank:
        raise InvalidRequest(f"lora_config.rank={lora.rank} is outside this server's bounds of 1 to {max_rank}")
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise InvalidRequest("lora_config trains nothing; set at least one of train_attn, train_mlp, train_unembed")
    return CreateModelOp(
        model_id=training_model_id(body.session_id, body.model_seq_id),
        base_model=base_model,
        lora=LoraSpec(
            rank=lora.rank,
            seed=draw_seed() if lora.seed is None else lora.seed,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
        ),
    )


def load_weights_op(body: LoadWeightsBody, *, blob_key: BlobKey, lora: LoraSpec) -> LoadWeightsOp:
    """The load of the checkpoint whose blob and adapter shape the caller has looked up.

    A load that creates its run is op 0 of it, so the run's next op has seq_id 1.
    """
    if body.session_id is not None:
        assert body.model_seq_id is not None
        model_id, seq_id = training_model_id(body.session_id, body.model_seq_id), 0
    else:
        assert body.model_id is not None
        assert body.seq_id is not None
        model_id, seq_id = body.model_id, body.seq_id
    return LoadWeightsOp(
        model_id=model_id,
        seq_id=seq_id,
        path=body.path,
        blob_key=blob_key,
        lora=lora,
        with_optimizer=body.optimizer,
        creates_model=body.creates_model,
    )


def optim_step_op(body: OptimStepBody) -> OptimStepOp:
    """One AdamW step. Raises NotSupported for another optimizer's parameters, InvalidRequest for none at all."""
    if body.optimizer_params is not None:
        family = body.optimizer_params.get("type") if isinstance(body.optimizer_params, dict) else None
        raise NotSupported(
            f"optimizer_params of type {str(family)[:80]!r} are not supported; send adam_params for AdamW"
        )
    adam = body.adam_params
    if adam is None:
        raise InvalidRequest("adam_params is missing; an empty object takes the defaults")
    return OptimStepOp(body.model_id, body.seq_id, _adam_params(adam))


def _adam_params(adam: AdamParamsBody) -> AdamParams:
    return AdamParams(
        learning_rate=adam.learning_rate,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip_norm=adam.grad_clip_norm,
    )


def save_weights_op(body: SaveWeightsBody) -> SaveWeightsOp:
    """A training checkpoint. A save without a name is named after its sequence number."""
    return SaveWeightsOp(
        model_id=body.model_id,
        seq_id=body.seq_id,
        name=checked_name(body.path if body.path is not None else f"{body.seq_id:06d}"),
        overwrite=body.overwrite,
        ttl_s=body.ttl_seconds,
        user_metadata=body.user_metadata,
    )


def save_for_sampler_op(body: SaveForSamplerBody, *, session_id: SessionId) -> SaveForSamplerOp:
    """Sampler weights: named, or for a new sampling session of the run's own session `session_id`.

    Raises InvalidRequest unless exactly one of `path` and `sampling_session_seq_id` is there, and for a name that is
    to move on.
    """
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise InvalidRequest("save_weights_for_sampler needs either path or sampling_session_seq_id")
    is_inflight = body.kind == "inflight"
    if is_inflight and body.path is not None:
        raise InvalidRequest(
            f"save_weights_for_sampler of kind inflight cannot be named, as {body.path[:80]!r}: what has a name stays "
            "as it is; leave path out, or send kind snapshot"
        )
    ephemeral = body.sampling_session_seq_id
    return SaveForSamplerOp(
        model_id=body.model_id,
        seq_id=body.seq_id,
        name=None if body.path is None else checked_name(body.path),
        sampling_session_id=None if ephemeral is None else sampler_id(session_id, ephemeral),
        is_inflight=is_inflight,
        ttl_s=body.ttl_seconds,
        user_metadata=body.user_metadata,
    )


def unload_model_op(body: UnloadModelBody, *, seq_id: int) -> UnloadModelOp:
    """The end of a run. The SDK sends no seq_id with it, so the caller gives it its place."""
    return UnloadModelOp(body.model_id, seq_id)


def sample_op(body: SampleBody, *, blob_key: BlobKey | None, limits: PassLimits, draw_seed: SeedSource) -> SampleOp:
    """The sample from the weights under `blob_key` (None: the base model), checked against the pool's `limits`.

    Raises InvalidRequest for a prompt, stop or length that the model cannot take, NotSupported for features that
    treadle lacks.
    """
    prompt = flat_prompt(body.prompt, vocab_size=limits.vocab_size)
    _check_room(len(prompt), body.sampling_params.max_tokens, limits)
    _check_last_n(body, len(prompt))
    targets = None
    if body.target_prompt_logprobs is not None:
        targets = prompt_targets(
            body.target_prompt_logprobs, num_prompt_tokens=len(prompt), vocab_size=limits.vocab_size
        )
    num_target_cells = 0 if targets is None else len(targets.token_ids)
    _check_tables(body, num_prompt_tokens=len(prompt), num_target_cells=num_target_cells, limits=limits)
    params = _sampling_params(body.sampling_params, limits.vocab_size, draw_seed)
    if params.max_tokens is None and limits.context_note:
        # A sampler would go on to the end of the model's context, which is further.
        params = replace(params, max_tokens=limits.max_context_length - len(prompt))
    return SampleOp(
        sampling_session_id=body.sampling_session_id,
        seq_id=body.seq_id,
        prompt=prompt,
        num_samples=body.num_samples,
        params=params,
        blob_key=blob_key,
        wants_prompt_logprobs=body.prompt_logprobs,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        record_stability_info=body.record_stability_info,
    )


def flat_prompt(prompt: Any, *, vocab_size: int) -> NDArray[np.int32]:
    """The tokens of a model input, int32 [P], with P >= 1.

    Chunks are told apart by their fields, since older SDKs send no type tags. Raises InvalidRequest for anything
    malformed or outside the vocabulary, NotSupported for images and audio.
    """
    chunks = prompt.get("chunks") if isinstance(prompt, dict) else None
    if not isinstance(chunks, list):
        raise InvalidRequest("prompt must be an object with a list of chunks")
    tokens: list[int] = []
    for index, chunk in enumerate(chunks):
        if not isinstance(chunk, dict):
            raise InvalidRequest(f"prompt.chunks[{index}] must be an object")
        kind = chunk.get("type")
        chunk_tokens = chunk.get("tokens")
        if kind != "encoded_text" and (kind is not None or chunk_tokens is None):
            shown = str(kind or ", ".join(sorted(chunk)))[:80]
            raise NotSupported(f"prompt.chunks[{index}] is of kind {shown!r}; only encoded_text is supported")
        if not isinstance(chunk_tokens, list) or not set(map(type, chunk_tokens)) <= {int}:
            raise InvalidRequest(f"prompt.chunks[{index}].tokens must be a list of integers")
        tokens += chunk_tokens
    if not tokens:
        raise InvalidRequest("prompt has no tokens")
    lowest, highest = min(tokens), max(tokens)
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequest(f"prompt[{tokens.index(bad)}] is {bad}, outside the vocabulary [0, {vocab_size})")
    return np.array(tokens, dtype=np.int32)


def _check_last_n(body: SampleBody, num_prompt_tokens: int) -> None:
    last_n = body.prompt_logprobs_last_n
    if last_n is None:
        return
    if not body.prompt_logprobs:
        raise InvalidRequest(f"prompt_logprobs_last_n={last_n} is about prompt_logprobs; set prompt_logprobs too")
    if last_n >= num_prompt_tokens:
        raise InvalidRequest(
            f"prompt_logprobs_last_n={last_n} with a prompt of {num_prompt_tokens} tokens; "
            f"allowed are 1 to {num_prompt_tokens - 1}, since nothing predicts the first token"
        )


def _check_tables(body: SampleBody, *, num_prompt_tokens: int, num_target_cells: int, limits: PassLimits) -> None:
    """Refuses logprobs in numbers that one answer cannot hold, and more of the most likely tokens than there are."""
    for name, k in (
        ("topk_prompt_logprobs", body.topk_prompt_logprobs),
        ("topk_sample_logprobs", body.topk_sample_logprobs),
    ):
        if k > limits.vocab_size:
            raise InvalidRequest(f"{name}={k} is over the vocabulary of {limits.vocab_size}")
    num_places = limits.max_context_length - num_prompt_tokens
    num_sampled = body.num_samples * min(num_places, body.sampling_params.max_tokens or num_places)
    num_cells = (
        num_prompt_tokens * (body.topk_prompt_logprobs + body.prompt_alt_tokens_k)
        + num_sampled * body.topk_sample_logprobs
        + num_target_cells
    )
    if num_cells > MAX_LOGPROB_CELLS:
        raise InvalidRequest(
            f"this sample asks for up to {num_cells} logprobs (topk_prompt_logprobs={body.topk_prompt_logprobs}, "
            f"topk_sample_logprobs={body.topk_sample_logprobs}, prompt_alt_tokens_k={body.prompt_alt_tokens_k}, "
            f"{num_target_cells} of target_prompt_logprobs, {num_prompt_tokens} prompt tokens, up to {num_sampled} "
            f"sampled ones); allowed are {MAX_LOGPROB_CELLS}"
        )


def _check_room(num_prompt_tokens: int, max_tokens: int | None, limits: PassLimits) -> None:
    """Refuses what cannot fit instead of cutting it short. Clients know an overflow by these words and numbers."""
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt_tokens + wanted > limits.max_context_length:
        raise InvalidRequest(
            f"Prompt length plus max_tokens exceeds the model's context window: {num_prompt_tokens} prompt tokens + "
            f"{wanted} max_tokens > {limits.max_context_length}{limits.context_note}"
        )


def _sampling_params(params: SamplingParamsBody, vocab_size: int, draw_seed: SeedSource) -> SamplingParams:
    stop_strings, stop_token_ids = _stops(params.stop, vocab_size)
    return SamplingParams(
        seed=draw_seed() if params.seed is None else params.seed,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        # At the vocabulary's size the limit is no limit, so this changes nothing but what samplers must guard against.
        top_k=min(params.top_k, vocab_size),
        top_p=params.top_p,
        stop_strings=stop_strings,
        stop_token_ids=stop_token_ids,
        # An empty list is not the same as none: it switches every stop off, EOS too.
        use_eos=params.stop != [],
    )


def _stops(stop: Any, vocab_size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings and stop token ids; one of the two is empty."""
    if stop is None:
        return (), ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list):
        raise InvalidRequest("sampling_params.stop must be a string, a list of strings or a list of token ids")
    if len(stops) > MAX_STOP_SEQUENCES:
        raise InvalidRequest(f"sampling_params.stop has {len(stops)} entries; allowed are {MAX_STOP_SEQUENCES}")
    kinds = set(map(type, stops))
    if kinds <= {str}:
        for text in stops:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest(
                    f"a string of sampling_params.stop has {len(text)} characters; allowed are 1 to {MAX_STOP_CHARS}"
                )
        return tuple(stops), ()
    if kinds != {int}:
        raise InvalidRequest("sampling_params.stop mixes kinds; send only strings or only token ids")
    for token_id in stops:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"sampling_params.stop has token {token_id}, outside the vocabulary [0, {vocab_size})")
    return (), tuple(stops)
