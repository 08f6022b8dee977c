"""The composition root: settings in, a running server out. The only place that knows every concrete class.

Start: lock the data directory, launch the workers (their imports are what takes time), open the store, listen,
then lead each pool. Stop (SIGTERM, SIGINT): refuse new work, finish the cycles in flight, persist every run, stop the
workers, let waiting clients go, exit 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from treadle.blobs import BlobStore, open_blobs
from treadle.config import ModelSettings, Settings, check_bind, is_loopback
from treadle.domain.ids import PoolName
from treadle.domain.roles import Role
from treadle.errors import ConfigError, StoreUnavailable, TreadleError
from treadle.executor.base import SamplingExecutor
from treadle.executor.channel import SamplingChannel
from treadle.executor.local import LocalExecutor
from treadle.gateway.app import create_app
from treadle.gateway.authenticators.bootstrap import register_first_key
from treadle.gateway.chat.live import LiveSamples
from treadle.gateway.deps import GatewayDeps, GatewaySettings, PoolDirectory, Readiness
from treadle.http_server import Connections, http_config
from treadle.scheduler.clock_settings import CycleSettings
from treadle.scheduler.holders import this_process
from treadle.scheduler.pool import PoolRunner
from treadle.scheduler.slot import slot_name, slot_names
from treadle.scheduler.sweeps import Sweeper
from treadle.scheduler.weights import TenantWeights
from treadle.server_metrics import WorkerGauges, count_store, show_pools
from treadle.server_pools import ServedPools
from treadle.server_workers import MakeLocal, Workers
from treadle.store import Store
from treadle.store.policy_watch import PolicyWatch
from treadle.store.pool_watch import PoolWatch
from treadle.telemetry.collector import tracing_to
from treadle.telemetry.logs import configure_logging, get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# The garbage collector's generations: the middle one ends at 25,000 objects, which takes it some 10 ms.
GC_THRESHOLDS = (5_000, 5, 10)
# Of the files that the database names, so many are looked for at the start: a few may have gone a moment ago.
_NUM_BLOBS_LOOKED_FOR = 20
# After the drain, how long open connections get to take their last answers.
CLOSE_S = 3


def run(settings: Settings, *, make_executor: MakeLocal = LocalExecutor) -> int:
    """Serve until told to stop; the exit status. Raises ConfigError for what an operator must fix.

    make_executor: a local worker that is not started yet, for its configuration.
    """
    configure_logging(level=settings.log.level, style=settings.log.format)
    loop_factory = uvloop.new_event_loop
    with _claimed(settings), tracing_to(settings.otel), asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(Server(settings, make_executor=make_executor).serve())


@contextlib.contextmanager
def _claimed(settings: Settings) -> Iterator[None]:
    """The data directory exists, and is this server's alone unless servers share the database and thus the work."""
    data_dir = settings.data_dir
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "lock").open("a")
    except OSError as error:
        raise ConfigError(
            f"the data directory {data_dir} cannot be written: {error.strerror or error}; choose another with --data"
        ) from error
    with file as lock:
        if not settings.is_shareable:
            _lock(lock, data_dir)
        yield


