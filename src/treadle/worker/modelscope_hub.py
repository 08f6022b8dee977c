"""Base models from the ModelScope hub, through its own package, which is an extra of treadle."""

from __future__ import annotations

from treadle.errors import ConfigError


def fetch_from_modelscope(model_id: str, revision: str | None) -> str:
    """The local directory of a ModelScope model, downloaded if need be; only weights, configuration and tokenizer.

    Raises ConfigError when the extra is not installed or the hub has no such model.
    """
    try:
        # Imported here because it is an extra.
        from modelscope import snapshot_download
    except ImportError as error:
        raise ConfigError("engine.hub is modelscope, which needs: pip install 'treadle[modelscope]'") from error
    try:
        directory: str = snapshot_download(
            model_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        )
    except Exception as error:  # its own errors have no common root but Exception
        raise ConfigError(f"model {model_id!r} cannot be fetched from ModelScope: {error}") from error
    return directory
