"""The Settings tree: every setting, its type, its default and its documentation.

The string under a field becomes the `--help` text and docs/configuration.md. It reads neither files nor environment
(sources.py does), and it refuses to know what the settings do.
Invariant: a Settings is immutable and every value in it was validated.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from treadle.config.execution import EngineSettings, ExecutorSettings, SamplerSettings, WorkerSettings
from treadle.config.names import BUNDLED_MODEL, local_dir_of, parse_model, why_name_is_refused
from treadle.config.section import Section
from treadle.config.telemetry import OtelSettings
from treadle.domain import limits
from treadle.domain.fairness import DEFAULT_WEIGHTS, WeightClass
from treadle.errors import ConfigError

ENV_PREFIX = "TREADLE_"

AuthMethod: TypeAlias = Literal["open", "keys", "modelscope"]


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
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$", max_length=200)
    """A prefix of every path, for example `/twinkle`: clients then use `http://HOST:PORT/twinkle`, and only
    `/healthz`, `/readyz` and `/metrics` answer without it. For a proxy that passes paths on as they are."""
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s/?#]+[^\s?#]*$", max_length=500)
    """Where clients reach this server when that is not what their requests say, prefix included, like
    `https://train.example.org/twinkle`: URLs of downloads begin with it. Set it behind a proxy."""
    max_body_bytes: int = Field(default=limits.MAX_BODY_BYTES, gt=0)
    """Largest request body, in bytes as sent."""
    max_decompressed_bytes: int = Field(default=limits.MAX_DECOMPRESSED_BYTES, gt=0)
    """Largest request body, in bytes after decompression."""
    max_header_bytes: int = Field(default=limits.MAX_HEADER_BYTES, ge=1_024)
    """Largest head of a request (its first line and headers), in bytes: beyond it 431 and the connection ends."""
    max_url_bytes: int = Field(default=limits.MAX_URL_BYTES, ge=1_024)
    """Longest URL of a request, in bytes: beyond it 414 and the connection ends."""
    header_timeout_s: float = Field(default=limits.HEADER_TIMEOUT_S, gt=0)
    """Seconds from the first byte of a request until its head is complete; also for a connection that sends nothing."""
    min_body_bytes_per_s: float = Field(default=limits.MIN_BODY_BYTES_PER_S, gt=0)
    """Slowest body: one that brings less than this on an average of 20 seconds ends its connection. Time in which the
    server itself does not read counts for nobody."""
    max_connections: int = Field(default=limits.MAX_CONNECTIONS, ge=1)
    """Most open connections of all clients; fewer where the system grants the process fewer files."""
    max_connections_per_address: int = Field(default=limits.MAX_CONNECTIONS_PER_ADDRESS, ge=1)
    """Most open connections of one client address (of one /64 network of IPv6)."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies in front, like `10.0.0.2` or `10.1.0.0/16`: the client's address is then the
    last one in X-Forwarded-For that is none of theirs, and the proxies' own connections are counted in total only."""
    max_failed_logins_per_minute: int = Field(default=limits.MAX_FAILED_LOGINS_PER_MINUTE, ge=1)
    """Requests with unknown keys from one address before its unknown keys are answered 429 without being looked up.
    Keys that are in use there go on."""

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"{proxy!r} is neither an address nor a network: {error}") from error
        return proxies


