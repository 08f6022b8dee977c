"""The loss curve of a run, from its log."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.cli.common import stdout
from treadle.cli.runs import loss_lines, recovery_lines
from treadle.domain.ids import BlobKey, ModelId, PoolName, SessionId, TenantId
from treadle.domain.ops import LoraSpec, OpKind
from treadle.domain.records import ModelRecord, ReplayDebt, RunLogEntry, SnapshotRecord
from treadle.domain.states import ModelState


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


def test_what_a_restore_would_cost_is_shown() -> None:
    def lines(*, changed_seq: int, snapshot_seq: int | None, blob_key: str | None = "snapshots/x") -> list[str]:
        model = run_record(next_seq_id=8, incarnation=2, changed_seq=changed_seq)
        key = None if blob_key is None else BlobKey(blob_key)
        snapshots = () if snapshot_seq is None else (snapshot(snapshot_seq, key),)
        ran = [replace(entry(seq_id, OpKind.FORWARD_BACKWARD), run_s=float(seq_id)) for seq_id in (3, 4, 5)]
        return recovery_lines(model, ReplayDebt(snapshots, 2, 4_096), ran, now=1_010.0)

    assert lines(changed_seq=5, snapshot_seq=3) == [
        "committed up to request 7; restored 2 times",
        "newest snapshot: request 3, 10 s ago (1,234 bytes)",
        "replay debt: 9.0 s of work behind it; 2 requests (4,096 bytes) are kept",
    ]
    assert lines(changed_seq=5, snapshot_seq=5)[2:] == ["replay debt: none"]
    assert "(its seed)" in lines(changed_seq=5, snapshot_seq=0, blob_key=None)[1]
    assert lines(changed_seq=5, snapshot_seq=None)[1:] == ["no snapshot: its state cannot be had back"]


def run_record(**fields: int) -> ModelRecord:
    return ModelRecord(
        model_id=ModelId("s:train:0"),
        session_id=SessionId("s"),
        tenant_id=TenantId("user:ada"),
        pool=PoolName("p"),
        base_model="p",
        revision="r",
        lora=LoraSpec(rank=8, seed=1),
        state=ModelState.READY,
        created_at=0.0,
        last_request_at=0.0,
        **fields,  # type: ignore[arg-type]
    )


def snapshot(seq_id: int, key: BlobKey | None) -> SnapshotRecord:
    return SnapshotRecord(
        model_id=ModelId("s:train:0"),
        seq_id=seq_id,
        blob_key=key,
        with_optimizer=True,
        num_bytes=1_234,
        numerics_profile="strict",
        created_at=1_000.0,
    )


def test_a_run_without_passes_says_so() -> None:
    assert loss_lines([entry(1, OpKind.OPTIM_STEP)]) == ["no forward_backward has been recorded for this run yet"]
