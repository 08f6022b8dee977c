"""A real server whose worker computes almost nothing: what is left is what the server itself costs.

    python scripts/bench/fake_server.py DATA_DIR [SETTING=VALUE ...]    like `treadle serve --port 0 --data DATA_DIR`
    python scripts/bench/fake_server.py --worker FD                     its worker process (the server starts it)

Everything but the model is the real thing: uvicorn, gateway, SQLite, scheduler, and a worker process behind the real
pipe, which decodes real payloads and encodes real results. The model is that of executor/fake_model.py.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

from treadle.blobs import open_blobs
from treadle.config import load_settings
from treadle.executor.fake import FakeExecutor
from treadle.executor.local import LocalExecutor
from treadle.executor.messages import (
    CallDone,
    CancelSamples,
    CycleDone,
    Evict,
    FromWorker,
    Loaded,
    RunCycle,
    SamplesDone,
    Snapshot,
    Stop,
    SubmitSamples,
    ToWorker,
    WorkerConfig,
)


class FakeWorker:
    """Answers the messages of executor/child.py with a FakeExecutor."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def serve(self) -> None:
        """Until told to stop, or the server is gone."""
        config: WorkerConfig = self._connection.recv()
        executor = FakeExecutor(open_blobs(config.blobs_url))
        facts = await executor.start(
            on_samples=lambda outcomes: self._send(SamplesDone(tuple(outcomes))), on_death=sys.exit
        )
        self._send(Loaded(facts))
        inbox: asyncio.Queue[ToWorker] = asyncio.Queue()
        threading.Thread(
            target=self._read_forever, args=(asyncio.get_running_loop(), inbox.put_nowait), daemon=True
        ).start()
        while not isinstance(message := await inbox.get(), Stop):
            await self._answer(executor, message)

    def _read_forever(self, loop: asyncio.AbstractEventLoop, put: Callable[[ToWorker], None]) -> None:
        while True:
            try:
                message: ToWorker = self._connection.recv()
            except (EOFError, OSError):
                message = Stop()
            loop.call_soon_threadsafe(put, message)
            if isinstance(message, Stop):
                return

    async def _answer(self, executor: FakeExecutor, message: ToWorker) -> None:
        match message:
            case RunCycle(work=work):
                self._send(CycleDone(await executor.run_cycle(work)))
            case SubmitSamples(samples=samples):
                executor.submit_samples(samples)
            case CancelSamples(request_ids=request_ids):
                executor.cancel_samples(request_ids)
            case Snapshot(call_id=call_id, targets=targets, with_open_gradient=with_open_gradient):
                written = await executor.snapshot(targets, with_open_gradient=with_open_gradient)
                self._send(CallDone(call_id=call_id, written=written))
            case Evict(call_id=call_id, model_ids=model_ids):
                await executor.evict(model_ids)
                self._send(CallDone(call_id=call_id))
            case _:
                raise AssertionError(f"a fake worker cannot {message}")

    def _send(self, message: FromWorker) -> None:
        self._connection.send(message)


def main() -> int:
    if sys.argv[1] == "--worker":
        asyncio.run(FakeWorker(Connection(int(sys.argv[2]))).serve())
        return 0
    from treadle.server import run

    overrides = dict(argument.split("=", 1) for argument in sys.argv[2:])
    settings = load_settings(None, {"server.port": 0, "data_dir": sys.argv[1], "log.level": "warning", **overrides})
    return run(settings, make_executor=partial(LocalExecutor, command=(sys.executable, __file__, "--worker")))


if __name__ == "__main__":
    raise SystemExit(main())