class ModelSettings(Section):
    """One base model; each becomes a pool of its own."""

    name: str
    """The name clients ask for and checkpoints carry."""
    source: str
    """A local directory, a hub name, or `treadle/tiny` for the bundled model."""
    revision: str | None = None
    """A branch, tag or commit of a hub model; empty means the hub's default. The commit is recorded."""
    workers: int | None = Field(default=None, ge=1, le=limits.MAX_WORKERS_PER_POOL)
    """Workers of this pool; empty: `worker.count`."""
    samplers: int | None = Field(default=None, ge=0, le=limits.MAX_WORKERS_PER_POOL)
    """Workers of this pool that only sample; empty: `worker.samplers`."""

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
    max_replay_s: float = Field(default=limits.MAX_REPLAY_S, gt=0)
    """Seconds of work of one run that the death of its worker may cost: snapshots are taken so often, as far as they
    cost less than 3 % of the time."""
    lease_ttl_s: float = Field(default=3.0, ge=0.5)
    """Seconds after which another server takes over a pool whose leader stopped renewing its lease. On the machine of
    the leader a standby takes over at once when the leader's process has ended."""
    preload_standby: bool = False
    """Load the model of a standing-by server too, so that it takes over without a pause; it holds the same memory as
    the leader then. Otherwise it keeps a process ready that has imported everything but the model (`worker.spare`)."""
    weight_interactive: float = Field(default=DEFAULT_WEIGHTS[WeightClass.INTERACTIVE], gt=0)
    """What a token of an `interactive` tenant weighs while others wait (`treadle admin tenants set`)."""
    weight_standard: float = Field(default=DEFAULT_WEIGHTS[WeightClass.STANDARD], gt=0)
    """The same for a tenant that was given no class."""
    weight_bulk: float = Field(default=DEFAULT_WEIGHTS[WeightClass.BULK], gt=0)
    """The same for a `bulk` tenant."""

    @property
    def weight_of(self) -> dict[WeightClass, float]:
        """The weight of each class."""
        return {
            WeightClass.INTERACTIVE: self.weight_interactive,
            WeightClass.STANDARD: self.weight_standard,
            WeightClass.BULK: self.weight_bulk,
        }


class LimitSettings(Section):
    """What one request may ask for, and how much may wait."""

    max_lora_rank: int = Field(default=limits.MAX_LORA_RANK, gt=0)
    """Largest LoRA rank."""
    max_datums_per_request: int = Field(default=limits.MAX_DATUMS_PER_REQUEST, gt=0, le=limits.MAX_DATUMS_PER_REQUEST)
    """Most datums in one forward_backward request. The SDK's chunks hold up to 1,024."""
    max_num_samples: int = Field(default=limits.MAX_NUM_SAMPLES, gt=0, le=limits.MAX_NUM_SAMPLES)
    """Most sequences in one sample request."""
    max_queued_tokens_per_tenant: int = Field(default=limits.MAX_QUEUED_TOKENS_PER_TENANT, gt=0)
    """Tokens of one tenant that may wait, samples and training apart. Beyond it samples are told to come back (429),
    and training ops are admitted but answered late, so that the client slows down."""
    max_queued_bytes_per_tenant: int = Field(default=limits.MAX_QUEUED_BYTES_PER_TENANT, gt=0)
    """The same in bytes of stored requests."""
    max_queued_tokens: int = Field(default=limits.MAX_QUEUED_TOKENS, gt=0)
    """The same for all tenants together, in tokens."""
    max_queued_bytes: int = Field(default=limits.MAX_QUEUED_BYTES, gt=0)
    """The same for all tenants together, in bytes: what the disk must have room for."""
    max_body_bytes_in_memory: int = Field(default=limits.MAX_BODY_BYTES_IN_MEMORY, ge=limits.MAX_BODY_BYTES)
    """Bytes of large request bodies that are read and decoded at the same time, tenants taking turns; others wait."""


class StoreSettings(Section):
    """The database that is the queue."""

    url: str = ""
    """URL of the database, `postgresql://USER@HOST/DATABASE` or `sqlite:////PATH`; empty means SQLite in the data
    directory. Several servers on one PostgreSQL stand by for each other; they must share `blobs.url` as well."""


class BlobSettings(Section):
    """Where checkpoints, snapshots and large requests are kept."""

    url: str = ""
    """A directory that all servers of one database and their workers share, or a bucket, which needs the extra
    `object-store`: `gs://BUCKET/PREFIX` or `s3://BUCKET/PREFIX`, where `?endpoint=http://minio:9000`, `region` and
    `credentials_file` (of the form of AWS's tools) may follow. Empty: `blobs` in the data directory."""


