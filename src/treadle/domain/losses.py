"""Which losses exist, what inputs and settings each takes, and their defaults.

This is the table that admission checks requests against; the mathematics is in engine/losses.py, and docs/losses.md
says what was chosen where the sources leave a default open. Honour or refuse: an unknown name, a missing input or an
unknown setting is an error that says what is allowed.
Sources: Tinker documentation, "Losses"; tinker SDK 0.38 types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.domain.custom_loss import CUSTOM, CustomLoss
from treadle.errors import InvalidRequest

CLIP_LOW = "clip_low_threshold"
CLIP_HIGH = "clip_high_threshold"
# Settings that a datum may replace by a tensor of its own, one bound per token.
PER_TOKEN_CLIPS = (CLIP_LOW, CLIP_HIGH)
SEQUENCE_RATIO_MASK = "sequence_ratio_mask"
# Inputs that the server writes beside a client's: see domain/provenance.py.
SAMPLING_LOGPROBS = "sampling_logprobs"
SAMPLED_RUNS = "sampled_runs"
KL_COEFF = "kl_coeff"
_MAX_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The interface of one loss: tensor inputs beside the tokens, and settings with defaults.

    server_inputs: not the client's to send; the server adds them at admission from what it recorded of the sampled
    sequences that a datum's provenance names. compared_inputs: may be sent, and must then agree with that record.
    """

    name: str
    required_inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    config_defaults: Mapping[str, float] = field(default_factory=dict)
    allows_target_columns: bool = False
    server_inputs: tuple[str, ...] = ()
    compared_inputs: tuple[str, ...] = ()

    @property
    def client_inputs(self) -> tuple[str, ...]:
        """What a client may send."""
        return self.required_inputs + self.optional_inputs + self.compared_inputs

    @property
    def engine_inputs(self) -> tuple[str, ...]:
        """What the loss is computed from."""
        return self.required_inputs + self.optional_inputs + self.server_inputs


_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")

LOSSES: Mapping[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("cross_entropy", ("target_tokens",), ("weights",), allows_target_columns=True),
        # Twinkle's GRPO script sends a mask of the sampled tokens as weights.
        LossSpec("importance_sampling", _POLICY_INPUTS, ("weights",)),
        LossSpec("ppo", _POLICY_INPUTS, PER_TOKEN_CLIPS, {CLIP_LOW: 0.8, CLIP_HIGH: 1.2}),
        LossSpec("cispo", _POLICY_INPUTS, PER_TOKEN_CLIPS, {CLIP_LOW: 0.0, CLIP_HIGH: 4.0}),
        LossSpec("dro", _POLICY_INPUTS, (), {"beta": 0.05}),
        # A length-normalised ratio stays close to 1: 1 - 3e-4 and 1 + 4e-4 are the bounds of the paper.
        LossSpec(
            "gspo", _POLICY_INPUTS, (SEQUENCE_RATIO_MASK, *PER_TOKEN_CLIPS), {CLIP_LOW: 0.9997, CLIP_HIGH: 1.0004}
        ),
        # The public recipes send along the logprobs that they got with the sample.
        LossSpec(
            "stable_reinforce",
            ("target_tokens", "advantages"),
            (),
            {KL_COEFF: 0.0},
            server_inputs=(SAMPLING_LOGPROBS, SAMPLED_RUNS),
            compared_inputs=("logprobs",),
        ),
    )
}

# A custom loss reads what it declares, datum by datum, so its inputs beside the targets are no columns of a table.
_CUSTOM_SPEC = LossSpec(CUSTOM, ("target_tokens",), allows_target_columns=True)
assert CUSTOM not in LOSSES


def spec_of(loss_name: str) -> LossSpec:
    """The interface of a resolved loss; of a custom one, what all of them share."""
    return _CUSTOM_SPEC if loss_name == CUSTOM else LOSSES[loss_name]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss as a request asks for it: its name and the settings with defaults filled in.

    custom: what is computed, of a custom loss alone.
    """

    name: str
    config: Mapping[str, float] = field(default_factory=dict)
    custom: CustomLoss | None = None


@dataclass(frozen=True, slots=True)
class LossMeaning:
    """What the loss_fn of a pass stands for.

    name: a built-in loss, "custom", or a named loss. definition: of the last two, JSON. sha256: of the definition of a
    named loss, as hex.
    """

    name: str
    definition: bytes | None = None
    sha256: str | None = None

    @property
    def is_named(self) -> bool:
        """It is a loss that somebody submitted and an operator approved."""
        return self.sha256 is not None


def resolve_loss(name: str, config: Mapping[str, float | str]) -> Loss:
    """The loss with its settings complete.

    Raises InvalidRequest for an unknown loss or setting, a text where a number is due, anything float32 cannot hold
    (NaN, infinity, 1e39), and a custom loss, which is more than its settings.
    """
    if name == CUSTOM:
        raise InvalidRequest(f"loss_fn {CUSTOM!r} needs the loss_id of a loss that create_custom_loss made")
    spec = LOSSES.get(name)
    if spec is None:
        raise InvalidRequest(f"loss_fn {name[:80]!r} is not known; known: {', '.join(sorted((*LOSSES, CUSTOM)))}")
    settings = dict(spec.config_defaults)
    for key, value in config.items():
        if key not in settings:
            known = ", ".join(sorted(settings)) or "none"
            raise InvalidRequest(f"loss_fn_config key {key[:80]!r} is not known to {name}; known: {known}")
        # Written so that NaN, which compares false with everything, is refused too.
        if isinstance(value, str) or not abs(value) <= _MAX_FLOAT32:
            raise InvalidRequest(f"loss_fn_config {key}={value!r} of {name} must be a finite number that float32 holds")
        settings[key] = float(value)
    low, high = settings.get(CLIP_LOW), settings.get(CLIP_HIGH)
    if low is not None and high is not None and low > high:
        raise InvalidRequest(f"{CLIP_LOW} {low} of {name} is above {CLIP_HIGH} {high}")
    if settings.get(KL_COEFF, 0.0) < 0:
        raise InvalidRequest(f"{KL_COEFF} {settings[KL_COEFF]} of {name} is below 0: it would reward divergence")
    return Loss(name=name, config=settings)
