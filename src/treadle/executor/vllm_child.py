"""The vLLM process: `python -m treadle.executor.vllm_child FD`, started by executor/vllm.py.

It speaks the sampling half of the worker's messages. It may run in another environment than the server: of ours it
needs what a worker needs, and vllm, which nothing but a start imports. When the pipe closes it ends, with the engine.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import treadle
from treadle.blobs import open_blobs
from treadle.domain.ids import RequestId
from treadle.domain.limits import PROGRESS_EVERY_S
from treadle.domain.outcome import SampleOutcome
from treadle.errors import ConfigError
from treadle.executor.codec import decode_samples, encode_samples
from treadle.executor.messages import (
    CancelSamples,
    FromWorker,
    Loaded,
    LoadFailed,
    Progress,
    SamplesDone,
    SamplesGrew,
    Stop,
    SubmitSamples,
    ToWorker,
    WorkerConfig,
)
from treadle.executor.vllm_messages import StartVllm
from treadle.executor.vllm_processes import end_others
from treadle.telemetry.logs import configure_logging, get_logger
from treadle.worker.failures import internal_failure
from treadle.worker.handoff import Handoff
from treadle.worker.modelscope_hub import fetch_from_modelscope
from treadle.worker.work import DecodedSample

if TYPE_CHECKING:
    from treadle.sampler.vllm import VllmEngine, VllmSampler

log = get_logger(__name__)


class VllmService:
    """One vLLM's life, on one event loop. send: carries a message to the server; called on the loop."""

    def __init__(self, send: Callable[[FromWorker], None]) -> None:
        self._send_message = send
        self._last_sent = time.monotonic()
        self._sampler: VllmSampler | None = None
        self._stopping = asyncio.Event()

    async def run(self, start: StartVllm) -> int:
        """Load the model and serve until told to stop; the exit status."""
        config = start.worker
        try:
            engine = await self._load(start)
        except Exception as error:  # noqa: BLE001 (worker entry: whatever stops the load must reach the operator)
            log.error("vLLM failed to start", base_model=config.base_model, error=repr(error))
            reason = " ".join(str(error).split())
            message = f"base model {config.base_model} could not be loaded by vLLM: {reason}"
            self._send(LoadFailed(message=message, is_config=isinstance(error, ConfigError | OSError | ValueError)))
            return 1
        self._sampler = self._sampler_of(engine, start)
        self._send(Loaded(engine.model.facts))
        stopping = asyncio.ensure_future(self._stopping.wait())
        ends: list[asyncio.Future[Any]] = [stopping, self._sampler.died, asyncio.ensure_future(_is_dead(engine))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            return 0
        log.error("vLLM's engine died", base_model=config.base_model)
        return 1

    def take(self, message: ToWorker) -> None:
        """Hand a message over; on the loop. Those before `Loaded` was sent are none of the server's."""
        match message:
            case Stop():
                self._stopping.set()
            case SubmitSamples(samples=samples):
                assert self._sampler is not None
                decoded, refused = decode_samples(samples)
                if refused:
                    self._send(SamplesDone(refused))
                for sample in decoded:
                    self._submit(self._sampler, sample)
            case CancelSamples(request_ids=request_ids):
                assert self._sampler is not None
                self._sampler.cancel(request_ids)
            case _:
                raise AssertionError(f"vLLM does not train: {message!r}")

    def _submit(self, sampler: VllmSampler, sample: DecodedSample) -> None:
        try:
            sampler.submit(sample.request_id, sample.tenant_id, sample.op)
        except Exception as error:  # noqa: BLE001 (worker entry: a bug in one sample must not lose it, nor the others)
            log.error("sample not taken", request_id=sample.request_id, exc=error)
            self._send_outcomes([SampleOutcome(sample.request_id, failure=internal_failure("this sample"))])

    async def _load(self, start: StartVllm) -> VllmEngine:
        if start.treadle_version != treadle.__version__:
            raise ConfigError(
                f"the environment of {sys.executable} has treadle {treadle.__version__}, "
                f"the server is {start.treadle_version}"
            )
        if find_spec("vllm") is None:
            raise ConfigError(f"{sys.executable} has no vllm: install the extra, or set sampler.vllm.python")
        from treadle.sampler.vllm import open_engine

        config = start.worker
        source, revision = await asyncio.to_thread(_place_of, config)
        return await open_engine(
            source,
            revision,
            name=config.base_model,
            device=config.device,
            dtype=config.dtype,
            max_running=config.max_running_samples,
            options=start.options,
            directory=Path(start.directory),
            on_step=self._progress,
        )

    def _sampler_of(self, engine: VllmEngine, start: StartVllm) -> VllmSampler:
        from treadle.sampler.vllm import VllmSampler

        staging_dir = start.worker.staging_dir
        # The server makes the place.
        handoff = Handoff(
            open_blobs(start.worker.blobs_url, create=False),
            staging_dir=None if staging_dir is None else Path(staging_dir),
        )
        return VllmSampler(
            engine,
            read=handoff.read,
            on_outcomes=self._send_outcomes,
            on_parts=lambda parts: self._send(SamplesGrew(tuple(parts))),
            on_handed_over=_log_handed_over,
        )

    def _send_outcomes(self, outcomes: Sequence[SampleOutcome]) -> None:
        self._send(SamplesDone(encode_samples(outcomes)))

    def _progress(self) -> None:
        if self._sampler is not None and time.monotonic() - self._last_sent >= PROGRESS_EVERY_S:
            self._send(Progress())

    def _send(self, message: FromWorker) -> None:
        self._send_message(message)
        self._last_sent = time.monotonic()


async def _is_dead(engine: VllmEngine) -> None:
    """Return when the engine has died, though nobody asks it for anything."""
    while not engine.llm.errored:  # noqa: ASYNC110 (it tells nobody)
        await asyncio.sleep(PROGRESS_EVERY_S)


def _place_of(config: WorkerConfig) -> tuple[str, str | None]:
    """What vLLM and transformers load: the model's directory, or its name and revision."""
    if config.hub == "modelscope" and not Path(config.source).is_dir():
        return fetch_from_modelscope(config.source, config.revision), None
    return config.source, config.revision


def _log_handed_over(request_id: RequestId, reason: str) -> None:
    log.info("sample handed to the built-in sampler", request_id=request_id, reason=reason)


def _read_forever(
    connection: Connection, loop: asyncio.AbstractEventLoop, take: Callable[[ToWorker], None], directory: str
) -> None:
    while True:
        try:
            message: ToWorker = connection.recv()
        except (EOFError, OSError):
            _leave(0, directory)  # the server is gone; no orphan may hold the device
        loop.call_soon_threadsafe(take, message)


def _leave(status: int, directory: str) -> None:
    """End with everything that vLLM started, if this process leads them, and with what lies in its directory."""
    sys.stderr.flush()
    group = os.getpgid(0)
    if group == os.getpid():
        end_others(group)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(status)


async def _serve(connection: Connection) -> None:
    try:
        start: StartVllm = connection.recv()
    except (EOFError, OSError):
        return
    configure_logging(level=start.worker.log_level, style=start.worker.log_format)
    service = VllmService(connection.send)
    loop = asyncio.get_running_loop()
    threading.Thread(
        target=_read_forever,
        args=(connection, loop, service.take, start.directory),
        name="treadle-pipe-reader",
        daemon=True,
    ).start()
    # At once: the loop would wait for what the engine's client still does.
    _leave(await service.run(start), start.directory)


def main() -> None:
    """Entry point; the pipe's file descriptor is the only argument."""
    # The server reserves stdout for its ready line; a library that prints must not break it.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    descriptor = int(sys.argv[1])
    # Not for the engine's processes: with their copy the server would not see that this one has ended.
    os.set_inheritable(descriptor, False)
    asyncio.run(_serve(Connection(descriptor)))


if __name__ == "__main__":
    main()
