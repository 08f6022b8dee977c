"""Which losses exist, what inputs and settings each takes, and their defaults.

This is the table that admission checks requests against; the mathematics is in engine/losses.py.
Sources: Tinker documentation, "Losses"; tinker SDK 0.38 types. Honour or refuse: an unknown name,
a missing input or an unknown setting is an error that says what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.errors import InvalidRequest

PER_TOKEN_CLIPS = ("clip_low_threshold", "clip_high_threshold")


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The interface of one loss: tensor inputs beside the tokens, and settings with defaults."""

    name: str
    required_inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    config_defaults: Mapping[str, float] = field(default_factory=dict)
    allows_target_columns: bool = False


LOSSES: Mapping[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("cross_entropy", ("target_tokens",), ("weights",), allows_target_columns=True),
        LossSpec("importance_sampling", ("target_tokens", "logprobs", "advantages")),
        LossSpec(
            "ppo",
            ("target_tokens", "logprobs", "advantages"),
            PER_TOKEN_CLIPS,
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss as a request asks for it: its name and the settings with defaults filled in."""

    name: str
    config: Mapping[str, float] = field(default_factory=dict)


def resolve_loss(name: str, config: Mapping[str, float | str]) -> Loss:
    """The loss with its settings complete.

    Raises InvalidRequest for an unknown loss or setting, a text where a number is due, NaN or infinity.
    """
    spec = LOSSES.get(name)
    if spec is None:
        raise InvalidRequest(f"loss_fn {name[:80]!r} is not known; enabled: {', '.join(sorted(LOSSES))}")
    settings = dict(spec.config_defaults)
    for key, value in config.items():
        if key not in settings:
            known = ", ".join(sorted(settings)) or "none"
            raise InvalidRequest(f"loss_fn_config key {key[:80]!r} is not known to {name}; known: {known}")
        if isinstance(value, str) or value != value or value in (float("inf"), float("-inf")):
            raise InvalidRequest(f"loss_fn_config {key}={value!r} of {name} must be a finite number")
        settings[key] = float(value)
    low, high = (settings.get(name) for name in PER_TOKEN_CLIPS)
    if low is not None and high is not None and low > high:
        raise InvalidRequest(f"clip_low_threshold {low} of {name} is above clip_high_threshold {high}")
    return Loss(name=name, config=settings)
