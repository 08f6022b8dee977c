"""Honour or refuse: a loss comes back complete, or an error says what is allowed."""

from __future__ import annotations

from typing import get_args

import pytest
from tinker.types.loss_fn_type import LossFnType

from treadle.domain.losses import LOSSES, resolve_loss
from treadle.errors import InvalidRequest


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_resolves_with_its_defaults_filled_in(name: str) -> None:
    loss = resolve_loss(name, {})
    assert loss.name == name
    assert loss.config == LOSSES[name].config_defaults


def test_a_setting_replaces_its_default_only() -> None:
    assert resolve_loss("ppo", {"clip_low_threshold": 0.5}).config == {
        "clip_low_threshold": 0.5,
        "clip_high_threshold": 1.2,
    }


def test_an_unknown_loss_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_loss("focal", {})
    assert "'focal'" in caught.value.message
    assert all(name in caught.value.message for name in LOSSES)


def test_an_unknown_setting_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"'beta' is not known to ppo; known: clip_high_threshold, clip_low_thr"):
        resolve_loss("ppo", {"beta": 0.1})
    with pytest.raises(InvalidRequest, match="known: none"):
        resolve_loss("cross_entropy", {"beta": 0.1})


def test_a_custom_loss_is_more_than_a_name() -> None:
    with pytest.raises(InvalidRequest, match="'custom' needs the loss_id of a loss that create_custom_loss made"):
        resolve_loss("custom", {})


def test_every_loss_of_the_sdk_is_there() -> None:
    assert set(get_args(LossFnType)) == LOSSES.keys() | {"custom"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, -1e300, "0.8"])
def test_a_setting_that_is_no_finite_number_is_refused(value: float | str) -> None:
    with pytest.raises(InvalidRequest, match="must be a finite number"):
        resolve_loss("ppo", {"clip_low_threshold": value})


def test_one_datums_settings_are_not_shared_with_the_table() -> None:
    resolve_loss("ppo", {"clip_low_threshold": 0.1})
    assert LOSSES["ppo"].config_defaults["clip_low_threshold"] == 0.8


def test_clip_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"clip_low_threshold 2\.0 .* clip_high_threshold 1\.2"):
        resolve_loss("ppo", {"clip_low_threshold": 2.0})