def _lock(file: IO[str], data_dir: Path) -> None:
    """Lock an open file until it is closed. Raises ConfigError while another server holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another treadle server runs on the data directory {data_dir}; stop it, or choose another with --data"
        ) from None


class Clock:
    """The machine's clocks, as the gateway wants them."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class Server:
    """One server process from start to stop."""

    def __init__(self, settings: Settings, *, make_executor: MakeLocal = LocalExecutor) -> None:
        """Raises ConfigError when a directory of a model holds none, or what its workers need is not installed."""
        self._settings = settings
        self._metrics = Metrics(CollectorRegistry())
        self._gauges = WorkerGauges(self._metrics)
        self._live = LiveSamples()
        self._workers = Workers(settings, make_local=make_executor, on_parts=self._live.publish)
        self._policies: PolicyWatch | None = None
        for model in settings.models:
            model.local_dir()
        self._is_draining = False
        self._stop = asyncio.Event()

    async def serve(self) -> int:
        """Run until a signal; 0 after a drain in time, 1 when something that serves ended on its own."""
        self._handle_signals()
        launched = self._workers.launch_early()
        try:
            store = await Store.open(self._settings.database_url)
            try:
                return await self._serve_on(store, launched)
            finally:
                await store.close()
        finally:
            # Whatever went wrong, no worker outlives this.
            await asyncio.gather(*(executor.stop() for of_pool in launched.values() for executor in of_pool.values()))
            await self._workers.stop()

    async def _serve_on(self, store: Store, launched: Mapping[str, dict[str, SamplingChannel]]) -> int:
        settings = self._settings
        if settings.auth.bootstrap_key_file is not None:
            await register_first_key(store, settings.auth.bootstrap_key_file)
        any_key_exists = await store.keys.any_ever()
        check_bind(settings.server.host, any_key_exists=any_key_exists, methods=settings.auth.methods)
        if "open" in settings.auth.methods or not (settings.auth.methods or any_key_exists):
            log.warning("open mode: every tml- key is accepted as a tenant of its own; treadle keys create ends it")
        blobs = open_blobs(settings.blobs_url)
        await check_blobs(store, blobs, place=settings.blobs_url)
        self._policies, watch = PolicyWatch(store), PoolWatch(store)
        await self._policies.start()
        try:
            await watch.start()
            try:
                return await self._serve_pools(store, blobs, watch, launched)
            finally:
                await watch.stop()
        finally:
            await self._policies.stop()

    async def _serve_pools(
        self, store: Store, blobs: BlobStore, watch: PoolWatch, launched: Mapping[str, dict[str, SamplingChannel]]
    ) -> int:
        settings = self._settings
        unused = dict(launched)

        def make_runner(model: ModelSettings, is_essential: bool) -> PoolRunner:
            first = unused.pop(model.name, {}) if is_essential else {}
            return self._runner(model, store, blobs, first, is_essential=is_essential)

        pools = ServedPools(
            models=settings.models, watch=watch, make_runner=make_runner, scale_of=self._workers.scale_of
        )
        await pools.open()
        await self._stop_unwanted(watch, launched, unused)
        store.events.on_enqueued(pools.wake)
        named = {PoolName(model.name): (model.source, model.revision) for model in settings.models}
        directory = PoolDirectory(pools.views, watch, settings=named)
        count_store(self._metrics, store)
        show_pools(self._metrics, pools)
        with _listening(settings.server.host, settings.server.port) as listener:
            return await self._serve_http(store, blobs, pools, directory, listener)

    async def _stop_unwanted(
        self,
        watch: PoolWatch,
        launched: Mapping[str, dict[str, SamplingChannel]],
        unused: dict[str, dict[str, SamplingChannel]],
    ) -> None:
        """End what was launched for pools, and for workers of pools, that operators have removed meanwhile."""
        unwanted = [executor for of_pool in unused.values() for executor in of_pool.values()]
        for model in self._settings.models:
            scale = watch.now.scale_of(PoolName(model.name), self._workers.scale_of(model))
            of_pool = {} if model.name in unused else launched.get(model.name, {})
            unwanted += [of_pool.pop(name) for name in of_pool.keys() - slot_names(scale)]
        unused.clear()
        await asyncio.gather(*(executor.stop() for executor in unwanted))

    def _runner(
        self,
        model: ModelSettings,
        store: Store,
        blobs: BlobStore,
        launched: dict[str, SamplingChannel],
        *,
        is_essential: bool,
    ) -> PoolRunner:
        """launched: workers that were started already, by slot."""
        scheduler = self._settings.scheduler
        policies = self._policies
        assert policies is not None, "it is read before there are pools"

        def make_executor(index: int, role: Role) -> SamplingExecutor:
            slot = slot_name(index, trains=role is not Role.SAMPLING)
            worker = launched.pop(slot, None) or self._workers.make(model, index, role)
            self._gauges.watch(model.name, slot, worker)
            return worker

        return PoolRunner(
            pool=PoolName(model.name),
            store=store,
            blobs=blobs,
            make_executor=make_executor,
            settings=CycleSettings(
                gather_window_s=scheduler.gather_window_ms / 1000,
                target_cycle_s=scheduler.target_cycle_s,
                budget_tokens=scheduler.cycle_budget_tokens,
                cap_fraction=scheduler.tenant_cap_fraction,
                gap_wait_s=scheduler.gap_wait_s,
                max_replay_s=scheduler.max_replay_s,
            ),
            holder=this_process(),
            lease_ttl_s=scheduler.lease_ttl_s,
            policies=lambda: policies.now,
            weights=TenantWeights(store, scheduler.weight_of, monotonic=time.monotonic),
            metrics=self._metrics,
            clock=time.time,
            is_essential=is_essential,
            scale=self._workers.scale_of(model),
        )

    async def _serve_http(
        self, store: Store, blobs: BlobStore, pools: ServedPools, directory: PoolDirectory, listener: socket.socket
    ) -> int:
        settings = self._settings
        http = _QuietServer(
            http_config(
                create_app(self._gateway_deps(store, blobs, pools, directory)),
                Connections(settings.server, self._metrics),
                timeout_graceful_shutdown=CLOSE_S,
                lifespan="on",
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]), name="http")
        leading = asyncio.create_task(pools.run(), name="pools")
        announcing = asyncio.create_task(self._announce(pools, listener))
        sweeper = Sweeper(
            store=store,
            blobs=blobs,
            pools=[pools],
            settings=settings.retention,
            clock=time.time,
            metrics=self._metrics,
        )
        sweeping = asyncio.create_task(sweeper.run(), name="sweeps")
        try:
            stopping = asyncio.create_task(self._stop.wait())
            failing = asyncio.create_task(pools.failed.wait())
            await asyncio.wait({serving, stopping, failing, leading}, return_when=asyncio.FIRST_COMPLETED)
            is_asked = self._stop.is_set()
            is_clean = await self._drain(pools, leading)
            if not is_asked and not leading.cancelled():
                leading.result()  # what ended a pool for good is the reason to stop, and is raised here
            return 0 if is_asked and is_clean else 1
        finally:
            announcing.cancel()
            stopping.cancel()
            failing.cancel()
            sweeping.cancel()
            http.should_exit = True
            await asyncio.gather(serving, announcing, stopping, failing, sweeping, return_exceptions=True)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._is_draining:
            log.warning("second signal: stopping without a drain")
            for task in asyncio.all_tasks():
                if task.get_name().startswith("pool "):
                    task.cancel()
        self._stop.set()

    async def _drain(self, pools: ServedPools, leading: asyncio.Task[bool]) -> bool:
        """Finish what runs, within the bound; False when a pool had to be cut off or failed."""
        self._is_draining = True
        log.info("draining", bound_s=self._settings.server.drain_s)
        pools.drain()
        _, late = await asyncio.wait({leading}, timeout=self._settings.server.drain_s)
        if late:
            log.warning("drain took too long", pools=pools.running())
            leading.cancel()
        [result] = await asyncio.gather(leading, return_exceptions=True)
        log.info("drained", in_time=not late)
        return result is True

    async def _announce(self, pools: ServedPools, listener: socket.socket) -> None:
        """The one line on stdout: where the server is, once every pool serves."""
        await pools.wait_served()
        _settle_garbage()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        sys.stdout.write(f"treadle ready: http://{shown}:{port}{self._settings.server.root_path}\n")
        sys.stdout.flush()

    def _gateway_deps(
        self, store: Store, blobs: BlobStore, pools: ServedPools, directory: PoolDirectory
    ) -> GatewayDeps:
        settings = self._settings

        async def readiness() -> Readiness:
            return await self._readiness(store, pools)

        return GatewayDeps(
            store=store,
            blobs=blobs,
            clock=Clock(),
            pools=directory,
            settings=GatewaySettings(
                is_loopback=is_loopback(settings.server.host),
                auth_methods=settings.auth.methods,
                modelscope=settings.auth.modelscope,
                losses=settings.losses,
                has_jwt=settings.auth.jwt,
                root_path=settings.server.root_path,
                public_url=settings.server.public_url,
                max_lora_rank=settings.limits.max_lora_rank,
                hold_s=settings.server.hold_s,
                max_body_bytes=settings.server.max_body_bytes,
                max_decompressed_bytes=settings.server.max_decompressed_bytes,
                max_datums_per_request=settings.limits.max_datums_per_request,
                max_num_samples=settings.limits.max_num_samples,
                max_queued_samples_per_tenant=settings.sampler.max_queued_samples_per_tenant,
                max_queued_tokens_per_tenant=settings.limits.max_queued_tokens_per_tenant,
                max_queued_bytes_per_tenant=settings.limits.max_queued_bytes_per_tenant,
                max_queued_tokens=settings.limits.max_queued_tokens,
                max_queued_bytes=settings.limits.max_queued_bytes,
                max_body_bytes_in_memory=settings.limits.max_body_bytes_in_memory,
                max_failed_logins_per_minute=settings.server.max_failed_logins_per_minute,
            ),
            readiness=readiness,
            is_draining=lambda: self._is_draining,
            draw_seed=lambda: secrets.randbits(63),
            live=self._live,
            metrics=self._metrics,
            policies=self._policies,
        )

    async def _readiness(self, store: Store, pools: ServedPools) -> Readiness:
        reasons = []
        try:
            if not await store.schema_is_current():
                reasons.append("the database schema is not current; restart treadle to migrate it")
        except TreadleError as error:
            reasons.append(error.message)
        if self._is_draining:
            reasons.append("the server is stopping")
        reasons += pools.unready()
        return Readiness(is_ready=not reasons, reasons=tuple(reasons))


