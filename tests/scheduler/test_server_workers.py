"""Which worker each slot of each pool gets, by the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treadle.config import load_settings
from treadle.domain.roles import Role, Scale
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import WorkerConfig
from treadle.server_workers import Workers
from treadle.worker import build


class Made(LocalExecutor):
    """Remembers what it was made of; no process is started."""

    def __init__(self, config: WorkerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.config, self.options = config, options


def workers(folder: Path, **overrides: object) -> tuple[Workers, Any]:
    settings = load_settings(None, {"data_dir": folder, "worker.spare": False, **overrides})
    return Workers(settings, make_local=Made, on_parts=lambda _: None), settings.models[0]


def test_every_worker_of_a_pool_has_a_name_and_a_device_of_its_own(tmp_path: Path) -> None:
    made, model = workers(tmp_path, **{"worker.count": 3, "worker.samplers": 2})
    assert made.scale_of(model) == Scale(3, 2)
    all_of_them = [made.make(model, index, Role.TRAINING) for index in range(3)]
    all_of_them += [made.make(model, index, Role.SAMPLING) for index in range(2)]
    assert [one.name for one in all_of_them] == [f"treadle/tiny#{name}" for name in ("0", "1", "2", "s0", "s1")]
    configs = [one.config for one in all_of_them if isinstance(one, Made)]
    assert [config.device_index for config in configs] == [0, 1, 2, -1, -2]
    assert {config.num_on_host for config in configs} == {5}
    assert len({config.staging_dir for config in configs}) == 1


def test_vllm_wants_a_worker_that_only_samples(tmp_path: Path) -> None:
    made, model = workers(tmp_path, **{"sampler.kind": "vllm"})
    assert made.scale_of(model) == Scale(1, 1)


@pytest.mark.parametrize(
    ("device", "num_on_host", "index", "chosen"),
    [
        ("auto", 1, 0, "cuda"),
        ("auto", 4, 1, "cuda:1"),
        ("cuda", 4, -1, "cuda:3"),
        ("cuda:2", 4, 1, "cuda:2"),
        ("cpu", 9, 8, "cpu"),
        ("auto", 5, 0, None),
        ("auto", 1, 4, None),
        ("cuda", 2, -5, None),
    ],
)
def test_workers_share_no_gpu_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, num_on_host: int, index: int, chosen: str | None
) -> None:
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: 4)
    if chosen is not None:
        assert build._chosen_device(device, num_on_host, index) == chosen
        return
    with pytest.raises(build.ConfigError, match="this machine has 4"):
        build._chosen_device(device, num_on_host, index)
