"""Answers about sampling sessions, as models: see answers.py."""

from __future__ import annotations

from treadle.wire.answers import Answer


class SamplingSessionAnswer(Answer):
    """A sampling session that exists now."""

    sampling_session_id: str


class JoinAnswer(Answer):
    """A client's number within a sampling session."""

    client_counter: int
    """From 1 on; 0 is the client that made the session."""


class SamplerAnswer(Answer):
    """Which weights a sampling session samples."""

    sampler_id: str
    base_model: str
    model_path: str | None = None
    """Of a named checkpoint."""