async def check_blobs(store: Store, blobs: BlobStore, *, place: str) -> None:
    """Raises ConfigError when nothing is there of what the database names: it is another place, or not mounted.

    A leader would take every run for lost, and forget its snapshots.
    """
    named = (await store.upkeep.named_blobs())[:_NUM_BLOBS_LOOKED_FOR]
    try:
        is_there = await asyncio.gather(*(asyncio.to_thread(blobs.exists, key) for key in named))
    except StoreUnavailable as error:
        log.warning("blobs not looked for", reason=error.message)
        return
    if named and not any(is_there):
        raise ConfigError(
            f"{place} has none of the files that the database names, {named[0]} among them: is it the right place "
            "(TREADLE_BLOBS__URL), and is it mounted? `treadle db check` lists what is missing"
        )


def _settle_garbage() -> None:
    """Take what exists by now, which stays anyway, out of garbage collection.

    A full collection walks every object of every imported module: with it, each one stops all clients for a third of
    a second. Reference counts free nearly everything at once; what is left can wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers: the composition root decides when HTTP ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket. Raises ConfigError when the address is taken or not ours."""
    try:
        listener = socket.create_server((host, port), family=_family(host), backlog=2048, reuse_port=False)
    except OSError as error:
        # Not strerror: asyncio's and the socket module's say the address once more.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another with --host or --port") from error
    with listener:
        yield listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