class RetentionSettings(Section):
    """How long what is over is kept; docs/lifecycle.md has the rules. Times are seconds."""

    sweep_interval_s: float = Field(default=limits.SWEEP_INTERVAL_S, gt=0)
    """Pause between two sweeps."""
    session_silence_s: float = Field(default=limits.SESSION_SILENCE_S, ge=1)
    """A session whose client sent nothing for so long expires: its runs go to cold storage, and none is ever dropped.
    The next sign of life makes it active again. The SDK sends a heartbeat every 10 s."""
    finished_session_s: float = Field(default=limits.FINISHED_SESSION_KEPT_S, ge=1)
    """A session that its client finished keeps the training state of its runs for so long. Checkpoints stay."""
    delivered_results_s: float = Field(default=limits.RESULT_KEPT_AFTER_DELIVERY_S, ge=1)
    """A result can be fetched again for so long after its first delivery."""
    undelivered_results_s: float = Field(default=limits.RESULT_KEPT_UNDELIVERED_S, ge=1)
    """A result that nobody fetched is kept for so long."""
    requests_s: float = Field(default=limits.FINISHED_REQUEST_KEPT_S, ge=1)
    """The row of a request that is over is kept at least for so long, and for as long as a restore may need it."""
    sampler_versions: int = Field(default=limits.SAMPLER_VERSIONS_KEPT, ge=1)
    """Newest unnamed sampler versions kept per run (`save_weights_and_get_sampling_client`)."""
    sampler_version_s: float = Field(default=limits.SAMPLER_VERSION_KEPT_S, ge=1)
    """An older unnamed version is kept for so long after its last use while its session lives."""
    stability_record_s: float = Field(default=limits.STABILITY_RECORD_KEPT_S, ge=1)
    """What was sampled with `record_stability_info` is kept for so long after the last request that trained on it."""
    unnamed_blobs_s: float = Field(default=limits.UNNAMED_BLOB_KEPT_S, ge=1)
    """A file that nothing names is kept for so long after it was written; no write may take as long."""


