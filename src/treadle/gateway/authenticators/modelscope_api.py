"""The HTTP contract with ModelScope, all of it: whose token is this, and is that user a member of the organisation.

Two calls. URLs and the places in the answers are settings (`auth.modelscope.*`); these are their defaults:

    POST {endpoint}/api/v1/login  {"AccessToken": TOKEN}
        200 {"Code": 200, "Data": {"Username": "alice", ...}, ...}, and cookies of a session.
        It is the call that `HubApi.login` of the modelscope package makes. Another Code or "Success": false under 200,
        400 or 403, and any 401, mean that the token is worth nothing.
    GET {endpoint}/api/v1/organizations/{organization}/members/{user}  with the token and the cookies
        200 {"Code": 200, "Data": {"IsMember": true}}; false, or 404 with an envelope: not a member.
        This one is NOT verified: no published client makes such a call.

Everything else (a redirect, 5xx, 429, another Code that is an HTTP error of theirs, no JSON, an answer without what was
asked for, over MAX_ANSWER_BYTES or later than `timeout_s`) means that ModelScope cannot be asked now, and says nothing
about a token. It refuses to remember anything. Invariants: a token goes to the configured endpoint and nowhere else,
never into a URL, a log or an error; what one user's call brought never goes along with another's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote

import httpx
import orjson

from treadle.config import ModelScopeSettings

# A login's answer has some hundred bytes; a list of members may be long.
MAX_ANSWER_BYTES = 2**20
_ENVELOPE = frozenset({"Code", "Success"})
_OK = 200
_UNAUTHORIZED = 401
# What may be said about a token or a member in an envelope, and by a proxy or a firewall without one.
_REFUSALS = frozenset({400, 401, 403})
_NOT_FOUND = 404
_SERVER_TROUBLE = frozenset({408, 429, *range(500, 600)})
# What a name becomes part of: a tenant's id, and a URL.
_USER_NAME = re.compile(r"[^\s/:?#\\]{1,128}")
# What may stand in a Cookie header.
_COOKIE = re.compile(r"[!#-+\--:<-~]{1,4096}")


class ModelScopeUnavailable(Exception):
    """It cannot be asked now. The text is for the log: it has no token and nothing that was answered."""


@dataclass(frozen=True, slots=True)
class ModelScopeUser:
    """Whose token it is."""

    name: str
    is_member: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    # None: it is no JSON.
    document: Any
    cookies: Mapping[str, str]

    @property
    def is_envelope(self) -> bool:
        """Whether it is JSON that says of itself how the call went, as a proxy's error page does not."""
        return isinstance(self.document, dict) and not _ENVELOPE.isdisjoint(self.document)

    @property
    def code(self) -> object:
        """The envelope's own status; None when it has none."""
        code = self.document.get("Code") if self.is_envelope else None
        return int(code) if isinstance(code, str) and code.isdecimal() else code

    @property
    def is_success(self) -> bool:
        has_failed = self.is_envelope and self.document.get("Success") is False
        return self.is_envelope and self.status == _OK and self.code in (_OK, None) and not has_failed


class ModelScopeApi:
    """Asks. One per event loop; `close` when it is over."""

    def __init__(self, settings: ModelScopeSettings) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(
            timeout=settings.timeout_s,
            follow_redirects=False,
            # Cookies of one user's login must not go along with another's call.
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "treadle"},
            proxy=settings.proxy or None,
            # Neither proxies nor .netrc of whoever started the server.
            trust_env=False,
            limits=httpx.Limits(max_connections=settings.max_calls),
        )

    async def close(self) -> None:
        """Idempotent."""
        await self._client.aclose()

    async def user_of(self, token: str) -> ModelScopeUser | None:
        """Whose token it is; None when ModelScope refuses it. Raises ModelScopeUnavailable."""
        login = await self._call("login", "POST", self._settings.login_path, json={"AccessToken": token})
        if _is_refusal(login):
            return None
        name = self._value("login", login, self._settings.user_json_path)
        if not isinstance(name, str) or not _USER_NAME.fullmatch(name) or not name.strip("."):
            raise ModelScopeUnavailable("login: the user's name is none")
        return ModelScopeUser(name, await self._is_member(name, token, login.cookies))

    async def _is_member(self, user: str, token: str, cookies: Mapping[str, str]) -> bool:
        settings = self._settings
        path = settings.membership_path.format(
            organization=quote(settings.organization, safe=""), user=quote(user, safe="")
        )
        # The package sends the token as this cookie too, where a login set no other.
        session = {"m_session_id": token, **cookies}
        headers = {
            "Authorization": f"Bearer {token}",
            "Cookie": "; ".join(f"{name}={value}" for name, value in session.items()),
        }
        answer = await self._call("membership", "GET", path, headers=headers)
        if answer.status == _NOT_FOUND and answer.is_envelope:
            return False
        if not answer.is_success:
            raise ModelScopeUnavailable(f"membership: status {answer.status}, code {_shown(answer.code)}")
        found = self._values("membership", answer, settings.member_json_path)
        match settings.member_means:
            case "true":
                return any(value is True for value in found)
            case "user":
                return user in found
            case "organization":
                return settings.organization in found

    def _value(self, call: str, answer: _Answer, path: str) -> object:
        values = self._values(call, answer, path)
        return values[0] if len(values) == 1 else None

    def _values(self, call: str, answer: _Answer, path: str) -> list[object]:
        """What stands at a path. Raises ModelScopeUnavailable when the answer has no such place."""
        found = [answer.document]
        for key in path.split("."):
            found = [value for part in found for value in _step(call, part, key, path)]
        return found

    async def _call(self, call: str, method: str, path: str, **options: Any) -> _Answer:
        """The answer to one call, whatever its status. Raises ModelScopeUnavailable."""
        try:
            async with (
                asyncio.timeout(self._settings.timeout_s),
                self._client.stream(method, self._settings.endpoint + path, **options) as response,
            ):
                if response.is_redirect or response.status_code in _SERVER_TROUBLE:
                    raise ModelScopeUnavailable(f"{call}: status {response.status_code}")
                body = await _bounded(call, response)
                cookies = {name: value for name, value in response.cookies.items() if _COOKIE.fullmatch(name + value)}
                return _Answer(response.status_code, _json(body), cookies)
        except TimeoutError:
            raise ModelScopeUnavailable(f"{call}: no answer within {self._settings.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict) as error:
            # Its text may quote what was sent.
            raise ModelScopeUnavailable(f"{call}: {type(error).__name__}") from None


def _is_refusal(answer: _Answer) -> bool:
    """Whether an answer to a login is about the token. Raises ModelScopeUnavailable when it is neither yes nor no."""
    if answer.is_success:
        return False
    is_about_token = answer.is_envelope and answer.code not in _SERVER_TROUBLE and answer.status in (_OK, *_REFUSALS)
    if is_about_token or answer.status == _UNAUTHORIZED:
        return True
    raise ModelScopeUnavailable(f"login: status {answer.status}, code {_shown(answer.code)}")


def _step(call: str, part: object, key: str, path: str) -> list[object]:
    if key == "*" and isinstance(part, list):
        return part
    if isinstance(part, dict) and key in part:
        return [part[key]]
    raise ModelScopeUnavailable(f"{call}: the answer has no {path}")


async def _bounded(call: str, response: httpx.Response) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ModelScopeUnavailable(f"{call}: the answer is compressed, which it was asked not to be")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ModelScopeUnavailable(f"{call}: the answer is over {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _shown(code: object) -> str:
    """A code for the log: a number, or that it is none."""
    return str(code) if isinstance(code, int) else "none"
