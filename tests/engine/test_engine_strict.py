"""The strict-mode probe: it always holds on a CPU, and it notices a kernel whose bits depend on company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from engine_builders import load_tiny, make_model_dir
from torch import Tensor

from treadle.engine.base_model import BaseModel
from treadle.engine.buckets import bucket_of
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.kernels.segment_loop import SegmentLoop
from treadle.engine.strict import BucketReport, StrictReport, enable_strict, probe, strict_settings
from treadle.errors import ConfigError

CUDA = torch.device("cuda")


class NosyLoop(SegmentLoop):
    """A kernel that lets a segment feel where it lies: what the probe exists to find."""

    name = "nosy-loop"

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> list[Tensor | None]:
        kept = super().add(x_TI, y_TO, segments, group)
        for index, segment in enumerate(segments):
            y_TO[segment.start : segment.stop].mul_(1.0 + index * 2.0**-20)
        return kept


class BucketLoop(SegmentLoop):
    """A kernel that depends on the packed length alone, as library products on a GPU do."""

    name = "bucket-loop"

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> list[Tensor | None]:
        kept = super().add(x_TI, y_TO, segments, group)
        y_TO.mul_(1.0 + 2.0**-20 * (x_TI.shape[0] == 256))
        return kept


@pytest.fixture
def own_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base model whose kernel a test may replace."""
    return load_tiny(make_model_dir(tmp_path_factory.mktemp("strict"), "qwen3", tied=True))


@pytest.fixture
def settings_restored() -> Iterator[None]:
    """Whatever the test does, torch's settings are as before."""
    with strict_settings(torch.device("cpu")):
        yield


def test_on_a_cpu_strict_mode_always_holds(base: BaseModel) -> None:
    report = probe(base, buckets=(256, 512))
    assert report.holds
    assert report.usable_buckets == (256, 512)
    assert (report.device, report.dtype, report.kernel) == ("cpu", "float32", base.kernel.name)
    for bucket in report.buckets:
        assert bucket.holds
        assert bucket.largest_difference == 0.0
        assert min(bucket.plain_s, bucket.strict_s, bucket.half_s) > 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_probe_notices_bits_that_depend_on_company(own_base: BaseModel) -> None:
    own_base.kernel = NosyLoop()
    report = probe(own_base, buckets=(256,))
    assert not report.holds
    assert report.usable_buckets == ()
    assert report.kernel == "nosy-loop"
    assert 0 < report.buckets[0].largest_difference < 1


def test_the_probe_tells_which_buckets_agree(own_base: BaseModel) -> None:
    own_base.kernel = BucketLoop()
    report = probe(own_base, buckets=(256, 384, 512))
    assert [bucket.holds for bucket in report.buckets] == [True, True, True]
    assert not report.holds
    assert report.usable_buckets == (384, 512)


def test_the_largest_agreeing_set_counts_and_of_equal_ones_the_first() -> None:
    def bucket(size: int, agreement: int, *, holds: bool = True) -> BucketReport:
        return BucketReport(size, 4, holds, 0.0, agreement, plain_s=2.0, strict_s=2.5, half_s=1.0)

    report = StrictReport(
        "cuda:0", "bfloat16", "x", (bucket(1, 0), bucket(2, 1), bucket(4, 1, holds=False), bucket(8, 2))
    )
    assert report.usable_buckets == (1,)
    assert report.buckets[0].price == 0.25
    assert StrictReport("cuda:0", "bfloat16", "x", (bucket(1, 0), bucket(2, 1), bucket(4, 1))).usable_buckets == (2, 4)
    assert StrictReport("cuda:0", "bfloat16", "x", (bucket(1, 0, holds=False),)).usable_buckets == ()


@pytest.mark.parametrize(("num_tokens", "bucket"), [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (129, 192)])
def test_a_pass_is_padded_to_the_smallest_bucket_that_holds_it(num_tokens: int, bucket: int) -> None:
    assert bucket_of(num_tokens, (16, 64)) == bucket


@pytest.mark.usefixtures("settings_restored")
def test_strict_settings_are_made_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is as before when the test is over.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    was_reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with strict_settings(CUDA):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == was_reduced
    # Read once by cuBLAS; taking it back would take back nothing.
    enable_strict(CUDA)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("settings_restored")
def test_a_workspace_that_comes_too_late_or_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:8")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG set to one of :4096:8, :16:8 .* it is ':8:8'"):
        enable_strict(CUDA)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="it is not set"):
        enable_strict(CUDA)
    assert not torch.are_deterministic_algorithms_enabled()
