"""Answers about checkpoints as models; see answers.py."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from treadle.wire.answers import Answer


class WeightsInfoAnswer(Answer):
    """What a run made from a checkpoint would be."""

    base_model: str
    is_lora: bool
    lora_rank: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    optimizer_config: dict[str, Any]


class CopyWeightsAnswer(Answer):
    tinker_path: str
    """The copy's."""


class ExternalUrlsAnswer(Answer):
    """Where the files of external weights can be fetched without a key."""

    urls: dict[str, str]
    """A URL per file, by its name."""
    expires: datetime


class ArchiveAnswer(Answer):
    """Where a checkpoint's archive can be fetched without a key."""

    url: str
    expires: datetime
