"""`treadle doctor`: each check fails for its own reason."""

from __future__ import annotations

import fcntl
import socket
from pathlib import Path

import pytest

from treadle.cli.doctor import Check, Verdict, all_checks
from treadle.config import load_settings


def checks(tmp_path: Path, **overrides: object) -> dict[str, Check]:
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    settings = load_settings(None, {"data_dir": tmp_path, "server.port": 0} | keys)
    return {check.name: check for check in all_checks(settings)}


def test_a_good_machine_passes(tmp_path: Path) -> None:
    found = checks(tmp_path)
    assert {name for name, check in found.items() if check.verdict is Verdict.FAIL} == set()
    assert "Qwen3ForCausalLM" in found["model treadle/tiny"].text
    assert found["database"].text == "none yet; the first start makes one"
    # Looking changes nothing.
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_fails(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = checks(tmp_path, server__port=taken.getsockname()[1])
    assert found["port"].verdict is Verdict.FAIL


def test_a_running_server_on_the_data_directory_fails(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert checks(tmp_path)["data directory"].verdict is Verdict.FAIL
    assert checks(tmp_path)["data directory"].verdict is Verdict.OK


def test_a_database_that_is_none_fails(tmp_path: Path) -> None:
    (tmp_path / "treadle.db").write_bytes(b"this is no database" * 100)
    assert checks(tmp_path)["database"].verdict is Verdict.FAIL


@pytest.mark.parametrize("config", [None, "{}", "[1]", "not json", '{"architectures": ["X"]}'])
def test_a_model_that_cannot_be_loaded_fails(tmp_path: Path, config: str | None) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    if config is not None:
        (directory / "config.json").write_text(config, encoding="utf-8")
    assert checks(tmp_path, models=[str(directory)])["model local/m"].verdict is Verdict.FAIL


def test_a_gpu_that_is_asked_for_and_missing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert checks(tmp_path, engine__device="cuda")["torch"].verdict is Verdict.FAIL
