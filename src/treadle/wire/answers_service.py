"""Answers to what a client asks first, as models. See answers.py."""

from __future__ import annotations

from treadle.wire.answers import Answer


class ClientConfigAnswer(Answer):
    """The flags of this server for one SDK version. Those that are absent have the SDK's defaults."""

    pjwt_auth_enabled: bool
    parallel_fwdbwd_chunks: bool
    proto_compress_fwdbwd: bool
    proto_write_fwdbwd: bool
    fwd_via_fwdbwd: bool
    create_model_via_load_weights: bool
    fwdbwd_max_chunk_len: int
    sample_use_retrieve_futures: bool
    sample_join_sampling_session: bool
    custom_loss_server_side: bool


class DynamicConfigAnswer(Answer):
    """The flags that the SDK asks for again now and then."""

    refresh_interval_sec: int
    sample_cancel_enabled: bool


class SupportedModel(Answer):
    model_name: str
    trainable: bool
    sampleable: bool
    max_context_length: int | None = None
    """Tokens; absent until the model was loaded once."""


class CapabilitiesAnswer(Answer):
    supported_models: list[SupportedModel]


class ReadyAnswer(Answer):
    status: str
    reasons: list[str] | None = None
    """Why not, one sentence each."""
