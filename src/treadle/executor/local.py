"""An executor whose worker is a child process of this server, joined by a pipe.

The child dies with the pipe. A spare process, if there is one, becomes the worker, and the next spare is started a
little later. What is done with messages is in channel.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from treadle.domain.limits import HANG_AFTER_S
from treadle.domain.outcome import PoolFacts
from treadle.domain.roles import Role
from treadle.executor.base import DeathCallback, PartsCallback, SamplesCallback
from treadle.executor.channel import Channel
from treadle.executor.messages import WorkerConfig
from treadle.executor.pipe import PipeTransport
from treadle.executor.spare import WORKER_COMMAND, Spare, start_process
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# A spare's imports take seconds of a core, which a worker that was just started needs for what it has to make up for.
SPARE_AFTER_S = 2.0


class LocalExecutor(Channel):
    """One worker process. `start` may be called once; after a death make a new executor."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        role: Role = Role.BOTH,
        name: str = "",
        command: Sequence[str] = WORKER_COMMAND,
        spare: Spare | None = None,
        spare_after_s: float = SPARE_AFTER_S,
        hang_after_s: float = HANG_AFTER_S,
        on_parts: PartsCallback | None = None,
    ) -> None:
        super().__init__(role=role, name=name or config.base_model, hang_after_s=hang_after_s, on_parts=on_parts)
        self._config = config
        self._command = command
        self._spare = spare
        self._spare_after_s = spare_after_s
        self._spare_timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, once started."""
        return None if self._transport is None else self._process.process.pid

    @property
    def _process(self) -> PipeTransport:
        assert isinstance(self._transport, PipeTransport)
        return self._transport

    def _open(self) -> PipeTransport:
        spare = None if self._spare is None else self._spare.take(self._command)
        child = spare or start_process(self._command)
        log.info("worker launched", worker=self.name, pid=child.process.pid, was_spare=spare is not None)
        # A spare that died a moment ago is found out by the receiving side.
        with contextlib.suppress(OSError):
            child.connection.send(self._config)
        return PipeTransport(child)

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        """See Executor.start."""
        facts = await super().start(on_samples=on_samples, on_death=on_death)
        if self._spare is not None:
            loop = asyncio.get_running_loop()
            self._spare_timer = loop.call_later(self._spare_after_s, self._spare.prepare, self._command)
        return facts

    def _cancel_timers(self) -> None:
        super()._cancel_timers()
        if self._spare_timer is not None:
            self._spare_timer.cancel()
