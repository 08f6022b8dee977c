"""Reading a base model from a directory or a hub through transformers, and saying exactly which one it was.

The only module of the engine that reads files or may reach a network (for a hub name). It translates what
transformers raises into ConfigError, and never runs code that comes with a model.
Revisions of directories hash every tensor's name, shape and place in full and its numbers in samples: whatever changes
a tensor as a whole is noticed (training, merging, requantising), a few numbers changed between two samples are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
# Of each tensor a sample of this many bytes is hashed per stride, and its end: 0.03 s per GB, where all bytes take 2.3.
_SAMPLE_BYTES = 4 * 2**10
_STRIDE_BYTES = 2**20
# The safetensors format: a header of JSON behind its length.
_HEADER_LENGTH_BYTES = 8
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


@dataclass(frozen=True, slots=True)
class Outline:
    """What a causal language model is made of. linears: dotted names of its linear maps, in order.

    modules: the class name of each module by its dotted name. parameters: the shape of each by its dotted name.
    """

    class_name: str
    linears: tuple[str, ...]
    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]


def outline(config: transformers.PreTrainedConfig) -> Outline:
    """What transformers makes of the configuration, built without memory for weights."""
    try:
        with torch.device("meta"):
            model: nn.Module = _AUTO_MODEL.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"{type(config).__name__} has no causal language model in transformers") from error
    modules = dict(model.named_modules())
    return Outline(
        class_name=type(model).__name__,
        linears=tuple(name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)),
        modules={name: type(module).__name__ for name, module in modules.items()},
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
    )


def read_model(
    source: str,
    config: transformers.PreTrainedConfig,
    *,
    revision: str | None,
    dtype: torch.dtype,
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
    """sha256 over config.json, the weight indexes, and each weight file's name, size, header and samples."""
    digest = hashlib.sha256()
    files = sorted({path for pattern in _WEIGHT_PATTERNS for path in directory.glob(pattern)})
    for path in [directory / "config.json", *files]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for start, stop in _extents(file, size, suffix=path.suffix):
                for place in (*range(start, stop, _STRIDE_BYTES), max(start, stop - _SAMPLE_BYTES)):
                    file.seek(place)
                    digest.update(file.read(min(_SAMPLE_BYTES, stop - place)))
    return digest.hexdigest()


def _extents(file: BinaryIO, size: int, *, suffix: str) -> list[tuple[int, int]]:
    """What of a file is sampled: each tensor by itself, or the whole. Headers and JSON are cut so that all is read."""
    if suffix == ".json":
        return [(start, min(start + _SAMPLE_BYTES, size)) for start in range(0, size, _SAMPLE_BYTES)]
    if suffix != ".safetensors":
        return [(0, size)]
    begin = _HEADER_LENGTH_BYTES + int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
    try:
        header = json.loads(file.read(begin - _HEADER_LENGTH_BYTES))
        tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"weight file {file.name} is not a safetensors file: its header cannot be read") from error
    whole = [(start, min(start + _SAMPLE_BYTES, begin)) for start in range(0, begin, _SAMPLE_BYTES)]
    return whole + [(begin + start, begin + stop) for start, stop in tensors]


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
