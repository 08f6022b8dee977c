"""The one frozen Settings tree, where each of its values came from, and the names of models.

`load_settings` is the way in. tree.py says what can be set, sources.py reads files and the environment,
names.py says what `--model` means, bind.py which addresses are safe. Nothing here opens a socket or a database.
"""

from treadle.config.bind import check_bind
from treadle.config.names import BUNDLED_MODEL, NamedModel, bundled_model_dir, local_dir_of, parse_model
from treadle.config.sources import (
    FieldDoc,
    Origin,
    environment_for_child,
    field_docs,
    help_text,
    load_settings,
    origin_of_each_value,
)
from treadle.config.tree import (
    AuthSettings,
    EngineSettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    SamplerSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
)

__all__ = [
    "AuthSettings",
    "BUNDLED_MODEL",
    "EngineSettings",
    "FieldDoc",
    "LimitSettings",
    "LogSettings",
    "ModelSettings",
    "NamedModel",
    "Origin",
    "SamplerSettings",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "StoreSettings",
    "bundled_model_dir",
    "check_bind",
    "environment_for_child",
    "field_docs",
    "help_text",
    "load_settings",
    "local_dir_of",
    "origin_of_each_value",
    "parse_model",
]
