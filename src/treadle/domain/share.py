"""Whose turn it is on a device that training and sampling share: half of the measured device seconds each.

Deficit round-robin over two sides, after the fact: a unit of work is charged when it is done, and the side that had
less goes next. Pure; it knows neither clocks nor work. Invariant: |training_lead_s| <= MAX_SHARE_CREDIT_S, so a side
that waits for nothing cannot save up the device for later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from treadle.domain.limits import MAX_SHARE_CREDIT_S


class Side(StrEnum):
    TRAINING = "training"
    SAMPLING = "sampling"


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """training_lead_s: device seconds that training had more than sampling, up to the credit limit either way."""

    training_lead_s: float = 0.0


def next_side(state: DeviceShare, *, training_waits: bool, sampling_waits: bool) -> Side | None:
    """The side that runs the next unit: the only one that waits, else the one that had less. None when none waits.

    With both even, sampling goes first: its units are short, and somebody watches the text appear.
    """
    if training_waits and sampling_waits:
        return Side.TRAINING if state.training_lead_s < 0 else Side.SAMPLING
    if training_waits:
        return Side.TRAINING
    return Side.SAMPLING if sampling_waits else None


def charge(state: DeviceShare, side: Side, seconds: float) -> DeviceShare:
    """The state after `side` had the device for `seconds`."""
    assert seconds >= 0, "time does not run backwards"
    match side:
        case Side.TRAINING:
            lead = state.training_lead_s + seconds
        case Side.SAMPLING:
            lead = state.training_lead_s - seconds
        case _:
            assert_never(side)
    return replace(state, training_lead_s=max(-MAX_SHARE_CREDIT_S, min(MAX_SHARE_CREDIT_S, lead)))
