"""One side of scripts/loss_compare: trains a few tenants through the engine it is given, and prints what they lost.

Started with the source directory of a `treadle` as its argument and a request as JSON on stdin. It must run on
commits older than itself: names that moved are looked up where they were, and what a commit cannot do is an error,
never ignored. Tenants differ in rank, loss, lengths and targets; their data depend on the seed alone.
Invariant: digests are over tensors by name, not over arenas, so that a new layout of memory compares equal.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import treadle
from treadle.domain.losses import Loss, resolve_loss
from treadle.domain.ops import AdamParams, Datum, LoraSpec
from treadle.domain.quanta import cut_quanta
from treadle.engine import passes
from treadle.engine.base_model import load_base_model
from treadle.engine.optim import adamw_step

KNOWN_SETTINGS = ("company", "dtype", "kernel", "pass_tokens", "recompute", "seed")
ADAM = AdamParams(learning_rate=2e-3, weight_decay=0.01, grad_clip_norm=10.0)
LOSSES = ("cross_entropy", "ppo", "importance_sampling", "cross_entropy")
RANKS = (8, 3, 16, 32)


@dataclass
class Tenant:
    """One run and its data, the same every step, so that its loss must fall."""

    label: str
    state: Any
    loss: Loss
    datums: list[Datum]


def main() -> int:
    source = Path(sys.argv[1]).resolve()
    found = Path(treadle.__file__).resolve().parents[1]
    assert found == source, f"asked for {source}, imported {found}"
    request = json.load(sys.stdin)
    settings = request["settings"]
    unknown = sorted(settings.keys() - set(KNOWN_SETTINGS))
    if unknown:
        raise SystemExit(f"settings {unknown} are not known; known: {', '.join(KNOWN_SETTINGS)}")
    base = load_base_model(
        request["model"],
        name="loss/compare",
        device=request["device"],
        dtype=settings.get("dtype", "float32"),
        num_threads=request["threads"],
    )
    _set_kernel(base, settings)
    tenants = [_tenant(base, index, int(settings.get("seed", 0))) for index in range(request["tenants"])]
    logprobs = hashlib.sha256()
    losses = [_step(base, tenants, settings, logprobs) for _ in range(request["steps"])]
    result = {
        "tenants": [tenant.label for tenant in tenants],
        "tokens_per_step": sum(datum.num_tokens for tenant in tenants for datum in tenant.datums),
        "losses": losses,
        "logprobs_digest": logprobs.hexdigest(),
        "weights_digest": _digest(tenants),
    }
    print(json.dumps(result))
    return 0


def _step(base: Any, tenants: list[Tenant], settings: Mapping[str, str], logprobs: Any) -> list[float]:
    """One step of every tenant; their summed losses."""
    scratches = [tenant.state.new_scratch() for tenant in tenants]
    results: dict[tuple[int, int], Any] = {}
    for batch in _batches(tenants, settings):
        quanta = []
        for index, start, stop in batch:
            tenant = tenants[index]
            quanta.append(
                passes.QuantumInput(tenant.state, tenant.datums[start:stop], tenant.loss, scratches[index], start)
            )
        outputs = passes.run_micro_batch(base, quanta, **_pass_options(settings))
        results.update({(index, start): output for (index, start, _), output in zip(batch, outputs, strict=True)})
    losses = [0.0] * len(tenants)
    for (index, _), output in sorted(results.items(), key=lambda item: item[0]):
        if output.failure is not None:
            raise SystemExit(f"tenant {index} failed: {output.failure}")
        losses[index] += output.metrics["loss:sum"]
        for array in output.logprobs:
            logprobs.update(np.ascontiguousarray(array).tobytes())
    commit_scratch = _moved("commit_scratch", "state", "passes")
    for tenant, scratch in zip(tenants, scratches, strict=True):
        commit_scratch(tenant.state, scratch)
        adamw_step(tenant.state, ADAM)
    return losses


def _batches(tenants: list[Tenant], settings: Mapping[str, str]) -> list[list[tuple[int, int, int]]]:
    """(tenant, first datum, last datum + 1) of each quantum, by forward pass."""
    company = settings.get("company", "packed")
    if company not in ("packed", "alone", "reversed"):
        raise SystemExit(f"company {company!r} is not known; known: packed, alone, reversed")
    order = list(range(len(tenants)))
    if company == "reversed":
        order.reverse()
    limit = int(settings.get("pass_tokens", 4096))
    batches: list[list[tuple[int, int, int]]] = [[]]
    size = 0
    for index in order:
        lengths = [datum.num_tokens for datum in tenants[index].datums]
        for start, stop in cut_quanta(lengths):
            count = sum(lengths[start:stop])
            is_other = company == "alone" and bool(batches[-1]) and batches[-1][-1][0] != index
            if batches[-1] and (size + count > limit or is_other):
                batches.append([])
                size = 0
            batches[-1].append((index, start, stop))
            size += count
    return batches


def _pass_options(settings: Mapping[str, str]) -> dict[str, Any]:
    if "recompute" not in settings:
        return {}
    if "recompute" not in inspect.signature(passes.run_micro_batch).parameters:
        raise SystemExit("this commit's run_micro_batch takes no recompute")
    modes = importlib.import_module("treadle.engine.context").Recompute
    return {"recompute": modes(settings["recompute"])}


def _set_kernel(base: Any, settings: Mapping[str, str]) -> None:
    if "kernel" not in settings:
        return
    if not hasattr(base, "kernel"):
        raise SystemExit("this commit's engine has one kernel only")
    choose = importlib.import_module("treadle.engine.kernels.choose")
    base.kernel = choose.kernel_named(settings["kernel"], base.device)


def _tenant(base: Any, index: int, seed: int) -> Tenant:
    loss = resolve_loss(LOSSES[index % len(LOSSES)], {})
    rank = RANKS[index % len(RANKS)]
    rng = np.random.default_rng((seed, index))
    # Odd lengths, one of them 1; the second tenant has more than one quantum.
    lengths = [1, *(int(length) for length in rng.integers(5, 90, size=3 + index % 3))]
    if index == 1:
        lengths += [400] * 6
    datums = [_datum(rng, length, loss, base.vocab_size) for length in lengths]
    spec = LoraSpec(rank=rank, seed=seed + index, train_unembed=index % 4 != 2)
    return Tenant(f"{loss.name} r{rank}", _moved("new_training_state", "state", "adapter")(base, spec), loss, datums)


def _moved(name: str, *homes: str) -> Callable[..., Any]:
    """A function of the engine that has lived in more than one of its modules, the newest home first."""
    for home in homes:
        try:
            found = getattr(importlib.import_module(f"treadle.engine.{home}"), name)
        except (ModuleNotFoundError, AttributeError):
            continue
        return found
    raise SystemExit(f"this commit has {name} in none of {', '.join(homes)}")


def _datum(rng: np.random.Generator, length: int, loss: Loss, vocab_size: int) -> Datum:
    inputs: dict[str, np.ndarray] = {"target_tokens": rng.integers(0, vocab_size, length)}
    signal = (rng.normal(size=length) * (rng.random(length) >= 0.25)).astype(np.float32)
    if loss.name == "cross_entropy":
        inputs["weights"] = np.abs(signal)
    else:
        inputs["advantages"] = signal
        inputs["logprobs"] = rng.normal(-8.0, 0.5, length).astype(np.float32)
    return Datum(rng.integers(0, vocab_size, length).astype(np.int32), inputs)


def _digest(tenants: list[Tenant]) -> str:
    digest = hashlib.sha256()
    for tenant in tenants:
        weights = tenant.state.weights
        for module in sorted(weights.modules):
            for tensor in (weights.a(module), weights.b(module)):
                digest.update(f"{module} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
