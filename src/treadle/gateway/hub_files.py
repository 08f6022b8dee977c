"""One small file of a hub repository, at one commit, when an operator asks for it.

The server goes nowhere but to the hosts that its configuration names: a redirect to any other is an error, and so is
plain HTTP, but for a hub on this machine. It sends no credentials and follows no environment. It refuses to know what
the file is for. Invariant: bytes and seconds of one fetch are bounded, whatever the hub sends.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from urllib.parse import quote, urlencode

import httpx

from treadle.config import LossSettings
from treadle.domain.limits import MAX_NAMED_LOSS_BYTES
from treadle.errors import HubUnavailable, InvalidRequest

FETCH_S = 30.0
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SOURCE = re.compile(rf"(ms|hf)://({_PART})/({_PART})/([A-Za-z0-9_][A-Za-z0-9._/-]{{0,255}})")
_REVISION = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository, at a commit."""

    hub: str
    owner: str
    repository: str
    path: str
    revision: str


def hub_file(source: str, revision: str | None) -> HubFile:
    """The file that a source names: ms://OWNER/REPOSITORY/FILE or hf://... Raises InvalidRequest."""
    found = _SOURCE.fullmatch(source)
    if found is None or any(part in ("", ".", "..") for part in found[4].split("/")):
        raise InvalidRequest(
            f"source {source[:120]!r} is not upload, ms://OWNER/REPOSITORY/FILE or hf://OWNER/REPOSITORY/FILE"
        )
    if revision is None or not _REVISION.fullmatch(revision):
        raise InvalidRequest("revision must be the hash of a commit, 40 or 64 lower-case hex digits: names can move")
    hub, owner, repository, path = found.groups()
    return HubFile(hub, owner, repository, path, revision)


async def fetch(file: HubFile, settings: LossSettings) -> bytes:
    """The file's bytes.

    Raises InvalidRequest for what asking again would not change: no such file, too large, sent elsewhere; and
    HubUnavailable for what it might.
    """
    url = _url_of(file, settings)
    hosts = frozenset((url.host, *settings.redirect_hosts))
    try:
        async with asyncio.timeout(FETCH_S), _client(settings) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                async with client.stream("GET", url) as response:
                    if response.status_code not in _REDIRECTS:
                        return await _content(response)
                    url = _next(url, response, hosts)
    except TimeoutError:
        raise HubUnavailable(f"{url.host} did not send the file within {FETCH_S:g} s") from None
    except httpx.HTTPError as error:
        raise HubUnavailable(f"{url.host} cannot be asked: {type(error).__name__}") from error
    raise InvalidRequest(f"{url.host} redirects over {_MAX_REDIRECTS} times")


def _client(settings: LossSettings) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        # Environment and .netrc have credentials that are nobody's business there.
        trust_env=False,
        follow_redirects=False,
        proxy=settings.hub_proxy,
        # Compressed content could be larger than it looks.
        headers={"Accept-Encoding": "identity", "User-Agent": "treadle"},
        timeout=FETCH_S,
    )


def _url_of(file: HubFile, settings: LossSettings) -> httpx.URL:
    repository, path = f"{file.owner}/{file.repository}", quote(file.path)
    if file.hub == "hf":
        return httpx.URL(f"{settings.huggingface_url}/{repository}/resolve/{file.revision}/{path}")
    query = urlencode({"Revision": file.revision, "FilePath": file.path})
    return httpx.URL(f"{settings.modelscope_url}/api/v1/models/{repository}/repo?{query}")


def _next(url: httpx.URL, response: httpx.Response, hosts: frozenset[str]) -> httpx.URL:
    """Where a redirect leads. Raises InvalidRequest when that is no place of ours."""
    target = url.join(response.headers.get("location", ""))
    is_same_server = (target.scheme, target.host, target.port) == (url.scheme, url.host, url.port)
    if is_same_server or (target.scheme == "https" and target.host in hosts):
        return target
    raise InvalidRequest(
        f"{url.host} redirects to {target.scheme}://{target.host[:100]}, where this server does not go; "
        f"it goes to {', '.join(sorted(hosts))}"
    )


async def _content(response: httpx.Response) -> bytes:
    status = response.status_code
    if status >= 500 or status == 429:
        raise HubUnavailable(f"{response.url.host} answers {status}; ask again later")
    if status != 200:
        raise InvalidRequest(f"{response.url.host} has no such file to give: it answers {status}")
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > MAX_NAMED_LOSS_BYTES:
            raise InvalidRequest(f"the file has over {MAX_NAMED_LOSS_BYTES} bytes, the most that is allowed")
    return bytes(content)
