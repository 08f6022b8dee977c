"""Reading a base model from a directory or a hub through transformers, and saying exactly which one it was.

The only module of the engine that reads files or may reach a network (for a hub name). It translates what
transformers raises into ConfigError, and never runs code that comes with a model.
Revisions of directories hash both ends of each weight file: training changes those, an edit of middle tensors may not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from treadle.errors import ConfigError

# transformers types these loosely; what comes out of them is annotated where it is used.
_AUTO_MODEL: Any = transformers.AutoModelForCausalLM
_TRANSFORMERS_LOGGING: Any = transformers_logging
# Bytes hashed at both ends of each weight file: training changes them all, reading whole files would take minutes.
_PROBE_BYTES = 64 * 2**10
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Where a model came from. revision: the hub's commit, or a digest of the directory."""

    revision: str
    source_dir: str | None
    tokenizer_dir: str | None


def usable_device(device: str) -> torch.device:
    """The torch device of that name. Raises ConfigError when it is malformed or not there."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not a device name; use cpu, cuda or cuda:N") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return parsed


def read_config(source: str, revision: str | None) -> transformers.PreTrainedConfig:
    """The model's configuration. Raises ConfigError when it cannot be read."""
    try:
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {source!r} has no configuration that transformers can read: {error}") from error
    return config


def outline(config: transformers.PreTrainedConfig) -> tuple[str, tuple[str, ...]]:
    """The causal model's class name and the dotted names of its linear maps, built without memory for weights."""
    try:
        with torch.device("meta"):
            model: nn.Module = _AUTO_MODEL.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"{type(config).__name__} has no causal language model in transformers") from error
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return type(model).__name__, linears


def read_model(
    source: str,
    config: transformers.PreTrainedConfig,
    *,
    revision: str | None,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
) -> transformers.PreTrainedModel:
    """The causal language model with its weights on `device`. Raises ConfigError when they cannot be read."""
    _TRANSFORMERS_LOGGING.disable_progress_bar()
    try:
        model, report = _AUTO_MODEL.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the weights of model {source!r} cannot be read: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        # transformers would fill them with random numbers and only warn.
        odd = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise ConfigError(f"model {source!r} lacks weights, or has them in another shape: {', '.join(odd[:4])}")
    loaded: transformers.PreTrainedModel = model.to(device)
    return loaded


def locate(source: str, config: transformers.PreTrainedConfig, requested_revision: str | None) -> ModelPlace:
    """Which model this was and where its files lie."""
    directory = Path(source)
    if directory.is_dir():
        absolute = directory.resolve()
        has_tokenizer = any((absolute / file).is_file() for file in _TOKENIZER_FILES)
        return ModelPlace(
            revision=directory_revision(absolute),
            source_dir=str(absolute),
            tokenizer_dir=str(absolute) if has_tokenizer else None,
        )
    commit = getattr(config, "_commit_hash", None) or requested_revision or "main"
    return ModelPlace(revision=commit, source_dir=None, tokenizer_dir=_hub_tokenizer_dir(source, commit))


def directory_revision(directory: Path) -> str:
    """sha256 over config.json, the weight indexes, and each weight file's name, size and both ends."""
    digest = hashlib.sha256()
    files = sorted({path for pattern in _WEIGHT_PATTERNS for path in directory.glob(pattern)})
    for path in [directory / "config.json", *files]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_PROBE_BYTES))
            if size > _PROBE_BYTES:
                file.seek(max(_PROBE_BYTES, size - _PROBE_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


def _hub_tokenizer_dir(source: str, revision: str) -> str | None:
    """The cached directory of a hub model's tokenizer, fetched if need be; None when it has none."""
    found = [
        cached_file(
            source,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for file in _TOKENIZER_FILES
    ]
    paths = [Path(path).parent for path in found if path is not None]
    return str(paths[0]) if paths else None
