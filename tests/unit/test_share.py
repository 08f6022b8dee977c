"""Half of the device for each side, measured in seconds, whatever the sizes of their units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.limits import MAX_SHARE_CREDIT_S
from treadle.domain.share import DeviceShare, Side, charge, next_side

UNIT_S = st.floats(0.001, MAX_SHARE_CREDIT_S)


@pytest.mark.parametrize("lead_s", [-1.0, 0.0, 1.0])
def test_the_only_side_with_work_gets_the_device(lead_s: float) -> None:
    state = DeviceShare(lead_s)
    assert next_side(state, training_waits=True, sampling_waits=False) is Side.TRAINING
    assert next_side(state, training_waits=False, sampling_waits=True) is Side.SAMPLING
    assert next_side(state, training_waits=False, sampling_waits=False) is None


@given(st.lists(st.tuples(UNIT_S, UNIT_S), min_size=1, max_size=200))
def test_two_waiting_sides_get_the_same_time_to_within_one_unit(units: list[tuple[float, float]]) -> None:
    state = DeviceShare()
    seconds = {Side.TRAINING: 0.0, Side.SAMPLING: 0.0}
    for training_s, sampling_s in units:
        side = next_side(state, training_waits=True, sampling_waits=True)
        assert side is not None
        unit_s = training_s if side is Side.TRAINING else sampling_s
        state = charge(state, side, unit_s)
        seconds[side] += unit_s
        assert abs(seconds[Side.TRAINING] - seconds[Side.SAMPLING]) <= MAX_SHARE_CREDIT_S + 1e-9


@pytest.mark.parametrize("busy", list(Side))
def test_an_idle_side_cannot_save_up_the_device(busy: Side) -> None:
    state = DeviceShare()
    for _ in range(1_000):
        state = charge(state, busy, 0.5)
    waited_s = 0.0
    while next_side(state, training_waits=True, sampling_waits=True) is not busy:
        other = Side.SAMPLING if busy is Side.TRAINING else Side.TRAINING
        state = charge(state, other, 0.1)
        waited_s += 0.1
    assert 0 < waited_s <= MAX_SHARE_CREDIT_S + 0.2


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(AssertionError, match="backwards"):
        charge(DeviceShare(), Side.TRAINING, -0.1)
