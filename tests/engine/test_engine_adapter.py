"""Fresh adapters: seeds, layouts, and independence from everything else."""

from __future__ import annotations

import pytest
import torch
from engine_builders import make_state

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import AdapterArena, adapter_layout
from treadle.engine.base_model import BaseModel
from treadle.engine.state import new_training_state


def test_same_seed_gives_the_same_adapter_whatever_the_global_generator_does(base: BaseModel) -> None:
    spec = LoraSpec(rank=8, seed=42)
    torch.manual_seed(1)
    first = new_training_state(base, spec)
    new_training_state(base, LoraSpec(rank=2, seed=7))
    torch.manual_seed(2)
    state_before = torch.get_rng_state()
    second = new_training_state(base, spec)
    assert torch.equal(first.weights.flat, second.weights.flat)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert not torch.equal(first.weights.flat, new_training_state(base, LoraSpec(rank=8, seed=43)).weights.flat)


def test_each_projection_has_a_stream_of_its_own(base: BaseModel) -> None:
    everything = new_training_state(base, LoraSpec(rank=4, seed=5)).weights
    attention_only = new_training_state(base, LoraSpec(rank=4, seed=5, train_mlp=False, train_unembed=False)).weights
    assert set(attention_only.modules) < set(everything.modules)
    for module in attention_only.modules:
        assert torch.equal(attention_only.a(module), everything.a(module))
    layers = [everything.a(f"model.layers.{layer}.self_attn.q_proj") for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_fresh_adapter_is_kaiming_uniform_and_changes_nothing_yet(base: BaseModel) -> None:
    state = new_training_state(base, LoraSpec(rank=16, seed=0))
    for module in state.weights.modules:
        a = state.weights.a(module)
        bound = a.shape[1] ** -0.5
        assert bound * 0.9 < float(a.abs().max()) <= bound
        assert abs(float(a.mean())) < bound * 0.2
        assert not state.weights.b(module).any()
    assert state.weights.scale == 2.0
    assert (state.step, state.num_open_passes, state.grads) == (0, 0, None)
    assert not state.exp_avg.any()


@pytest.mark.parametrize(
    ("flags", "leaves"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False, "train_unembed": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
    ],
)
def test_flags_choose_the_projections(base: BaseModel, flags: dict[str, bool], leaves: set[str]) -> None:
    layout = adapter_layout(base.groups, LoraSpec(rank=2, seed=0, **flags))
    assert {place.module.rpartition(".")[2] for place in layout.places} == leaves


def test_tensors_of_an_arena_share_its_memory_and_do_not_overlap(base: BaseModel) -> None:
    layout = adapter_layout(base.groups, LoraSpec(rank=3, seed=0))
    arena = AdapterArena(layout, torch.zeros(layout.num_elements))
    for module in arena.modules:
        assert arena.a(module).shape[0] == 3
        assert arena.b(module).shape[1] == 3
        arena.a(module).add_(1)
        arena.b(module).add_(1)
    assert float(arena.flat.max()) == 1
    assert int(arena.flat.sum()) == layout.num_parameters
    assert all(place.offset % 16 == 0 for place in layout.places)


def test_copy_is_a_version_of_its_own(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0))
    version = state.weights.copy()
    kept = version.flat.clone()
    state.weights.flat.add_(1)
    assert torch.equal(version.flat, kept)
    assert version.scale == state.weights.scale
