"""The one frozen Settings tree, where each of its values came from, and the names of models.

`load_settings` is the way in. tree.py says what can be set, sources.py reads files and the environment,
names.py says what `--model` means, bind.py which addresses are safe. Nothing here opens a socket or a database.
"""

from treadle.config.bind import check_bind, is_loopback
from treadle.config.execution import EngineSettings, ExecutorSettings, SamplerSettings, VllmSettings, WorkerSettings
from treadle.config.names import BUNDLED_MODEL, NamedModel, bundled_model_dir, local_dir_of, parse_model
from treadle.config.sources import (
    FieldDoc,
    Origin,
    admin_key,
    admin_url,
    bypass_proxy_for,
    environment_for_child,
    environment_of_tool,
    field_docs,
    help_text,
    load_settings,
    origin_of_each_value,
    tinker_api_key,
)
from treadle.config.telemetry import OtelSettings
from treadle.config.tree import (
    AuthMethod,
    AuthSettings,
    LimitSettings,
    LogSettings,
    LossSettings,
    ModelScopeSettings,
    ModelSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
)

__all__ = [
    "AuthMethod",
    "AuthSettings",
    "BUNDLED_MODEL",
    "EngineSettings",
    "ExecutorSettings",
    "FieldDoc",
    "LimitSettings",
    "LogSettings",
    "LossSettings",
    "ModelScopeSettings",
    "ModelSettings",
    "NamedModel",
    "Origin",
    "OtelSettings",
    "SamplerSettings",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "StoreSettings",
    "VllmSettings",
    "WorkerSettings",
    "admin_key",
    "admin_url",
    "bundled_model_dir",
    "bypass_proxy_for",
    "check_bind",
    "environment_for_child",
    "environment_of_tool",
    "field_docs",
    "help_text",
    "is_loopback",
    "load_settings",
    "local_dir_of",
    "origin_of_each_value",
    "parse_model",
    "tinker_api_key",
]
