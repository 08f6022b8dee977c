"""Checks by the method or command that they are of, and the two ways of calling a method.

A check returns what it read back, in words; it fails by raising. A refusal is a result too, with its reason.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from conform.surface import ASYNC
from conform.world import World

TIMEOUT_S = 90.0

Call = Callable[..., Any]
MethodCheck = Callable[[World, Call], str]
CommandCheck = Callable[[World], str]


@dataclass(frozen=True)
class Refused:
    """Why a method cannot work against this server, for its users."""

    reason: str


_METHODS: dict[str, MethodCheck | Refused] = {}
_COMMANDS: dict[str, CommandCheck] = {}


def method(*names: str) -> Callable[[MethodCheck], MethodCheck]:
    """Register a check of these methods ("Client.name") and of their `_async` forms."""

    def register(check: MethodCheck) -> MethodCheck:
        for name in names:
            assert name not in _METHODS, name
            _METHODS[name] = check
        return check

    return register


def refused(name: str, reason: str) -> None:
    """A method that cannot work, and why."""
    _METHODS[name] = Refused(reason)


def command(name: str) -> Callable[[CommandCheck], CommandCheck]:
    """Register a check of a command ("tinker group name")."""

    def register(check: CommandCheck) -> CommandCheck:
        _COMMANDS[name] = check
        return check

    return register


def check_of(name: str) -> Callable[[World], str] | Refused | None:
    """The check of a method or command, ready to run; None for one that nobody wrote a check for."""
    if name in _COMMANDS:
        return _COMMANDS[name]
    check = _METHODS.get(name) or _METHODS.get(name.removesuffix(ASYNC))
    if check is None or isinstance(check, Refused):
        return check
    found = check
    call = _call_async if name.endswith(ASYNC) else _call
    return lambda world: found(world, call)


def unknown_names(known: Sequence[str]) -> list[str]:
    """Checks of what the SDK no longer has."""
    return sorted({*_METHODS, *_COMMANDS} - set(known))


def _call(owner: Any, name: str, *args: Any, **options: Any) -> Any:
    """The plain form of a method, and the end of its future."""
    result = getattr(owner, name)(*args, **options)
    return result.result(timeout=TIMEOUT_S) if hasattr(result, "result") else result


def _call_async(owner: Any, name: str, *args: Any, **options: Any) -> Any:
    """The `_async` form, awaited; where that gives another future, its end."""

    async def run() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            result = getattr(owner, name + ASYNC)(*args, **options)
            while inspect.isawaitable(result):
                result = await result
            return result

    return asyncio.run(run())
