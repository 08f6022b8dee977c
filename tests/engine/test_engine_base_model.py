"""Loading: what is accepted, what is refused, and one forward for any number of tenants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engine_builders import VOCAB_SIZE, load_tiny, make_datums, make_state, quantum_of

from treadle.domain.ops import LoraSpec
from treadle.engine.attention import PackedCausalAttention
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.head import logits
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.passes import run_micro_batch
from treadle.errors import ConfigError


def count_forwards(base: BaseModel, run: Callable[[], object]) -> int:
    calls: list[torch.Size] = []
    handle = base.transformer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    try:
        run()
    finally:
        handle.remove()
    assert all(shape[0] % 16 == 0 for shape in calls)
    return len(calls)


def test_eight_tenants_share_one_forward(base: BaseModel) -> None:
    rng = np.random.default_rng(0)
    losses = ("cross_entropy", "ppo", "importance_sampling")
    quanta = [
        quantum_of(make_state(base, LoraSpec(rank=1 + index, seed=index)), make_datums(rng, [32], loss), loss)
        for index, loss in enumerate((losses * 3)[:8])
    ]
    assert count_forwards(base, lambda: run_micro_batch(base, quanta)) == 1


def test_base_weights_never_change_nor_get_gradients(base: BaseModel) -> None:
    frozen = list(frozen_tensors(base.transformer.blocks))
    frozen += [base.head_weight_VD, base.transformer.embedding_VD, base.transformer.norm.weight]
    # Per layer q/k/v, o, gate/up and down with their biases, and the norms.
    assert len(frozen) >= base.num_layers * 6 + 3
    before = [tensor.clone() for tensor in frozen]
    state = make_state(base, LoraSpec(rank=4, seed=0))
    run_micro_batch(base, [quantum_of(state, make_datums(np.random.default_rng(0), [30]))])
    for tensor, copy in zip(frozen, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.grad is None
        assert not tensor.requires_grad


def frozen_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in a tree of tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from frozen_tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from frozen_tensors(getattr(value, field.name))


def test_rows_outside_all_segments_run_the_bare_base_model(base: BaseModel, model_dir: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens = torch.randint(0, VOCAB_SIZE, (48,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(28)])
    state = make_state(base, LoraSpec(rank=4, seed=0))
    with torch.no_grad():
        hidden = base.forward_hidden(
            tokens,
            positions,
            attention=PackedCausalAttention([20, 28], 48),
            segments=[LoraSegment(state.weights, 0, 20)],
        )
        bare = logits(base, hidden[20:], ())
        adapted = logits(base, hidden[:20], [LoraSegment(state.weights, 0, 20)])
        torch.testing.assert_close(bare, reference(tokens[None, 20:]).logits[0], rtol=1e-5, atol=1e-4)
        assert (adapted - reference(tokens[None, :20]).logits[0]).abs().max() > 0.01


def test_facts_say_what_was_loaded(base: BaseModel, model_dir: Path) -> None:
    facts = base.facts
    assert facts.base_model == "local/tiny"
    assert facts.architecture == "Qwen3ForCausalLM"
    assert facts.vocab_size == base.vocab_size == VOCAB_SIZE
    assert facts.max_context_length == base.max_context_length == 512
    assert facts.source_dir == str(model_dir.resolve())
    assert facts.tokenizer_dir is None
    assert (base.num_layers, base.num_kv_heads, base.head_dim, base.hidden_size) == (2, 2, 16, 32)
    assert base.eos_token_ids == (2,)
    for part in (
        "cpu",
        f"torch-{torch.__version__}",
        "float32",
        "threads-",
        "segment-loop/row-groups/",
        "quantum-2048",
    ):
        assert part in facts.numerics_profile


def test_generation_config_decides_the_eos_ids(tmp_path: Path, model_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(tmp_path)
    assert load_tiny(tmp_path).eos_token_ids == (5, 7)


def save_gpt2(directory: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)


def save_qwen3(directory: Path, **settings: object) -> None:
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **settings,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)


@pytest.mark.parametrize(
    ("save", "named"),
    [
        (save_gpt2, ("GPT2LMHeadModel", "c_attn", "Qwen3ForCausalLM")),
        (
            lambda directory: save_qwen3(
                directory,
                use_sliding_window=True,
                sliding_window=4,
                layer_types=["full_attention", "sliding_attention"],
            ),
            ("sliding_attention",),
        ),
        (
            lambda directory: save_qwen3(
                directory, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            ("dynamic",),
        ),
    ],
    ids=["gpt2", "sliding window", "dynamic rope"],
)
def test_unrecognised_model_is_refused_by_name(
    tmp_path: Path, save: Callable[[Path], None], named: tuple[str, ...]
) -> None:
    save(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tiny(tmp_path)
    for word in named:
        assert word in caught.value.message


def test_missing_weights_are_refused(tmp_path: Path, model_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match="up_proj"):
        load_tiny(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "float16"}, "bfloat16"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "meta"}, "meta"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"source": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_unusable_settings_are_refused(model_dir: Path, settings: dict[str, str], named: str) -> None:
    arguments = {"source": str(model_dir), "name": "x", "device": "cpu", "dtype": "float32", **settings}
    with pytest.raises(ConfigError, match=named):
        load_base_model(arguments.pop("source"), **arguments)
