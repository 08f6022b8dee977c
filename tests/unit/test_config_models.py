"""What --model means, and which addresses may be listened on."""

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.config import BUNDLED_MODEL, bundled_model_dir, check_bind, load_settings, local_dir_of, parse_model
from treadle.errors import ConfigError


def never(path: Path) -> bool:
    return False


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("treadle/tiny", "treadle/tiny", "treadle/tiny"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2", "gpt2"),
        ("/models/my-finetune", "local/my-finetune", "/models/my-finetune"),
        ("/models/my-finetune/", "local/my-finetune", "/models/my-finetune/"),
        ("./m", "local/m", "./m"),
        ("mine=/models/x", "mine", "/models/x"),
        ("mine=Qwen/Qwen3-0.6B", "mine", "Qwen/Qwen3-0.6B"),
        ("org/mine=/models/a=b", "org/mine", "/models/a=b"),
        ("a/b/c/d=/models/x", "a/b/c/d", "/models/x"),
    ],
)
def test_a_model_text_becomes_a_name_and_a_source(text: str, name: str, source: str) -> None:
    model = parse_model(text, is_model_dir=never)
    assert (model.name, model.source) == (name, source)


def test_an_existing_directory_with_a_model_is_a_path_even_without_a_slash_in_front() -> None:
    assert parse_model("Qwen/x", is_model_dir=lambda path: True).name == "local/x"


def test_the_bundled_name_never_means_a_directory_that_happens_to_lie_there() -> None:
    # `treadle tokenizer pull` writes ./treadle/tiny, and it must not shadow the bundled model.
    assert parse_model(BUNDLED_MODEL, is_model_dir=lambda path: True).name == BUNDLED_MODEL


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a/b/c", "exactly two slashes"),
        ("a/b/c=/models/x", "the SDK cuts such names"),
        ("=/models/x", "empty name"),
        ("mine=", "names no model"),
        ("", "names no model"),
        ("/models/my model", "name a directory with NAME=PATH"),
        ("../..=/x", "not allowed"),
        ("tinker://x", "not allowed"),
        ("treadle/tiny=/models/x", "bundled model's name"),
        ("/", "not allowed"),
    ],
)
def test_a_name_that_cannot_be_announced_is_refused(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model(text, is_model_dir=never)
    assert hint in caught.value.message


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two models are called 'local/m'"):
        load_settings(None, {"models": ["/a/m", "/b/m"]})


def test_a_source_is_a_directory_or_a_hub_name(tmp_path: Path) -> None:
    assert local_dir_of(BUNDLED_MODEL) == bundled_model_dir()
    assert local_dir_of("Qwen/Qwen3-0.6B") is None
    with pytest.raises(ConfigError, match="does not exist"):
        local_dir_of(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        local_dir_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert local_dir_of(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "[::1]", "localhost"])
@pytest.mark.parametrize("methods", [(), ("open",), ("keys",), ("open", "keys")])
@pytest.mark.parametrize("any_key_exists", [False, True])
def test_loopback_is_always_allowed(host: str, methods: tuple[str, ...], any_key_exists: bool) -> None:
    check_bind(host, any_key_exists=any_key_exists, methods=methods)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_other_addresses_need_authentication(host: str) -> None:
    check_bind(host, any_key_exists=True, methods=())
    check_bind(host, any_key_exists=False, methods=("keys",))
    with pytest.raises(ConfigError, match="treadle keys create USER"):
        check_bind(host, any_key_exists=False, methods=())
    with pytest.raises(ConfigError, match=r"auth\.methods"):
        check_bind(host, any_key_exists=True, methods=("open", "keys"))
