"""The one file format: exact round trips, and refusals that name both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from engine_builders import load_tiny, make_datums, make_model_dir, make_state, quantum_of

from treadle.domain.ops import AdamParams, LoraSpec
from treadle.engine import files as engine_files
from treadle.engine.base_model import BaseModel
from treadle.engine.files import decode_state, decode_weights, encode_state, export_peft, read_header
from treadle.engine.optim import adamw_step
from treadle.engine.passes import run_micro_batch
from treadle.engine.state import TrainingState, commit_scratch
from treadle.errors import InvalidRequest


def trained_state(base: BaseModel, spec: LoraSpec, *, open_gradient: bool) -> TrainingState:
    """A run two steps in, optionally with a gradient that no step has taken yet."""
    state = make_state(base, spec)
    datums = make_datums(np.random.default_rng(spec.seed), [10, 33])
    for index in range(3 if open_gradient else 2):
        quantum = quantum_of(state, datums)
        run_micro_batch(base, [quantum])
        assert quantum.scratch is not None
        commit_scratch(state, quantum.scratch)
        if index < 2:
            adamw_step(state, AdamParams(learning_rate=1e-2))
    return state


@pytest.mark.parametrize("open_gradient", [False, True])
@pytest.mark.parametrize("flags", [{}, {"train_unembed": False}, {"train_attn": False}])
def test_round_trip_is_bit_exact(base: BaseModel, open_gradient: bool, flags: dict[str, bool]) -> None:
    state = trained_state(base, LoraSpec(rank=5, seed=1, **flags), open_gradient=open_gradient)
    back = decode_state(encode_state(state, base, with_optimizer=True, applied_seq=9), base)
    assert back.spec == state.spec
    assert (back.step, back.num_open_passes) == (state.step, state.num_open_passes) == (2, int(open_gradient))
    assert torch.equal(back.weights.flat, state.weights.flat)
    assert back.weights.scale == state.weights.scale
    assert torch.equal(back.exp_avg, state.exp_avg)
    assert torch.equal(back.exp_avg_sq, state.exp_avg_sq)
    assert (back.grads is None) == (state.grads is None)
    if back.grads is not None and state.grads is not None:
        assert torch.equal(back.grads.flat, state.grads.flat)


def test_resumed_run_takes_the_same_steps(base: BaseModel) -> None:
    state = trained_state(base, LoraSpec(rank=4, seed=2), open_gradient=True)
    back = decode_state(encode_state(state, base, with_optimizer=True, applied_seq=1), base)
    for run in (state, back):
        adamw_step(run, AdamParams(learning_rate=1e-2))
        quantum = quantum_of(run, make_datums(np.random.default_rng(3), [20]))
        run_micro_batch(base, [quantum])
        assert quantum.scratch is not None
        commit_scratch(run, quantum.scratch)
        adamw_step(run, AdamParams(learning_rate=1e-2))
    assert torch.equal(state.weights.flat, back.weights.flat)


def test_file_does_not_change_when_training_goes_on(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0))
    data = encode_state(state, base, with_optimizer=True, applied_seq=0)
    before = decode_weights(data, base).flat.clone()
    state.weights.flat.add_(1)
    assert torch.equal(decode_weights(data, base).flat, before)
    loaded = decode_weights(data, base)
    loaded.flat.add_(1)
    assert torch.equal(decode_weights(data, base).flat, before)


def test_loading_without_optimizer_starts_moments_afresh(base: BaseModel) -> None:
    state = trained_state(base, LoraSpec(rank=2, seed=0), open_gradient=True)
    back = decode_state(encode_state(state, base, with_optimizer=True, applied_seq=0), base, with_optimizer=False)
    assert torch.equal(back.weights.flat, state.weights.flat)
    assert (back.step, back.num_open_passes, back.grads) == (0, 0, None)
    assert not back.exp_avg.any()
    assert not back.exp_avg_sq.any()


def test_header_says_what_the_file_is(base: BaseModel) -> None:
    state = trained_state(base, LoraSpec(rank=2, seed=6, train_mlp=False), open_gradient=False)
    header = read_header(encode_state(state, base, with_optimizer=False, applied_seq=17))
    assert header.base_model == "local/tiny"
    assert header.revision == base.facts.revision
    assert header.lora == state.spec
    assert (header.step, header.num_open_passes, header.applied_seq) == (2, 0, 17)
    assert header.has_optimizer is False
    assert header.numerics_profile == base.facts.numerics_profile
    assert header.adapter_config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]


def test_sampler_weights_hold_no_optimizer(base: BaseModel) -> None:
    state = trained_state(base, LoraSpec(rank=2, seed=0), open_gradient=True)
    data = encode_state(state, base, with_optimizer=False, applied_seq=0)
    assert all(name.startswith("base_model.model.") for name in safetensors.numpy.load(data))
    assert torch.equal(decode_weights(data, base).flat, state.weights.flat)
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        decode_state(data, base)


def test_export_is_an_ordinary_peft_adapter(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=4, seed=0))
    files = export_peft(encode_state(state, base, with_optimizer=True, applied_seq=0))
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "local/tiny"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 32.0, "LORA")
    tensors = safetensors.numpy.load(files["adapter_model.safetensors"])
    assert len(tensors) == len(state.layout.places)
    module = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"base_model.model.{module}.lora_B.weight"], state.weights.b(module).numpy())
    np.testing.assert_array_equal(tensors[f"base_model.model.{module}.lora_A.weight"], state.weights.a(module).numpy())


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_moe_mixed"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny(make_model_dir(tmp_path_factory.mktemp(request.param), request.param, tied=True))


@pytest.mark.parametrize("flags", [{}, {"train_attn": False, "train_unembed": False}])
def test_round_trip_with_experts_is_bit_exact(moe: BaseModel, flags: dict[str, bool]) -> None:
    state = trained_state(moe, LoraSpec(rank=3, seed=1, **flags), open_gradient=True)
    back = decode_state(encode_state(state, moe, with_optimizer=True, applied_seq=9), moe)
    assert torch.equal(back.weights.flat, state.weights.flat)
    assert torch.equal(back.exp_avg, state.exp_avg)
    assert torch.equal(back.exp_avg_sq, state.exp_avg_sq)
    assert back.grads is not None
    assert state.grads is not None
    assert torch.equal(back.grads.flat, state.grads.flat)


def test_experts_have_the_names_shapes_and_order_of_peft(moe: BaseModel) -> None:
    state = make_state(moe, LoraSpec(rank=3, seed=0))
    files = export_peft(encode_state(state, moe, with_optimizer=False, applied_seq=0))
    tensors = safetensors.numpy.load(files["adapter_model.safetensors"])
    path = "base_model.model.model.layers.0.mlp.experts"
    shapes = {name: array.shape for name, array in tensors.items() if name.startswith(path)}
    assert shapes == {
        f"{path}.base_layer.lora_A.weight": (8 * 3, 32),
        f"{path}.base_layer.lora_B.weight": (48, 3 * 8),
        f"{path}.lora_A.weight": (8 * 3, 24),
        f"{path}.lora_B.weight": (32, 3 * 8),
    }
    module = "model.layers.0.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(tensors[f"{path}.base_layer.lora_A.weight"], state.weights.a(module).numpy())
    ours, theirs = state.weights.b(module).numpy(), tensors[f"{path}.base_layer.lora_B.weight"]
    for expert in range(8):
        for column in range(3):
            np.testing.assert_array_equal(theirs[:, column * 8 + expert], ours[:, expert * 3 + column])


@pytest.mark.parametrize(
    ("architecture", "flags", "modules", "parameters"),
    [
        (
            "qwen3_moe",
            {},
            ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        ("qwen3_moe", {"train_mlp": False, "train_unembed": False}, ["q_proj", "k_proj", "v_proj", "o_proj"], None),
        (
            "qwen3_moe",
            {"train_attn": False, "train_unembed": False},
            [],
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        (
            "qwen3_moe_mixed",
            {"train_attn": False},
            ["lm_head"],
            [
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
            ],
        ),
    ],
)
def test_targets_name_modules_and_experts_apart(
    tmp_path: Path, architecture: str, flags: dict[str, bool], modules: list[str], parameters: list[str] | None
) -> None:
    base = load_tiny(make_model_dir(tmp_path, architecture, tied=True))
    state = make_state(base, LoraSpec(rank=2, seed=0, **flags))
    header = read_header(encode_state(state, base, with_optimizer=False, applied_seq=0))
    assert header.adapter_config["target_modules"] == modules
    assert header.adapter_config["target_parameters"] == parameters


def test_a_file_for_other_experts_is_refused(moe: BaseModel, base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0))
    before = base.facts
    base.facts = moe.facts
    try:
        data = encode_state(state, base, with_optimizer=False, applied_seq=0)
    finally:
        base.facts = before
    with pytest.raises(InvalidRequest, match="experts"):
        decode_weights(data, moe)


def renamed(base: BaseModel, **facts: str) -> bytes:
    """A file as a base model with other facts would write it."""
    state = make_state(base, LoraSpec(rank=2, seed=0))
    ours = base.facts
    base.facts = replace(ours, **facts)
    try:
        return encode_state(state, base, with_optimizer=True, applied_seq=0)
    finally:
        base.facts = ours


def with_header(base: BaseModel, **changes: object) -> bytes:
    """A file whose header disagrees with its tensors."""
    data = encode_state(make_state(base, LoraSpec(rank=2, seed=0)), base, with_optimizer=True, applied_seq=0)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["treadle"])
    del header["crc32"]
    return engine_files._file_of({**header, **changes}, safetensors.numpy.load(data))


def test_a_file_in_which_one_bit_has_changed_is_refused(base: BaseModel) -> None:
    state = trained_state(base, LoraSpec(rank=2, seed=0), open_gradient=True)
    data = encode_state(state, base, with_optimizer=True, applied_seq=12)
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(data), 60), data.index(b"applied_seq") + len(b'applied_seq\\": '), len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(InvalidRequest):
            decode_state(bytes(damaged), base)


def test_a_file_from_before_checksums_is_read(base: BaseModel) -> None:
    state = trained_state(base, LoraSpec(rank=2, seed=0), open_gradient=True)
    data = encode_state(state, base, with_optimizer=True, applied_seq=12)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["treadle"])
    del header["crc32"]
    text = json.dumps({**header, "format_version": 2})
    old = safetensors.numpy.save(safetensors.numpy.load(data), {"treadle": text})
    assert torch.equal(decode_state(old, base).weights.flat, state.weights.flat)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda base: renamed(base, base_model="other/name"), ("other/name", "local/tiny")),
        (lambda base: renamed(base, revision="feed"), ("feed", "revision")),
        (lambda base: with_header(base, lora={"rank": 3, "seed": 0}), (r"\[2, ", r"\[3, ")),
        (
            lambda base: with_header(base, lora={"rank": 2, "seed": 0, "train_mlp": False}),
            ("gate_proj|up_proj|down_proj",),
        ),
        (lambda base: with_header(base, format_version=99), ("99",)),
        # Its moments lie in another order.
        (lambda base: with_header(base, format_version=1), ("format 1 .* reads 3",)),
        (lambda base: with_header(base, surprise=1), ("header",)),
        (lambda base: b"", ("header",)),
        (lambda base: b"\xff" * 64, ("header",)),
        (lambda base: with_header(base)[:-10], ("damaged",)),
    ],
)
def test_file_that_does_not_fit_is_refused_with_both_sides(
    base: BaseModel, make: Callable[[BaseModel], bytes], named: tuple[str, ...]
) -> None:
    data = make(base)
    for pattern in named:
        with pytest.raises(InvalidRequest, match=pattern):
            decode_state(data, base)
        with pytest.raises(InvalidRequest, match=pattern):
            decode_weights(data, base)


def test_revision_follows_the_weights_not_the_place(tmp_path: Path, base: BaseModel, model_dir: Path) -> None:
    same = load_tiny(make_model_dir(tmp_path / "same", "qwen3", tied=True))
    other = load_tiny(make_model_dir(tmp_path / "other", "qwen3", tied=True, seed=1))
    assert same.facts.revision == base.facts.revision
    assert other.facts.revision != base.facts.revision
