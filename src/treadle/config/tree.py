"""The Settings tree: every setting, its type, its default and its documentation.

The string under a field becomes the `--help` text and docs/configuration.md. It reads neither files nor environment
(sources.py does), and it refuses to know what the settings do.
Invariant: a Settings is immutable and every value in it was validated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from treadle.config.names import BUNDLED_MODEL, local_dir_of, parse_model, why_name_is_refused
from treadle.domain import limits
from treadle.errors import ConfigError

ENV_PREFIX = "TREADLE_"


class Section(BaseModel):
    """What all sections share: immutable, no unknown keys, documented by the strings under the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerSettings(Section):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a key (`treadle keys create`)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""
    hold_s: float = Field(default=limits.HOLD_S, gt=0, lt=45)
    """Seconds a waiting client is held before it is told to ask again. The SDK gives up at 45."""
    keep_alive_s: float = Field(default=120.0, gt=0)
    """Seconds an idle connection stays open. Well above the SDK's 10 s heartbeat, or calls meet closed sockets."""
    drain_s: float = Field(default=20.0, ge=0)
    """Seconds that a stopping server gives the running cycle before it ends anyway."""
    max_body_bytes: int = Field(default=limits.MAX_BODY_BYTES, gt=0)
    """Largest request body, in bytes as sent."""
    max_decompressed_bytes: int = Field(default=limits.MAX_DECOMPRESSED_BYTES, gt=0)
    """Largest request body, in bytes after decompression."""


class ModelSettings(Section):
    """One base model; each becomes a pool of its own."""

    name: str
    """The name clients ask for and checkpoints carry."""
    source: str
    """A local directory, a hub name, or `treadle/tiny` for the bundled model."""
    revision: str | None = None
    """A branch, tag or commit of a hub model; empty means the hub's default. The commit is recorded."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Accepts the text of a `--model` flag, so that lists of such texts work in every source."""
        if not isinstance(value, str):
            return value
        try:
            model = parse_model(value)
        except ConfigError as error:
            raise ValueError(error.message) from error
        return {"name": model.name, "source": model.source}

    @field_validator("name")
    @classmethod
    def _name_is_allowed(cls, name: str) -> str:
        reason = why_name_is_refused(name)
        if reason is not None:
            raise ValueError(reason)
        return name

    def local_dir(self) -> Path | None:
        """The directory to load from, or None when `source` is a hub name. Looks at the file system."""
        return local_dir_of(self.source)


class EngineSettings(Section):
    """How the base model is run."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the base model lives: auto, cpu, cuda or cuda:N. `auto` takes the GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the base weights. `auto`: float32 on a CPU, bfloat16 on a GPU."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where hub names are looked up. `modelscope` needs the extra: pip install 'treadle[modelscope]'."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one worker; 0 chooses from the number of cores."""
    micro_batch_tokens: int = Field(default=0, ge=0)
    """Most tokens of several requests in one forward/backward; 0 chooses from the memory measured at the start."""


class WorkerSettings(Section):
    """Where a worker keeps the runs that it holds."""

    park_after_s: float = Field(default=limits.PARK_AFTER_S, gt=0)
    """Seconds without work after which a run leaves device memory: to host memory beside a GPU, to a file in the data
    directory beside a CPU. It comes back when its next request runs."""
    max_resident_bytes: int = Field(default=0, ge=0)
    """Most device memory of runs, in bytes; beyond it the one that has been idle the longest leaves at once. 0: no
    limit but the memory there is."""


class SchedulerSettings(Section):
    """The clock: what runs when."""

    gather_window_ms: float = Field(default=20.0, ge=0)
    """Milliseconds that a pass without its step waits for company before a cycle starts."""
    cycle_budget_tokens: int = Field(default=0, ge=0)
    """Most tokens in one cycle; 0 follows `target_cycle_s` and the measured speed."""
    tenant_cap_fraction: float = Field(default=0.5, gt=0, le=1)
    """Largest share of a cycle that one tenant gets while others wait."""
    gap_wait_s: float = Field(default=limits.GAP_WAIT_S, ge=0)
    """Seconds to wait for a request that was skipped in a run's sequence, once a later step or save is queued."""
    target_cycle_s: float = Field(default=0.5, gt=0)
    """Seconds that one cycle should take when there is enough to do."""
    lease_ttl_s: float = Field(default=5.0, gt=0)
    """Seconds after which the lease of a scheduler that stopped renewing it is free."""


class SamplerSettings(Section):
    """The built-in sampler."""

    max_running: int = Field(default=96, gt=0)
    """Most sequences decoded together; one tenant gets at most three quarters of them."""
    max_cached_tokens: int = Field(default=0, ge=0)
    """Most tokens in the KV cache; 0 chooses from the memory there is."""
    max_queued_samples_per_tenant: int = Field(default=4096, gt=0)
    """Requests of any kind a tenant may have waiting before its samples are told to back off (429)."""


class LimitSettings(Section):
    """What one request may ask for."""

    max_lora_rank: int = Field(default=limits.MAX_LORA_RANK, gt=0)
    """Largest LoRA rank."""
    max_datums_per_request: int = Field(default=limits.MAX_DATUMS_PER_REQUEST, gt=0, le=limits.MAX_DATUMS_PER_REQUEST)
    """Most datums in one forward_backward request. The SDK's chunks hold up to 1,024."""
    max_num_samples: int = Field(default=limits.MAX_NUM_SAMPLES, gt=0, le=limits.MAX_NUM_SAMPLES)
    """Most sequences in one sample request."""


class StoreSettings(Section):
    """The database that is the queue."""

    url: str = ""
    """SQLAlchemy URL of the database; empty means SQLite in the data directory."""


class AuthSettings(Section):
    """Who may call."""

    mode: Literal["auto", "open", "keys"] = "auto"
    """`auto`: every `tml-` key is its own tenant until the first key is created, then only created keys count.
    `open`: always as before the first key. `keys`: only created keys."""


class LogSettings(Section):
    """What the server says about itself, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe event that is written."""
    format: Literal["console", "json"] = "console"
    """`console` for people, `json` for machines: one event per line either way."""


class Settings(BaseSettings):
    """Everything that can be set. Built by `load_settings`; the constructor itself reads no environment."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    data_dir: Path = Path("treadle-data")
    """Directory of the database, checkpoints and payloads; one server at a time. Relative to where treadle starts."""
    models: tuple[ModelSettings, ...] = (ModelSettings(name=BUNDLED_MODEL, source=BUNDLED_MODEL),)
    """Base models, each a pool: NAME_OR_PATH or NAME=PATH, or a table of name, source, revision."""
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    sampler: SamplerSettings = SamplerSettings()
    limits: LimitSettings = LimitSettings()
    store: StoreSettings = StoreSettings()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()

    @property
    def database_url(self) -> str:
        """`store.url`, or the SQLite file in the data directory."""
        return self.store.url or f"sqlite:///{self.database_file}"

    @property
    def database_file(self) -> Path:
        """Where SQLite's file lies when `store.url` is empty."""
        return self.data_dir.resolve() / "treadle.db"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed: merging is `load_settings`'s, because it also has to say where values came from."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @field_validator("data_dir")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("models")
    @classmethod
    def _names_are_distinct(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        if not models:
            raise ValueError("at least one model is needed")
        names = [model.name for model in models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two models are called {twice[0]!r}; give one of them another name: NAME=PATH")
        return models
