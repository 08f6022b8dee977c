"""Where settings come from, which one wins, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from treadle.config import Settings, field_docs, help_text, load_settings, origin_of_each_value
from treadle.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith("TREADLE_"):
            monkeypatch.delenv(variable)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_need_no_service_and_no_gpu() -> None:
    settings = load_settings()
    assert settings.database_url.startswith("sqlite:///")
    assert settings.database_url.endswith("/treadle-data/treadle.db")
    assert [model.name for model in settings.models] == ["treadle/tiny"]
    assert settings.server.host == "127.0.0.1"
    assert settings.engine.device == "auto"


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "c.toml", "[server]\nport = 1\nhost = '::1'\nhold_s = 5\n[log]\nlevel = 'debug'\n")
    monkeypatch.setenv("TREADLE_SERVER__PORT", "2")
    monkeypatch.setenv("TREADLE_SERVER__HOST", "127.0.0.2")
    settings = load_settings(file, {"server.port": 3, "server.host": None})
    assert (settings.server.port, settings.server.host, settings.server.hold_s) == (3, "127.0.0.2", 5.0)
    assert settings.log.level == "debug"
    assert settings.server.keep_alive_s == 120.0


def test_every_value_says_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "c.toml", "[server]\nport = 1\nhold_s = 5\n")
    monkeypatch.setenv("TREADLE_SERVER__PORT", "2")
    origins = {origin.key: origin for origin in origin_of_each_value(file, {"data_dir": "/x"})}
    assert origins["server.port"].source == "environment TREADLE_SERVER__PORT"
    assert origins["server.port"].shown == "2"
    assert origins["server.hold_s"].source == f"file {file}: server.hold_s"
    assert origins["data_dir"].source == "flag data_dir"
    assert origins["server.host"].source == "default"
    assert set(origins) == {doc.key for doc in field_docs()}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[server]\nprot = 1\n", "server.prot: unknown setting; did you mean 'port'?"),
        ("[sever]\nport = 1\n", "sever: unknown setting; did you mean 'server'?"),
        ("server = 1\n", "server: is a section"),
        ("[server]\nport = 'x'\n", "server.port: input should be a valid integer"),
        ("[server]\nport = 70000\n", "server.port: input should be less than or equal to 65535 (given: 70000)"),
        ("[server]\nhold_s = 45\n", "server.hold_s: input should be less than 45"),
        ("models = ['a/b/c']\n", "exactly two slashes"),
        ("models = []\n", "at least one model is needed"),
        ("[[models]]\nname = 'x'\nsourse = 'y'\n", "models: "),
        ("[server\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, hint: str) -> None:
    file = write(tmp_path / "c.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert hint in caught.value.message
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message or "TOML" in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        load_settings(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("TREADLE_SERVER__PROT", "1", "environment TREADLE_SERVER__PROT: unknown setting; did you mean 'port'?"),
        ("TREADLE_SERVR__PORT", "1", "environment TREADLE_SERVR__PORT: unknown setting 'servr'; did you mean 'server'"),
        ("TREADLE_ENGINE__DTYPE", "fp16", "environment TREADLE_ENGINE__DTYPE: input should be 'auto'"),
        ("TREADLE_MODELS", "a=b", "lists are written as JSON"),
    ],
)
def test_a_wrong_variable_is_refused_with_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hint: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert hint in caught.value.message


def test_an_unknown_flag_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flag server\.prot: unknown setting"):
        load_settings(None, {"server.prot": 1})


def test_variables_of_scripts_and_empty_ones_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_TORCH_INDEX", "https://example.invalid")
    monkeypatch.setenv("TREADLE_SERVER__PORT", "")
    assert load_settings() == load_settings(None, {})
    assert load_settings().server.port == 8000


def test_models_from_the_environment_are_flag_texts_in_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TREADLE_MODELS", f'["Qwen/Qwen3-0.6B", "mine={tmp_path}"]')
    models = load_settings().models
    assert [(model.name, model.source) for model in models] == [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("mine", str(tmp_path)),
    ]


def test_models_in_a_file_may_be_tables_with_a_revision(tmp_path: Path) -> None:
    text = "[[models]]\nname = 'q'\nsource = 'Qwen/Qwen3-0.6B'\nrevision = 'abc'\n"
    (model,) = load_settings(write(tmp_path / "c.toml", text)).models
    assert (model.name, model.source, model.revision) == ("q", "Qwen/Qwen3-0.6B", "abc")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://treadle:hunter2@db/treadle",
        "postgresql+asyncpg://:hunter2@db/treadle",
        "postgresql+asyncpg://db/treadle?user=t&password=hunter2",
    ],
)
def test_passwords_are_masked_where_settings_are_shown(url: str) -> None:
    origins = origin_of_each_value(None, {"store.url": url})
    (shown,) = [origin.shown for origin in origins if origin.key == "store.url"]
    assert "hunter2" not in shown
    assert "***" in shown
    assert load_settings(None, {"store.url": url}).database_url == url


def test_settings_are_frozen_and_the_constructor_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_SERVER__PORT", "9")
    settings = Settings()
    assert settings.server.port == 8000
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.data_dir = Path("x")


def test_every_setting_is_documented() -> None:
    for doc in field_docs():
        assert len(doc.text) > 10, doc.key
        assert doc.text.isascii(), doc.key
    assert help_text("server.port").startswith("TCP port")
    assert {doc.key: doc.variable for doc in field_docs()}["engine.dtype"] == "TREADLE_ENGINE__DTYPE"
