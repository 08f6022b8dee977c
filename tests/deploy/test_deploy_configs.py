"""Every configuration that the repository ships is one that a server would start with, and says what it is meant to."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from treadle.blobs.bucket_urls import parse_bucket_url
from treadle.config import Settings, load_settings
from treadle.config.bind import check_bind
from treadle.store.dialect import parse_url

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.toml"))
SHIPPED = [*CONFIGS, ROOT / "docker/treadle.toml", ROOT / "deploy/kuberay/base/treadle.toml"]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("TREADLE_"):
            monkeypatch.delenv(name)


def settings_of(name: str) -> Settings:
    return load_settings(ROOT / "configs" / f"{name}.toml")


def test_there_is_one_for_each_kind_of_place() -> None:
    assert {path.stem for path in CONFIGS} == {"laptop", "one-gpu", "cluster", "hosted"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_configuration_is_whole(path: Path) -> None:
    settings = load_settings(path)
    if settings.store.url:
        parse_url(settings.store.url)
        assert settings.is_shareable
    if "://" in settings.blobs.url:
        parse_bucket_url(settings.blobs.url)
    # It would not let everybody in, as it stands.
    check_bind(settings.server.host, any_key_exists=False, methods=settings.auth.methods)
    text = path.read_text()
    assert not re.search(r"tml-[A-Za-z0-9_-]{16}|password *=", text), "no credential is in a file of the repository"


def test_laptop_needs_nothing(tmp_path: Path) -> None:
    settings = settings_of("laptop")
    assert settings.models[0].local_dir() is not None, "the bundled model is there without a network"
    assert (settings.executor.kind, settings.store.url, settings.blobs.url) == ("local", "", "")
    assert settings.engine.device == "cpu"


def test_one_gpu_is_one_worker_on_it() -> None:
    settings = settings_of("one-gpu")
    assert settings.engine.device.startswith("cuda")
    assert (settings.worker.count, settings.worker.samplers, settings.executor.kind) == (1, 0, "local")
    assert settings.auth.bootstrap_key_file is not None


def test_cluster_is_ray_with_postgresql_and_a_bucket() -> None:
    settings = settings_of("cluster")
    assert settings.executor.kind == "ray"
    assert settings.executor.ray_address.endswith(":6379")
    assert settings.executor.num_gpus > 0
    assert settings.store.url.startswith("postgresql://")
    assert settings.blobs.url.startswith("s3://")
    assert settings.models[0].workers == 4


def test_hosted_is_what_it_is_named_for() -> None:
    settings = settings_of("hosted")
    assert settings.models[0].name == "Qwen/Qwen3-30B-A3B-Instruct-2507"
    assert settings.limits.max_lora_rank == 32
    assert settings.server.root_path == "/twinkle"
    assert settings.server.public_url is not None
    assert settings.server.public_url.endswith("/twinkle")
    assert settings.auth.modelscope.organization == "twinkle-explorers"
    assert set(settings.auth.methods) == {"keys", "modelscope"}
    assert settings.engine.hub == "modelscope"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_line_is_explained_or_speaks_for_itself(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "a configuration says what it is for"
    assert tomllib.loads(text)
    assert max(map(len, text.splitlines())) <= 120
