"""The loss curve of a run, from its log."""

from __future__ import annotations

import pytest

from treadle.cli.common import stdout
from treadle.cli.runs import loss_lines
from treadle.domain.ids import ModelId
from treadle.domain.ops import OpKind
from treadle.domain.records import RunLogEntry


def entry(seq_id: int, kind: OpKind, **metrics: float) -> RunLogEntry:
    return RunLogEntry(ModelId("s:train:0"), seq_id, kind, 0.0, {k.replace("_", ":"): v for k, v in metrics.items()})


def test_the_curve_is_of_forward_backward_losses_in_seq_order() -> None:
    log = [
        entry(3, OpKind.FORWARD_BACKWARD, loss_sum=4.0),
        entry(1, OpKind.FORWARD_BACKWARD, loss_sum=8.0),
        entry(2, OpKind.OPTIM_STEP, grad_norm=1.0),
        entry(4, OpKind.FORWARD, loss_sum=99.0),
    ]
    heading, *chart = loss_lines(log)
    assert heading == "loss:sum of 2 forward_backward calls: 8 -> 4"
    assert len(chart) > 2


def test_a_run_id_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    # rich would draw a tram for ":train:".
    stdout().print("0123:train:0")
    assert capsys.readouterr().out == "0123:train:0\n"


def test_a_run_without_passes_says_so() -> None:
    assert loss_lines([entry(1, OpKind.OPTIM_STEP)]) == ["no forward_backward has been recorded for this run yet"]
