"""The cookbook's recipes that are run, with the options that fit the bundled model, and what each must reach.

Each is an entry point of the published package, called with options of its own command line and nothing else. Knows
neither how it is run nor where results go.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from material import MODEL, Amounts

Options = Mapping[str, object]
Curve = Sequence[float]

FULL_AMOUNTS = Amounts(conversations=1280, comparisons=640, prompts=640, tests=64)
SMOKE_AMOUNTS = Amounts(conversations=48, comparisons=24, prompts=12, tests=8)


@dataclass(frozen=True)
class Aim:
    """What the curve of one metric must do from the mean of its first points to that of its last."""

    metric: str
    num_first: int
    num_last: int
    least_rise: float | None = None
    most_left: float | None = None
    """Share of the start that may be left at the end."""

    def judge(self, curve: Curve) -> dict[str, object]:
        """Start, end and whether the aim is met."""
        start, end = statistics.fmean(curve[: self.num_first]), statistics.fmean(curve[-self.num_last :])
        rose = self.least_rise is None or end - start >= self.least_rise
        fell = self.most_left is None or end <= self.most_left * start
        aim = f"rises by {self.least_rise}" if self.most_left is None else f"falls to {self.most_left} of its start"
        return {"metric": self.metric, "aim": aim, "start": start, "end": end, "is_met": rose and fell}


@dataclass(frozen=True)
class Recipe:
    """One run of one entry point. teacher: the recipe whose last sampler checkpoint teaches this one."""

    name: str
    module: str
    options: Options
    smoke: Options
    aim: Aim
    curves: Sequence[str] = field(default_factory=tuple)
    teacher: str | None = None

    def arguments(self, *, is_smoke: bool) -> list[str]:
        """Its command line, but for paths and the server."""
        options = {"model_name": MODEL, **self.options, **(self.smoke if is_smoke else {})}
        return [f"{name}={value}" for name, value in options.items()]


_RL_CURVES = (
    "env/all/correct",
    "env/all/format",
    "optim/entropy",
    "optim/kl_sample_train_v1",
    "optim/kl_sample_train_v2",
    "grad_norm",
)
_ARITHMETIC = {
    "env": "arithmetic",
    "group_size": 8,
    "groups_per_batch": 32,
    "learning_rate": 5e-4,
    "max_tokens": 16,
    "max_steps": 40,
    "save_every": 20,
}
_RL_SMOKE = {"group_size": 4, "groups_per_batch": 4, "max_steps": 2, "save_every": 1}
# The first point is the untrained policy; the second is behind a step already, which is worth 0.1 and more.
_REWARD = Aim("env/all/reward/total", num_first=1, num_last=5, least_rise=0.3)

RECIPES = (
    Recipe(
        "sl_loop",
        "tinker_cookbook.recipes.sl_loop",
        {"batch_size": 32, "learning_rate": 2e-3, "max_length": 256, "save_every": 20},
        {"batch_size": 8, "save_every": 2},
        Aim("train_mean_nll", num_first=1, num_last=5, most_left=0.5),
        ("num_tokens", "grad_norm"),
    ),
    Recipe(
        "chat_sl",
        "tinker_cookbook.recipes.chat_sl.train",
        {
            "dataset": "no_robots",
            "batch_size": 32,
            "learning_rate": 2e-3,
            "max_length": 256,
            "eval_every": 13,
            "save_every": 20,
            "rolling_save_every": 5,
        },
        {"batch_size": 8, "eval_every": 2, "save_every": 3, "rolling_save_every": 2},
        Aim("test/nll", num_first=1, num_last=1, most_left=0.5),
        ("train_mean_nll", "grad_norm"),
    ),
    Recipe(
        "rl_importance_sampling",
        "tinker_cookbook.recipes.math_rl.train",
        {**_ARITHMETIC, "loss_fn": "importance_sampling"},
        _RL_SMOKE,
        _REWARD,
        _RL_CURVES,
    ),
    Recipe("rl_default_loss", "tinker_cookbook.recipes.math_rl.train", _ARITHMETIC, _RL_SMOKE, _REWARD, _RL_CURVES),
    Recipe(
        "dpo",
        "tinker_cookbook.recipes.preference.dpo.train",
        {"dataset": "hhh", "batch_size": 16, "learning_rate": 3e-4, "max_length": 256},
        {"batch_size": 8, "max_steps": 2},
        Aim("margin", num_first=1, num_last=5, least_rise=0.5),
        ("dpo_loss", "accuracy", "chosen_reward", "rejected_reward", "test/nll"),
    ),
    Recipe(
        "on_policy_distillation",
        "tinker_cookbook.recipes.distillation.on_policy_distillation",
        {
            "teacher_model": MODEL,
            "dataset": "deepmath",
            "lora_rank": 32,
            "group_size": 4,
            "groups_per_batch": 16,
            "learning_rate": 1e-3,
            "max_tokens": 16,
            "save_every": 20,
        },
        {"groups_per_batch": 6, "group_size": 2, "max_steps": 2},
        Aim("teacher_kl", num_first=1, num_last=5, most_left=0.5),
        ("optim/entropy", "env/all/ac_tokens_per_turn", "grad_norm"),
        teacher="sl_loop",
    ),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
