"""The store: one object, one part per resource.

    store = await Store.open("sqlite:////data/treadle.db")
    await store.requests.enqueue(request)

It belongs to the event loop it was opened on. See writer.py for what a write promises and engine.py for reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa

from treadle.store import migrate
from treadle.store.admin_audit import AdminAudit
from treadle.store.admin_checkpoints import AdminCheckpoints
from treadle.store.admin_usage import AdminUsage
from treadle.store.audit import AuditLog
from treadle.store.backlog import BacklogReads
from treadle.store.checkpoints import Checkpoints
from treadle.store.commands import Commands
from treadle.store.copies import Copies
from treadle.store.custom_losses import CustomLosses
from treadle.store.cycles import Cycles
from treadle.store.engine import Database, translated
from treadle.store.events import Events
from treadle.store.keys import Keys
from treadle.store.leases import Leases, LeaseStatements
from treadle.store.loss_rules import LossRules
from treadle.store.models import Models
from treadle.store.named_losses import NamedLosses
from treadle.store.notify import Notifier
from treadle.store.organizations import Organizations
from treadle.store.policies import PolicyReads
from treadle.store.pool_settings import PoolSettings
from treadle.store.pools import Pools
from treadle.store.projects import Projects
from treadle.store.quotas import Quotas
from treadle.store.rates import Rates
from treadle.store.recent import RecentFutures
from treadle.store.request_rows import RequestRows
from treadle.store.requests import Requests
from treadle.store.retention import Retention
from treadle.store.run_search import RunSearch
from treadle.store.runlog import RunLog
from treadle.store.sampling import Sampling, SamplingInserts
from treadle.store.secrets import Secrets
from treadle.store.session_search import SessionSearch
from treadle.store.sessions import Sessions
from treadle.store.slots import SlotReports
from treadle.store.snapshots import SnapshotRows, Snapshots
from treadle.store.stability import StabilityRecords
from treadle.store.tenant_listing import TenantListing
from treadle.store.tenants import Tenants
from treadle.store.token_verdicts import TokenVerdicts
from treadle.store.traces import Traces
from treadle.store.upkeep import Upkeep
from treadle.store.usage import Usage
from treadle.store.writer import CommitReport, Writer


class Store:
    """What the layers above hold. Any method of any part may raise StoreUnavailable."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float] | None) -> None:
        lease_clock = time.time if clock is None and database.dialect.now() is None else clock
        statements = LeaseStatements(database.dialect, lease_clock)
        clock = clock or time.time
        self._database = database
        self._writer = writer
        rows = RequestRows(database.dialect)
        sampling_inserts = SamplingInserts(database.dialect)
        snapshot_rows = SnapshotRows(database.dialect)
        self.events = Events()
        self.keys = Keys(database=database, writer=writer, clock=clock)
        self.token_verdicts = TokenVerdicts(database=database, writer=writer, clock=clock)
        self.secrets = Secrets(database=database, writer=writer, clock=clock)
        self.sessions = Sessions(database=database, writer=writer, clock=clock)
        recent = RecentFutures()
        self.rates = Rates(database=database, writer=writer, clock=clock)
        self.quotas = Quotas(database=database, writer=writer, clock=clock)
        self.requests = Requests(
            database=database, writer=writer, events=self.events, rows=rows, recent=recent, clock=clock
        )
        self.models = Models(database=database, writer=writer, rows=rows, requests=self.requests, clock=clock)
        self.sampling = Sampling(database=database, writer=writer, inserts=sampling_inserts)
        self.checkpoints = Checkpoints(database=database, writer=writer, clock=clock)
        self.copies = Copies(database=database, writer=writer, clock=clock)
        self.leases = Leases(database=database, writer=writer, events=self.events, statements=statements)
        self.pools = Pools(database=database, writer=writer, events=self.events, statements=statements, clock=clock)
        self.pool_settings = PoolSettings(database=database, writer=writer, events=self.events, clock=clock)
        self.commands = Commands(database=database, writer=writer, events=self.events, clock=clock)
        self.cycles = Cycles(
            database=database,
            writer=writer,
            events=self.events,
            leases=self.leases,
            rows=rows,
            recent=recent,
            sampling=sampling_inserts,
            snapshots=snapshot_rows,
            rates=self.rates,
            clock=clock,
        )
        self.snapshots = Snapshots(database=database, writer=writer, rows=snapshot_rows)
        self.custom_losses = CustomLosses(database=database, writer=writer, events=self.events, rows=rows, clock=clock)
        self.loss_rules = LossRules(database=database, writer=writer, clock=clock)
        self.named_losses = NamedLosses(database=database, writer=writer, clock=clock)
        self.run_log = RunLog(database)
        self.run_search = RunSearch(database=database, models=self.models)
        self.retention = Retention(database=database, writer=writer)
        self.upkeep = Upkeep(database)
        self.stability = StabilityRecords(database=database, writer=writer, clock=clock)
        self.session_search = SessionSearch(database=database, clock=clock)
        self.audit = AuditLog(database)
        self.traces = Traces(database)
        self.usage = Usage(database=database, writer=writer, events=self.events, clock=clock)
        self.policies = PolicyReads(database)
        self.projects = Projects(database=database, writer=writer, clock=clock)
        self.tenants = Tenants(database=database, writer=writer, clock=clock)
        self.tenant_listing = TenantListing(database=database, clock=clock)
        self.organizations = Organizations(database=database, writer=writer, clock=clock)
        self.slots = SlotReports(database=database, writer=writer, clock=clock)
        self.admin_audit = AdminAudit(database)
        self.admin_usage = AdminUsage(
            database=database, clock=clock, first_hour_to_accrue=self.usage.first_hour_to_accrue
        )
        self.admin_checkpoints = AdminCheckpoints(database=database, writer=writer, clock=clock)
        self.backlog = BacklogReads(database)
        self._needed_version: str | None = None
        self._notifier: Notifier | None = None
        if database.dialect.can_notify:
            self._notifier = Notifier(database, self.events, forget=recent.forget)
            self.events.forward_to(self._notifier)

    @staticmethod
    async def open(url: str, *, clock: Callable[[], float] | None = None, migrate: bool = True) -> Store:
        """An open store on `url`: sqlite:////ABSOLUTE/PATH (the directory must exist) or postgresql://...

        `clock` gives seconds since the epoch; without one, leases go by PostgreSQL's own, and everything else by this
        machine's. `migrate` brings the schema to the newest version first. Raises
        ConfigError for a URL that is not supported or a database of a newer treadle, and StoreUnavailable.
        """
        database = Database.of(url)
        try:
            if migrate:
                await _upgrade(database)
            return Store(database=database, writer=Writer(database), clock=clock)
        except BaseException:
            await database.close()
            raise

    async def close(self) -> None:
        """Commit the writes that wait, then close. Later calls raise StoreUnavailable. Idempotent."""
        await self._writer.close()
        if self._notifier is not None:
            await self._notifier.close()
        await self._database.close()

    def on_commit(self, callback: Callable[[CommitReport], None]) -> None:
        """Call back behind each transaction of the writer, on the event loop. One callback; the last one counts."""
        self._writer.on_commit = callback

    @property
    def num_pending_writes(self) -> int:
        """Writes that wait for the next transaction."""
        return self._writer.num_pending

    async def ping(self) -> None:
        """Return when the database answers; else raise StoreUnavailable."""
        await self._database.read(lambda conn: conn.execute(sa.select(1)).scalar_one())

    async def schema_is_current(self) -> bool:
        """Whether the schema is the one this treadle needs."""
        if self._needed_version is None:
            # Reads the migrations' files, so once: readiness is asked for often.
            self._needed_version = migrate.newest_version()
        return await self._database.read(migrate.version_of) == self._needed_version


async def _upgrade(database: Database) -> None:
    with translated(database.dialect):
        await database.write(lambda conn: migrate.upgrade(conn, database.dialect))
