"""What `--model` means: the stable name of a pool and where its base model comes from.

It refuses to know how a model is loaded. Its only look at the file system is whether a directory holds a config.json.
Invariant: a name that passes can be announced to the SDK and written into checkpoints as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from treadle.errors import ConfigError

BUNDLED_MODEL = "treadle/tiny"

_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]*(/[A-Za-z0-9_][A-Za-z0-9._\-]*)*")


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A pool's name, and the directory or hub name behind it."""

    name: str
    source: str


def parse_model(text: str, *, is_model_dir: Callable[[Path], bool] | None = None) -> NamedModel:
    """What `--model TEXT` means: NAME_OR_PATH, or NAME=PATH.

    A path is what starts with `/`, `./`, `../` or `~`, or an existing directory with a config.json; anything else is a
    hub name. The pool's name is NAME, else the hub name, else `local/<directory name>`.
    Raises ConfigError for names that cannot be announced. `is_model_dir` is the only look at the file system.
    """
    is_model_dir = is_model_dir or _has_model_config
    name, equals, source = text.partition("=")
    if not equals or is_model_dir(Path(text)):
        name, source = "", text
    elif not name:
        raise ConfigError(f"--model {text!r} has an empty name; write NAME=PATH")
    if not source:
        raise ConfigError(f"--model {text!r} names no model; write a hub name, a directory, or NAME=PATH")
    if not name:
        is_local = source != BUNDLED_MODEL and _is_path(source, is_model_dir)
        name = f"local/{Path(source).expanduser().resolve().name}" if is_local else source
    reason = why_name_is_refused(name)
    if reason is not None:
        raise ConfigError(reason)
    if name == BUNDLED_MODEL and source != BUNDLED_MODEL:
        raise ConfigError(f"{BUNDLED_MODEL!r} is the bundled model's name; give {source!r} another one")
    return NamedModel(name=name, source=source)


def local_dir_of(source: str) -> Path | None:
    """The directory behind a source, or None when it is a hub name. Raises ConfigError when it holds no model."""
    if source == BUNDLED_MODEL:
        return bundled_model_dir()
    if not _is_path(source, _has_model_config):
        return None
    path = Path(source).expanduser().resolve()
    if not _has_model_config(path):
        found = "has no config.json" if path.is_dir() else "does not exist"
        raise ConfigError(f"the model directory {source} {found}")
    return path


def bundled_model_dir() -> Path:
    """The directory of the bundled tiny model. Raises ConfigError when the installation lacks it."""
    path = Path(str(resources.files("treadle"))) / "bundled" / "tiny"
    if not (path / "config.json").is_file():
        raise ConfigError("the bundled model is missing from this installation; install treadle again")
    return path


def why_name_is_refused(name: str) -> str | None:
    if len(name) > 200 or not _MODEL_NAME.fullmatch(name):
        return (
            f"the model name {name[:200]!r} is not allowed: use letters, digits, '.', '_', '-' and '/', "
            "each part starting with a letter, digit or '_'; name a directory with NAME=PATH"
        )
    if name.count("/") == 2:
        return (
            f"the model name {name!r} has exactly two slashes, and the SDK cuts such names at the last one when it "
            "loads a tokenizer; give it another name: NAME=PATH"
        )
    return None


def _is_path(source: str, is_model_dir: Callable[[Path], bool]) -> bool:
    return source.startswith(("/", "./", "../", "~")) or source in (".", "..") or is_model_dir(Path(source))


def _has_model_config(path: Path) -> bool:
    return (path / "config.json").is_file()
