"""A ModelScope of the tests' own: a real HTTP server with the two calls of gateway/authenticators/modelscope_api.py.

It is strict where the contract is: a membership call without the session of the login before it is refused. `trouble`
makes it fail in one of the ways in which services fail; `gate` holds its answers back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

ORGANIZATION = "twinkle-explorers"
HUGE_BYTES = 50 * 2**20

Trouble = Literal[
    "",
    "500",
    "503 with an envelope",
    "429",
    "hangs",
    "slow drops",
    "not json",
    "html 403",
    "json list",
    "no name",
    "redirect",
    "huge",
    "compressed",
    "code 500",
    "closes",
]


@dataclass
class StandIn:
    """users: names by token. members: of ORGANIZATION. calls: the paths that were asked for."""

    users: dict[str, str] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    trouble: Trouble = ""
    # Which call has the trouble.
    troubled: Literal["login", "membership", "both"] = "both"
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[str] = field(default_factory=list)
    num_open: int = 0
    max_open: int = 0
    # Where it was redirected to.
    num_elsewhere: int = 0
    bytes_sent: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def num_logins(self) -> int:
        return sum(path.endswith("/login") for path in self.calls)

    async def login(self, request: Request) -> Response:
        """POST {"AccessToken": ...}, without anything of another user's."""
        assert not request.cookies, request.cookies
        body = await request.json()
        assert set(body) == {"AccessToken"}, body
        name = self.users.get(body["AccessToken"])
        if name is None:
            return JSONResponse({"Code": 10010205001, "Message": "invalid token", "Success": False}, 400)
        answer = JSONResponse(
            {"Code": 200, "Success": True, "Data": {"Username": name, "Email": f"{name}@x", "AccessToken": "git"}}
        )
        answer.set_cookie("m_session_id", f"session-of-{name}", domain=None)
        answer.set_cookie("csrf", f"{name}-csrf")
        return answer

    async def membership(self, request: Request) -> Response:
        """GET, with the token and the cookies of its login, and of no other."""
        name = request.path_params["user"]
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        assert self.users.get(token) == name, "somebody else's token"
        assert request.cookies == {"m_session_id": f"session-of-{name}", "csrf": f"{name}-csrf"}, request.cookies
        if request.path_params["organization"] != ORGANIZATION:
            return JSONResponse({"Code": 404, "Success": False}, 404)
        return JSONResponse({"Code": 200, "Success": True, "Data": {"IsMember": name in self.members}})

    async def login_otherwise(self, request: Request) -> Response:
        """Another contract, to be described by the settings."""
        name = self.users.get((await request.json())["AccessToken"])
        return JSONResponse({"Success": name is not None, "user": {"login": name}})

    async def members_otherwise(self, request: Request) -> Response:
        assert request.query_params["org"] == ORGANIZATION
        return JSONResponse({"Success": True, "items": [{"name": name} for name in sorted(self.members)]})

    async def elsewhere(self, _request: Request) -> Response:
        self.num_elsewhere += 1
        return JSONResponse({"Code": 200, "Success": True, "Data": {"Username": "mallory", "IsMember": True}})

    async def answer(self, call: str, request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        self.calls.append(request.url.path)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            await self.gate.wait()
            if self.trouble and self.troubled in (call, "both"):
                return await self._troubled()
            return await handle(request)
        finally:
            self.num_open -= 1

    async def _troubled(self) -> Response:
        if self.trouble == "hangs":
            await asyncio.sleep(30)
        success = {"Code": 200, "Success": True, "Data": {"Username": "mallory", "IsMember": True}}
        elsewhere = f"{self.url.replace('127.0.0.1', 'localhost')}/elsewhere"
        failure = {"Success": False, "Message": "not now"}
        answers: dict[str, Callable[[], Response]] = {
            "500": lambda: Response("Internal Server Error", 500),
            "503 with an envelope": lambda: JSONResponse({"Code": 503, **failure}, 503),
            "429": lambda: JSONResponse({"Code": 429, **failure}, 429),
            "code 500": lambda: JSONResponse({"Code": 500, **failure}),
            "slow drops": lambda: StreamingResponse(self._drops(success)),
            "not json": lambda: Response("{" * 100, media_type="application/json"),
            "html 403": lambda: Response("<html>blocked</html>", 403, media_type="text/html"),
            "json list": lambda: JSONResponse([success]),
            "no name": lambda: JSONResponse({"Code": 200, "Success": True, "Data": {}}),
            "redirect": lambda: RedirectResponse(elsewhere, 307),
            "huge": lambda: StreamingResponse(self._huge(success)),
            "compressed": lambda: Response(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}),
            "closes": lambda: StreamingResponse(self._short(), headers={"Content-Length": "1000"}),
        }
        return answers[self.trouble]()

    async def _drops(self, success: object) -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)
        yield json.dumps(success).encode()

    async def _huge(self, success: object) -> AsyncIterator[bytes]:
        block = b" " * 2**16
        for _ in range(HUGE_BYTES // len(block)):
            yield block
            self.bytes_sent += len(block)
        yield json.dumps(success).encode()

    async def _short(self) -> AsyncIterator[bytes]:
        yield b"{"


class _Server(uvicorn.Server):
    """Leaves the signals to pytest."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    """One that answers until the block ends."""
    modelscope = StandIn()

    async def login(request: Request) -> Response:
        return await modelscope.answer("login", request, modelscope.login)

    async def membership(request: Request) -> Response:
        return await modelscope.answer("membership", request, modelscope.membership)

    app = Starlette(
        routes=[
            Route("/api/v1/login", login, methods=["POST"]),
            Route("/api/v1/organizations/{organization}/members/{user}", membership),
            Route("/v2/token", modelscope.login_otherwise, methods=["POST"]),
            Route("/v2/members", modelscope.members_otherwise),
            Route("/elsewhere", modelscope.elsewhere, methods=["GET", "POST"]),
        ]
    )
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done(), "the stand-in did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    modelscope.url = f"http://127.0.0.1:{port}"
    try:
        yield modelscope
    finally:
        modelscope.gate.set()
        server.should_exit = True
        server.force_exit = True
        await task
