"""HTTP to the operators' routes of a server, with an admin key.

It refuses to know what a route is about. Invariants: the key is sent to that server only, and is in no message; what
the server refuses is raised as our own error, with the server's words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from treadle.config import admin_key, admin_url, bypass_proxy_for
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.errors import (
    ConfigError,
    Forbidden,
    InvalidRequest,
    NotFound,
    ServerError,
    TreadleError,
    Unauthenticated,
)

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
PREFIX = "/admin/v1"
TIMEOUT_S = 60.0
# Of a server's words.
_MAX_SHOWN_CHARS = 2_000
_NO_KEY = "no admin key: set TREADLE_ADMIN_KEY, or give --key-file FILE (`treadle keys create NAME --admin` makes one)"


class AdminServer:
    """One server. `key_file`: a file with the key; None for the environment's."""

    def __init__(self, *, url: str | None, key_file: Path | None) -> None:
        self.url = (url or admin_url() or DEFAULT_URL).rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not the URL of a server, such as {DEFAULT_URL}")
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):
            bypass_proxy_for(parts.hostname)
        self._key = _key_of(key_file)

    def get(self, *path: str, **query: object) -> dict[str, Any]:
        """The JSON of a GET; parameters that are None are left out."""
        return self._json("GET", path, query=query)

    def send(self, method: str, *path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The JSON that answers another method."""
        return self._json(method, path, body=body)

    def pages(self, *path: str, rows: str, limit: int, place: str = "after", **query: object) -> dict[str, Any]:
        """The answer to a listing with up to `limit` of its `rows`, whatever pages that takes; `next` as it is then.

        place: the parameter that takes `next`.
        """
        answer = self.get(*path, limit=min(limit, MAX_PAGE_ROWS), **query)
        found = list(answer[rows])
        while answer.get("next") is not None and len(found) < limit:
            more = {**query, place: answer["next"]}
            answer = self.get(*path, limit=min(limit - len(found), MAX_PAGE_ROWS), **more)
            found += answer[rows]
        return {**answer, rows: found}

    def stream(self, *path: str, **query: object) -> Iterator[str]:
        """The text that answers a GET, in pieces."""
        import httpx

        url = self._url(path)
        try:
            with httpx.stream("GET", url, params=_given(query), headers=self._headers, timeout=TIMEOUT_S) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _error_of(answer)
                yield from answer.iter_text()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    @property
    def _headers(self) -> dict[str, str]:
        return {"X-API-Key": self._key}

    def _url(self, path: tuple[str, ...]) -> str:
        return "/".join([self.url + PREFIX, *(quote(part, safe=":") for part in path)])

    def _json(
        self,
        method: str,
        path: tuple[str, ...],
        *,
        query: Mapping[str, object] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        # Imported here, as everything that `--help` does not need.
        import httpx

        try:
            answer = httpx.request(
                method,
                self._url(path),
                params=_given(query or {}),
                json=body if method in ("POST", "PUT") else None,
                headers=self._headers,
                timeout=TIMEOUT_S,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if answer.status_code != 200:
            raise _error_of(answer)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url} does not answer like a treadle server; is --url right?")
        return found

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(f"cannot reach {self.url}: {error}; does the server run? (--url or TREADLE_URL says where)")


def _given(query: Mapping[str, object]) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in query.items()
        if value is not None
    }


def _key_of(key_file: Path | None) -> str:
    if key_file is None:
        key = admin_key() or ""
    else:
        try:
            key = key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key cannot be read from {key_file}: {type(error).__name__}") from None
    if not key:
        raise ConfigError(_NO_KEY if key_file is None else f"{key_file} holds no key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("the admin key has characters that no key has; is it the right file or variable?")
    return key


def _error_of(answer: httpx.Response) -> TreadleError:
    try:
        said = str(answer.json()["detail"])[:_MAX_SHOWN_CHARS]
    except (ValueError, KeyError, TypeError):
        said = f"the server answered {answer.status_code}"
    match answer.status_code:
        case 401:
            return Unauthenticated(f"the server does not accept this key ({said}); see TREADLE_ADMIN_KEY or --key-file")
        case 403:
            return Forbidden(f"this key may not do that: {said}")
        case 404:
            return NotFound(said)
        case status if status < 400:
            return ServerError(f"the server answered {status}, which is no answer of it; is --url right?")
        case status if status < 500:
            return InvalidRequest(said)
        case _:
            return ServerError(said)