class ModelScopeSettings(Section):
    """Members of a ModelScope organisation as users, by their ModelScope access tokens (docs/authentication.md)."""

    organization: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$", max_length=128)
    """The organisation whose members may use this server. Needed when `auth.methods` has `modelscope`."""
    join_url: str = "https://www.modelscope.cn/organization/{organization}"
    """Where to ask for membership, as people who are refused are told. `{organization}` and `{user}` are replaced."""
    endpoint: str = Field(default="https://www.modelscope.cn", pattern=r"^https?://[^\s/?#]+$", max_length=300)
    """ModelScope's address. Redirects are not followed."""
    login_path: str = Field(default="/api/v1/login", pattern=r"^/[^\s]*$", max_length=300)
    """Path of the call that checks a token: POST {"AccessToken": TOKEN}, as the modelscope package makes it."""
    user_json_path: str = "Data.Username"
    """Where the answer to that call has the user's name: keys joined by dots."""
    membership_path: str = Field(
        default="/api/v1/organizations/{organization}/members/{user}", pattern=r"^/[^\s]*$", max_length=300
    )
    """Path of the call that tells who is a member: GET, with the user's token. `{organization}` and `{user}` are
    replaced. Not verified against ModelScope: try it before you rely on it."""
    member_json_path: str = "Data.IsMember"
    """Where the answer to that call has what counts: keys joined by dots, `*` for all entries of a list."""
    member_means: Literal["true", "user", "organization"] = "true"
    """What is found there for a member: JSON's `true`, the name of the `user` (in a list of members, say), or that of
    the `organization` (in a list of the user's)."""
    token_pattern: str = r"[A-Za-z0-9_.-]{16,256}"
    """A regular expression of what may be a token. Anything else is refused without asking ModelScope."""
    proxy: str = ""
    """URL of an HTTP proxy for these calls; empty: none. Variables like HTTPS_PROXY are not read."""
    timeout_s: float = Field(default=5.0, gt=0, le=30)
    """Seconds that ModelScope has for each call."""
    verdict_age_s: float = Field(default=300.0, ge=60, le=3_600)
    """Seconds for which it is believed that somebody is a member. A token in use is checked again well before."""
    non_member_age_s: float = Field(default=60.0, ge=1, le=3_600)
    """The same for somebody who is none: so long a new member waits at most."""
    stale_age_s: float = Field(default=24 * 3_600.0, ge=0)
    """While ModelScope does not answer, what it said last is believed for so many seconds after it said it."""
    max_calls: int = Field(default=8, ge=2, le=256)
    """Most calls to ModelScope at once. A quarter of them is kept for tokens of known members."""
    unknown_tokens_per_minute: int = Field(default=30, ge=1)
    """Unknown tokens of one client address (IPv6: of its /64) that ModelScope is asked about in a minute."""

    @field_validator("token_pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    @field_validator("join_url", "membership_path")
    @classmethod
    def _names_what_is_replaced(cls, template: str) -> str:
        try:
            template.format(organization="o", user="u")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{template!r} may have {{organization}} and {{user}}, and no other braces") from error
        return template


class AuthSettings(Section):
    """Who may call."""

    methods: tuple[AuthMethod, ...] = ()
    """How callers are recognised; several at once. `open`: every `tml-` key is a tenant of its own (loopback only).
    `keys`: keys of `treadle keys create`. `modelscope`: tokens of ModelScope, see `auth.modelscope`. Empty: `open` on a
    loopback address until the first key is created, then `keys` for good."""
    bootstrap_key_file: Path | None = None
    """A file for the first admin key. While no key was ever created, the server registers the key in it, or makes one
    and writes it there (mode 0600)."""
    jwt: bool = True
    """Let SDKs since 0.18 exchange their key for a token that lives an hour, and send that. `tinker auth whoami` needs
    it. A revoked key ends its tokens as well; without it, tokens that were given out are refused."""
    modelscope: ModelScopeSettings = ModelScopeSettings()

    @model_validator(mode="after")
    def _methods_fit(self) -> Self:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("methods names one twice")
        if "modelscope" in self.methods and not self.modelscope.organization:
            raise ValueError("methods has modelscope, which needs auth.modelscope.organization")
        if self.bootstrap_key_file is not None and self.methods and "keys" not in self.methods:
            raise ValueError("bootstrap_key_file is of a key, and methods has no keys")
        return self


# A server, and nothing behind it. Plain HTTP only to this machine: files are executed.
_HUB_URL = r"^(https://[^\s/?#@]+|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?)$"


class LossSettings(Section):
    """Losses that users submit, and their reviews."""

    python_files: Literal["isolated", "limited", "never"] = "isolated"
    """Whether the review of a loss executes a Python file. `isolated`: in a process that can open, start and reach
    nothing, which needs Linux on x86_64 or aarch64. `limited`: elsewhere too, with limits on time and memory alone.
    `never`: losses are submitted as graphs."""
    huggingface_url: str = Field(default="https://huggingface.co", pattern=_HUB_URL)
    """Where files of `hf://` losses are fetched from, when an operator begins a review."""
    modelscope_url: str = Field(default="https://www.modelscope.cn", pattern=_HUB_URL)
    """The same for `ms://`."""
    redirect_hosts: tuple[str, ...] = ()
    """Host names, beside the hubs' own, that they may send this server to. It follows no other redirect."""
    hub_proxy: str | None = Field(default=None, pattern=r"^https?://[^\s/?#@]+$")
    """A proxy to reach hubs through. Proxies of the environment are not used."""


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
    executor: ExecutorSettings = ExecutorSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    sampler: SamplerSettings = SamplerSettings()
    limits: LimitSettings = LimitSettings()
    store: StoreSettings = StoreSettings()
    blobs: BlobSettings = BlobSettings()
    retention: RetentionSettings = RetentionSettings()
    auth: AuthSettings = AuthSettings()
    losses: LossSettings = LossSettings()
    log: LogSettings = LogSettings()
    otel: OtelSettings = OtelSettings()

    @property
    def database_url(self) -> str:
        """`store.url`, or the SQLite file in the data directory."""
        return self.store.url or f"sqlite:///{self.database_file}"

    @property
    def blobs_url(self) -> str:
        """`blobs.url`, or the directory in the data directory."""
        return self.blobs.url or str(self.data_dir.resolve() / "blobs")

    @property
    def is_shareable(self) -> bool:
        """Whether several servers may use the database at once."""
        return self.store.url.startswith("postgresql")

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
