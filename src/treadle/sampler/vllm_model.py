"""The base model as a vLLM process has to know it, without its weights, and adapters as vLLM reads them.

Facts, stops and tokenizer come from where the worker's own come from, so that both samplers speak of one model; an
adapter's file is checked as the worker checks it. It knows no engine.
Invariant: an adapter of another base model, revision or shape never reaches vLLM.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from transformers import GenerationConfig, PreTrainedConfig

from treadle.domain.adapter_file import CONFIG_NAME, TENSOR_PREFIX, WEIGHTS_NAME
from treadle.domain.outcome import PoolFacts
from treadle.engine import loading
from treadle.engine.adapter import ATTENTION_PROJECTIONS, HEAD_MODULE, MLP_PROJECTIONS
from treadle.engine.files import export_vllm, read_header
from treadle.errors import ConfigError, InvalidRequest, NonFiniteResult
from treadle.sampler.stops import tokenizer_eos_id
from treadle.sampler.tokenizer import TokenBytes, load_token_bytes


class NotForVllm(Exception):
    """vLLM cannot do this and the built-in sampler can; `reason` is for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VllmModel:
    """source: directory or hub name that vLLM loads, at facts.revision unless it is a directory.

    zero_module: dotted name and shape (outputs, inputs) of the projection that the zero adapter names.
    """

    source: str
    facts: PoolFacts
    eos_ids: frozenset[int]
    token_bytes: TokenBytes | None
    zero_module: tuple[str, tuple[int, ...]]


def read_vllm_model(
    source: str, revision: str | None, *, name: str, dtype: str, device: str, profile: str
) -> VllmModel:
    """What the model's files say. Raises ConfigError when they cannot be read or it is no model that vLLM adapts."""
    config = loading.read_config(source, revision)
    outline = loading.outline(config)
    place = loading.locate(source, config, revision)
    token_bytes = load_token_bytes(place.tokenizer_dir)
    facts = PoolFacts(
        base_model=name,
        revision=place.revision,
        architecture=outline.class_name,
        vocab_size=int(config.vocab_size),
        max_context_length=int(config.max_position_embeddings),
        num_parameters=sum(math.prod(shape) for shape in outline.parameters.values()),
        dtype=dtype,
        device=device,
        numerics_profile=profile,
        source_dir=place.source_dir,
        tokenizer_dir=place.tokenizer_dir,
        trainable_targets=(*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, HEAD_MODULE),
    )
    return VllmModel(
        source=place.source_dir or source,
        facts=facts,
        eos_ids=_eos_ids(source, revision, config, place.tokenizer_dir, token_bytes),
        token_bytes=token_bytes,
        zero_module=_zero_module(outline),
    )


def _eos_ids(
    source: str,
    revision: str | None,
    config: PreTrainedConfig,
    tokenizer_dir: str | None,
    token_bytes: TokenBytes | None,
) -> frozenset[int]:
    """EOS ids as the built-in sampler has them: generation_config's, else config's, else the tokenizer's own."""
    try:
        generation = GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:
        generation = None  # The model has none.
    for holder in (generation, config):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return frozenset(map(int, ids)) if isinstance(ids, list | tuple) else frozenset({int(ids)})
    found = tokenizer_eos_id(tokenizer_dir, token_bytes)
    return frozenset() if found is None else frozenset({found})


def _zero_module(outline: loading.Outline) -> tuple[str, tuple[int, ...]]:
    for name in outline.linears:
        if name.rpartition(".")[2] in ATTENTION_PROJECTIONS:
            return name, outline.parameters[f"{name}.weight"]
    raise ConfigError(f"{outline.class_name} has none of the projections that adapters change")


def write_zero_adapter(model: VllmModel, directory: Path) -> None:
    """An adapter that changes nothing, as a new directory: what samples of the base model name."""
    name, (num_outputs, num_inputs) = model.zero_module
    tensors = {
        f"{TENSOR_PREFIX}{name}.lora_A.weight": np.zeros((1, num_inputs), dtype=np.float32),
        f"{TENSOR_PREFIX}{name}.lora_B.weight": np.zeros((num_outputs, 1), dtype=np.float32),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [name.rpartition(".")[2]],
        "bias": "none",
    }
    _write(directory, {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: safetensors.numpy.save(tensors)})


def write_adapter(data: bytes, directory: Path, facts: PoolFacts, *, max_rank: int) -> None:
    """The adapter of a checkpoint's file as a new directory that vLLM reads.

    Raises InvalidRequest for a damaged file or one of another base model, NonFiniteResult for one that holds what is
    no number (its keys and values would stay in vLLM's cache and spoil others'), NotForVllm without room for its rank.
    """
    header = read_header(data)
    for what, theirs, ours in (
        ("base model", header.base_model, facts.base_model),
        ("base model revision", header.revision, facts.revision),
    ):
        if theirs != ours:
            raise InvalidRequest(f"the checkpoint was made for {what} {theirs!r}, this one is {ours!r}")
    if header.lora.rank > max_rank:
        raise NotForVllm(f"rank {header.lora.rank} over sampler.vllm.max_lora_rank, {max_rank}")
    if header.adapter_config["target_parameters"]:
        # vLLM's CPU build computes none, and no other one was there to compare with.
        raise NotForVllm("an adapter on experts")
    files = export_vllm(data)
    if not all(np.isfinite(array).all() for array in safetensors.numpy.load(files[WEIGHTS_NAME]).values()):
        raise NonFiniteResult("these weights are not finite; nothing can be sampled from them")
    _write(directory, files)


def _write(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(mode=0o700)
    for name, content in files.items():
        (directory / name).write_bytes(content)
