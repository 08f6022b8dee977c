"""Where settings come from: defaults, a TOML file, the environment (TREADLE_SECTION__FIELD), flags; the later wins.

This is the only reader of the environment. It refuses to know single settings: it walks the tree of tree.py.
Invariant: an unknown key is an error that names the nearest known one, so that a typo never becomes a default.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, SettingsError

from treadle.config.section import Section
from treadle.config.tree import ENV_PREFIX, ModelSettings, Settings
from treadle.errors import ConfigError

# Where `treadle admin` finds a server, and the key that it sends.
_ADMIN_URL, _ADMIN_KEY = "TREADLE_URL", "TREADLE_ADMIN_KEY"
# Variables with our prefix that scripts and clients read and that are no settings of a server.
SCRIPT_VARIABLES = frozenset({"TREADLE_TORCH_INDEX", _ADMIN_URL, _ADMIN_KEY})

_LITERAL = re.compile(r"typing\.Literal\[([^\]]*)\]")
_URL_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^@\s]*@")
_URL_SECRET = re.compile(r"(?i)([?&][a-z_]*(?:password|secret|token|key)[a-z_]*=)[^&\s]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """One resolved value: its dotted key, the text to show (secrets masked) and the source it came from."""

    key: str
    shown: str
    source: str


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One documented setting, for `--help` and docs/configuration.md."""

    key: str
    type_text: str
    default_text: str
    text: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return ENV_PREFIX + self.key.upper().replace(".", "__")


def load_settings(config_file: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """The resolved settings.

    overrides: dotted key -> value, as flags give them; None means "flag not given".
    Raises ConfigError, naming the setting and its source, for unknown keys and values that are not allowed.
    """
    return _resolve(_read_sources(config_file, overrides or {}))


def origin_of_each_value(
    config_file: Path | None = None, overrides: Mapping[str, object] | None = None
) -> tuple[Origin, ...]:
    """Every setting with where its value came from, in the order of the tree. Raises as `load_settings`."""
    sources = _read_sources(config_file, overrides or {})
    settings = _resolve(sources)
    origins = []
    for key, value in _leaves(settings):
        found = [source.describe(key) for source in sources if _lookup(source.values, key) is not None]
        origins.append(Origin(key, _shown(value), found[-1] if found else "default"))
    return tuple(origins)


def field_docs() -> tuple[FieldDoc, ...]:
    """Every setting with its type, default and documentation, in the order of the tree."""
    return tuple(_docs_of(Settings, ""))


def help_text(key: str) -> str:
    """The documentation of one setting, for a flag that sets it."""
    return next(doc.text for doc in field_docs() if doc.key == key)


def environment_for_child() -> dict[str, str]:
    """This process's environment without treadle's settings: for a server that is started with flags alone."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}


def environment_of_tool(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `more` in it: for a program that another project made."""
    return {**os.environ, **more}


def tinker_api_key() -> str:
    """The SDK's own TINKER_API_KEY; without one a key that any server in open mode accepts."""
    return os.environ.get("TINKER_API_KEY") or "tml-anonymous"


def admin_url() -> str | None:
    """The server that an operator's commands talk to; None when the environment names none."""
    return os.environ.get(_ADMIN_URL) or None


def admin_key() -> str | None:
    """The key that an operator's commands send; None when the environment has none."""
    return os.environ.get(_ADMIN_KEY) or None


def bypass_proxy_for(host: str) -> None:
    """Adds `host` to NO_PROXY of this process, because HTTP clients send even loopback calls to a proxy otherwise."""
    for variable in ("NO_PROXY", "no_proxy"):
        hosts = [part for part in os.environ.get(variable, "").split(",") if part]
        if host not in hosts and "*" not in hosts:
            os.environ[variable] = ",".join([*hosts, host])


@dataclass(frozen=True, slots=True)
class _Source:
    """Nested values of one source, and how to name the place of a key in it."""

    values: Mapping[str, Any]
    describe: Callable[[str], str]


def _read_sources(config_file: Path | None, overrides: Mapping[str, object]) -> tuple[_Source, ...]:
    """Weakest first. Unknown keys are refused here, per source, because the message names the place."""
    flags: dict[str, Any] = {}
    for key, value in overrides.items():
        if value is not None:
            _assign(flags, key, value)
    sources = (
        _Source(_read_file(config_file), lambda key: f"file {config_file}: {key}"),
        _Source(_read_environment(), lambda key: "environment " + ENV_PREFIX + key.upper().replace(".", "__")),
        _Source(flags, lambda key: f"flag {key}"),
    )
    for source in sources:
        _refuse_unknown(source)
    return sources


def _read_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} is not TOML: {error}") from error


