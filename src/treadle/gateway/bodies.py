"""Reading a request's body without ever holding more of it, or of all of them together, than the limits.

It knows sizes, not meaning: bytes go on to wire, which decodes them. Invariants: the limit is enforced on the stream
itself, so a missing or lying Content-Length changes nothing; a large body is not read before there is room for it,
until then the client's bytes stay in the network; and a body that came slowly is nobody's whose access ended meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.types import Scope

from treadle.errors import BodyTooLarge, Overloaded

# JSON bodies other than samples (which carry prompts) are small; anything larger is a mistake or an attack.
MAX_JSON_BYTES = 2**20
# Bodies up to this size are read at once, full or not: they are bounded by the connections, and a client's heartbeat
# must not wait behind another's batches.
FREE_BODY_BYTES = 64 * 2**10
# How long a body waits for room. With the time to send it, well within the 60 s that the SDK gives a submission.
ROOM_WAIT_S = 20.0
# How long a large body may take to arrive once it has room: the SDK gives up on a submission after 60 s (120 in all).
READ_WAIT_S = 60.0
# Who the caller is was asked before its body was read; when that is longer ago, it is asked again.
FRESH_S = 0.5
# Where a request's Room is found.
ROOM: Final = "treadle.room"


class ByteBudget:
    """Bytes that may be held at the same time. Takers wait in line, one line per owner, owners taking turns.

    One that is larger than the whole budget is let in when nothing else is held.
    """

    def __init__(self, num_bytes: int) -> None:
        assert num_bytes > 0
        self._num_bytes = num_bytes
        self._held = 0
        self._lines: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    async def take(self, num_bytes: int, *, owner: str) -> None:
        """Hold `num_bytes` more, as soon as there is room for them. Raises Overloaded after ROOM_WAIT_S."""
        if not self._lines and self._fits(num_bytes):
            self._held += num_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append((num_bytes, turn))
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                await turn
        except TimeoutError:
            self._withdraw(turn, num_bytes)
            raise Overloaded(f"{self._held} bytes of requests are held, as many as this server takes") from None
        except asyncio.CancelledError:
            self._withdraw(turn, num_bytes)
            raise

    def give_back(self, num_bytes: int) -> None:
        """What was taken is free again."""
        self._held -= num_bytes
        assert self._held >= 0, "more was given back than was taken"
        self._admit()

    def _withdraw(self, turn: asyncio.Future[None], num_bytes: int) -> None:
        """The taker is gone, perhaps just after its turn came."""
        if turn.done() and not turn.cancelled():
            self.give_back(num_bytes)
        else:
            turn.cancel()
            self._admit()

    def _admit(self) -> None:
        """Let in those whose turn it is, as far as the room goes.

        Who does not fit holds up all others, so that a large body is not passed over by small ones for ever.
        """
        while self._lines:
            owner, line = next(iter(self._lines.items()))
            num_bytes, turn = line[0]
            if turn.done():
                line.popleft()
            elif self._fits(num_bytes):
                line.popleft()
                self._held += num_bytes
                turn.set_result(None)
                self._lines.move_to_end(owner)
            else:
                return
            if not line:
                del self._lines[owner]

    def _fits(self, num_bytes: int) -> bool:
        return self._held == 0 or self._held + num_bytes <= self._num_bytes


class BodyRoom:
    """The two budgets of one gateway: bodies as they are sent, and as they are decompressed.

    Two, because whoever holds of the first waits for the second, and never the other way round.
    """

    def __init__(self, num_bytes: int) -> None:
        self.sent = ByteBudget(num_bytes)
        self.plain = ByteBudget(num_bytes)


class Room:
    """What one request holds of its gateway's budgets; `give_back` is called when it is answered.

    owner: whose turn it is to wait, the caller's once that is known.
    """

    __slots__ = ("_all", "_ask_again", "_asked_at", "_plain", "_sent", "owner")

    def __init__(self, all_of_it: BodyRoom) -> None:
        self._all = all_of_it
        self._sent = 0
        self._plain = 0
        self.owner = ""
        self._ask_again: Callable[[], Awaitable[object]] | None = None
        self._asked_at = 0.0

    def caller_is(self, owner: str, ask_again: Callable[[], Awaitable[object]]) -> None:
        """The caller is known now. ask_again: raises when it is let in no more."""
        self.owner = owner
        self._ask_again = ask_again
        self._asked_at = asyncio.get_running_loop().time()

    async def check_caller(self) -> None:
        """Ask again, when the answer is old. Raises what `ask_again` does."""
        if self._ask_again is not None and asyncio.get_running_loop().time() - self._asked_at >= FRESH_S:
            await self._ask_again()

    async def for_sent(self, num_bytes: int) -> None:
        """Hold room for a body that is about to be read. Raises Overloaded."""
        await self._all.sent.take(num_bytes, owner=self.owner)
        self._sent += num_bytes

    async def for_plain(self, num_bytes: int) -> None:
        """Hold room for a body that is about to be decompressed. Raises Overloaded."""
        await self._all.plain.take(num_bytes, owner=self.owner)
        self._plain += num_bytes

    def give_back(self) -> None:
        """The bodies are no longer needed. Idempotent."""
        self._ask_again = None
        if self._sent:
            self._all.sent.give_back(self._sent)
            self._sent = 0
        if self._plain:
            self._all.plain.give_back(self._plain)
            self._plain = 0


def room_of(scope: Scope) -> Room:
    """The room of the request with this scope."""
    room = scope[ROOM]
    assert isinstance(room, Room)
    return room


async def read_body(request: Request, *, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as more than `limit_bytes` are announced or have arrived, and what
    the caller's authentication raises when its access ended while a slow body came."""
    body = await _read_with_room(request, limit_bytes)
    await room_of(request.scope).check_caller()
    return body


async def _read_with_room(request: Request, limit_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else limit_bytes
    if size > limit_bytes:
        raise _too_large(limit_bytes)
    if size <= FREE_BODY_BYTES:
        return await _read(request, limit_bytes)
    await room_of(request.scope).for_sent(size)
    try:
        # Whoever holds room must not keep it by sending slowly.
        async with asyncio.timeout(READ_WAIT_S):
            return await _read(request, limit_bytes)
    except TimeoutError:
        raise Overloaded(f"the body did not arrive within {READ_WAIT_S:.0f} s; send it again") from None


async def _read(request: Request, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        # The server in front ends a body at its announced length; one that says nothing has room for the limit.
        if num_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        if chunk:
            chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the request body is larger than {limit_bytes} bytes, this server's limit; send smaller chunks"
    )
