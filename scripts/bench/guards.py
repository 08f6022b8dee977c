"""What the guards of src/treadle/http_server.py cost a request: the protocol's own time, with and without them.

Requests are fed to uvicorn's protocol as bytes, without sockets, and answered by an app that does nothing; the two
protocols take turns, and the median of the repetitions counts. Writes JSON to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from typing import Any

import uvicorn
import uvloop
from http_load import request_bytes
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from treadle.config.tree import ServerSettings
from treadle.http_server import Connections, http_config
from treadle.telemetry.metrics import Metrics

# What a heartbeat, and a small pass, look like on the wire.
BODIES = {"heartbeat": 60, "small_pass": 4_000}


class Transport(asyncio.Transport):
    """Takes everything and sends nothing."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and answers two bytes."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


def protocol_of(*, guards: bool) -> HttpToolsProtocol:
    connections = Connections(ServerSettings(), Metrics(CollectorRegistry()))
    plain = uvicorn.Config(app, log_config=None, access_log=False, ws="none")
    config = http_config(app, connections) if guards else plain
    config.load()
    protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
    protocol.connection_made(Transport())
    assert isinstance(protocol, HttpToolsProtocol)
    return protocol


async def seconds_for(protocol: HttpToolsProtocol, request: bytes, count: int) -> float:
    started_at = time.perf_counter()
    for _ in range(count):
        protocol.data_received(request)
        while not protocol.cycle.response_complete:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0)
    return time.perf_counter() - started_at


async def measure(count: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Microseconds per request of each kind."""
    found = {}
    for name, size in BODIES.items():
        request = request_bytes("/api/v1/session_heartbeat", b"x" * size, key="tml-key")
        times: dict[bool, list[float]] = {False: [], True: []}
        protocols = {guards: protocol_of(guards=guards) for guards in times}
        for repetition in range(repetitions + 1):
            for guards, protocol in protocols.items():
                taken = await seconds_for(protocol, request, count)
                if repetition:  # the first one warms up
                    times[guards].append(taken / count * 1e6)
        plain, guarded = (statistics.median(times[guards]) for guards in (False, True))
        found[name] = {
            "plain_us": round(plain, 2),
            "guarded_us": round(guarded, 2),
            "guards_us": round(guarded - plain, 2),
            "min_guards_us": round(min(times[True]) - min(times[False]), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(args.count, args.repetitions))
    about = {"python": platform.python_version(), "uvicorn": uvicorn.__version__, **vars(args)}
    print(json.dumps({"about": about, "requests": found}, indent=2))


if __name__ == "__main__":
    main()