def _read_environment() -> dict[str, Any]:
    known = list(Settings.model_fields)
    for variable in sorted(os.environ):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or name in SCRIPT_VARIABLES:
            continue
        section = name[len(ENV_PREFIX) :].lower().partition("__")[0]
        if section not in known:
            raise ConfigError(f"environment {variable}: unknown setting {section!r}{_nearest(section, known)}")
    try:
        return dict(EnvSettingsSource(Settings)())
    except SettingsError as error:
        raise ConfigError(f"environment: {error}; lists are written as JSON, for example '[\"NAME=PATH\"]'") from error


def _refuse_unknown(source: _Source) -> None:
    _refuse_unknown_in(Settings, source.values, "", source)


def _refuse_unknown_in(owner: type[BaseModel], values: Mapping[str, Any], prefix: str, source: _Source) -> None:
    for name, value in values.items():
        place = source.describe(prefix + name)
        if name not in owner.model_fields:
            raise ConfigError(f"{place}: unknown setting{_nearest(name, owner.model_fields)}")
        section = _section_of(owner.model_fields[name])
        if section is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place}: is a section, its fields are {', '.join(section.model_fields)}")
        _refuse_unknown_in(section, value, f"{prefix}{name}.", source)


def _section_of(info: FieldInfo) -> type[Section] | None:
    """The section that a field is, None for a plain value."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _resolve(sources: tuple[_Source, ...]) -> Settings:
    merged: dict[str, Any] = {}
    for source in sources:
        for key, value in _flat(source.values):
            _assign(merged, key, value)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, sources)) from error


def _first_problem(error: ValidationError, sources: tuple[_Source, ...]) -> str:
    """One line for the first invalid value: where it was set, what is wrong, what was given."""
    problem = error.errors()[0]
    parts = [str(part) for part in problem["loc"]]
    key = _setting_at(parts)
    places = [source.describe(key) for source in sources if _lookup(source.values, key) is not None]
    where = places[-1] if places else key
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" else f" (given: {_masked(repr(problem['input'])[:80])})"
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _setting_at(parts: Sequence[str]) -> str:
    """The setting that a problem is about, without indexes of lists."""
    owner: type[BaseModel] | None = Settings
    key: list[str] = []
    for part in parts:
        if owner is None or part not in owner.model_fields:
            break
        key.append(part)
        owner = _section_of(owner.model_fields[part])
    return ".".join(key)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _assign(tree: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _leaves(owner: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, info in type(owner).model_fields.items():
        value = getattr(owner, name)
        if _section_of(info) is None:
            yield prefix + name, value
        else:
            yield from _leaves(value, f"{prefix}{name}.")


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, ModelSettings):
        revision = f" at {value.revision}" if value.revision else ""
        return (value.name if value.name == value.source else f"{value.name}={value.source}") + revision
    return _masked(str(value)) or "(empty)"


def _masked(text: str) -> str:
    """`text` with the passwords of any URL in it replaced."""
    return _URL_SECRET.sub(r"\1***", _URL_PASSWORD.sub(r"\1:***@", text))


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _docs_of(owner: type[BaseModel], prefix: str) -> Iterator[FieldDoc]:
    for name, info in owner.model_fields.items():
        section = _section_of(info)
        if section is None:
            yield _field_doc(prefix + name, info)
        else:
            yield from _docs_of(section, f"{prefix}{name}.")


def _field_doc(key: str, info: FieldInfo) -> FieldDoc:
    annotation = info.annotation
    type_text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    type_text = _LITERAL.sub(lambda found: "one of " + found[1].replace("'", ""), type_text)
    if (listed := re.fullmatch(r"tuple\[one of (.*), \.\.\.\]", type_text)) is not None:
        type_text = f"list of any of {listed[1]}"
    default = info.get_default()
    default_text = _shown(default) if isinstance(default, tuple) else str(default)
    type_text = "list of models" if key == "models" else type_text.removeprefix("pathlib.")
    return FieldDoc(key, type_text, default_text, " ".join((info.description or "").split()))
