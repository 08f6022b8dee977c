"""The reference of the numerics tests: transformers + peft, one adapter and one sequence at a time, plain autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from treadle.domain.ops import Datum
from treadle.engine.adapter import AdapterArena
from treadle.engine.files import export_peft


def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The bare base model. Experts run one by one: the grouped product wants aligned sizes that tiny models lack."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")


def write_adapter(into: Path, files: Mapping[str, bytes]) -> Path:
    """A directory with these files."""
    into.mkdir(parents=True)
    for name, content in files.items():
        (into / name).write_bytes(content)
    return into


def load_in_peft(directory: Path, into: Path, data: bytes, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The base model with the adapter of a checkpoint file, exported and loaded as a user would."""
    adapter = write_adapter(into, export_peft(data))
    return peft.PeftModel.from_pretrained(reference_model(directory, dtype), adapter, is_trainable=True)


def run_reference(
    model: torch.nn.Module, datums: Sequence[Datum], loss: str, config: Mapping[str, float]
) -> tuple[list[np.ndarray], float]:
    """Log-probabilities and the summed loss of plain autograd; leaves gradients on the model."""
    logprobs = []
    total = torch.zeros(())
    for datum in datums:
        logits = model(input_ids=torch.from_numpy(datum.tokens.astype(np.int64))[None]).logits[0].float()
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        picked = logits.log_softmax(-1).gather(1, targets.reshape(len(targets), -1)).reshape(targets.shape)
        total = total + reference_loss(picked, datum, loss, config)
        logprobs.append(picked.detach().numpy())
    total.backward()
    return logprobs, total.item()


def reference_loss(logprobs: torch.Tensor, datum: Datum, loss: str, config: Mapping[str, float]) -> torch.Tensor:
    """The documented formula, differentiated by autograd. Optional inputs are not looked at."""
    if loss == "cross_entropy":
        return -(torch.from_numpy(datum.inputs["weights"]) * logprobs).sum()
    advantages = torch.from_numpy(datum.inputs["advantages"])
    if loss == "stable_reinforce":
        return _stable_reinforce(logprobs, datum, advantages, config["kl_coeff"])
    difference = logprobs - torch.from_numpy(datum.inputs["logprobs"])
    if loss == "dro":
        return (config["beta"] / 2 * difference**2 - logprobs * advantages).sum()
    if loss == "gspo":
        counted = advantages != 0
        of_sequence = difference[counted].mean().exp() if counted.any() else torch.ones(())
        ratio = of_sequence.detach() * (logprobs - logprobs.detach()).exp()
    else:
        ratio = difference.exp()
    if loss == "importance_sampling":
        return -(ratio * advantages).sum()
    bounded = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    if loss == "cispo":
        return -(bounded.detach() * logprobs * advantages).sum()
    assert loss in ("ppo", "gspo")
    return -torch.minimum(ratio * advantages, bounded * advantages).sum()


def _stable_reinforce(logprobs: torch.Tensor, datum: Datum, advantages: torch.Tensor, kl_coeff: float) -> torch.Tensor:
    runs = torch.from_numpy(datum.inputs["sampled_runs"])
    difference = logprobs - torch.from_numpy(datum.inputs["sampling_logprobs"])
    total = torch.zeros(())
    for run in range(1, int(runs.max()) + 1):
        rows = runs == run
        ratio = difference[rows].exp()
        weight = difference[rows].mean().exp().clamp(max=1) * ratio.clamp(max=2)
        total = total - (weight.detach() * advantages[rows] * logprobs[rows]).sum()
        total = total + kl_coeff * (ratio - 1 - difference[rows]).sum()
    return total


def reference_gradients(arena: AdapterArena, model: torch.nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """peft's gradients by (module, "A" or "B"), shaped as the arena's a() and b(); every one of them is asked for."""
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    rank = arena.layout.rank
    gradients = {}
    for places in arena.layout.groups:
        num_experts = places.group.num_experts
        for member in places.group.members:
            path = member.module
            if num_experts:
                path = path.replace(".experts.gate_up_proj", ".experts.base_layer").removesuffix(".down_proj")
            for which in ("A", "B"):
                gradient = theirs.pop(f"base_model.model.{path}.lora_{which}.default.weight")
                if num_experts and which == "B":
                    # peft's columns go expert by expert within a rank, ours rank by rank within an expert.
                    gradient = gradient.unflatten(1, (rank, num_experts)).transpose(1, 2).flatten(1)
                gradients[member.module, which] = gradient
    assert not theirs, f"peft trains what we do not: {sorted(theirs)}"
    return gradients


def assert_same_gradients(ours: AdapterArena, model: torch.nn.Module, *, rtol: float) -> None:
    """Each tensor, to rtol of its largest number."""
    for (module, which), reference in reference_gradients(ours, model).items():
        assert reference.abs().max() > 0, f"{module} {which} has no gradient to compare"
        gradient = ours.a(module) if which == "A" else ours.b(module)
        torch.testing.assert_close(gradient, reference, rtol=rtol, atol=rtol * float(reference.abs().max()))
