"""The first admin key, through a file: for servers that nobody has a terminal on.

    no file         a key is made and written there, readable by the server's user alone
    a file          the key in it is registered: a secrets manager put it there

Either only while no key was ever created. It refuses to log a key and to overwrite a file. Invariant: a key is in the
file, whole, before it is in the store, so that a crash in between is mended by the next start.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
from pathlib import Path

from treadle.domain.ids import TenantId
from treadle.domain.keys import KEY_PREFIX, key_digest, new_key
from treadle.errors import ConfigError
from treadle.store import Store
from treadle.store.audit import Author
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

USER = "admin"
AUTHOR = Author(TenantId("admin:local"), "auth.bootstrap_key_file")
# Behind the prefix. Ours have 43; a file with a word that somebody made up would be an open door.
_MIN_SECRET_CHARS = 32
_MAX_KEY_CHARS = 512
_SETTING = "auth.bootstrap_key_file"


async def register_first_key(store: Store, path: Path) -> None:
    """See the module. Called before the server listens. Raises ConfigError when the file is no use."""
    key = await asyncio.to_thread(_read, path)
    if await store.keys.any_ever():
        await _compare(store, path, key)
        return
    is_new = key is None
    if key is None:
        key = new_key()
        if not await asyncio.to_thread(_write, path, key):
            # Another server with this file was faster; what it wrote is whole.
            is_new, key = False, await asyncio.to_thread(_read, path)
    if key is None:
        raise ConfigError(f"{_SETTING}: {path} cannot be read: it leads nowhere, or went away")
    digest = key_digest(key)
    record = await store.keys.add_first(USER, digest, author=AUTHOR)
    if record is None:
        # Another server of this database was faster. With this very key, if it has the same file.
        if is_new and await store.keys.find(digest) is None:
            await asyncio.to_thread(path.unlink)
        log.info("first key made elsewhere", file=str(path))
        return
    log.info("first key", key_id=record.key_id, user=USER, file=str(path), source="made" if is_new else "file")


async def _compare(store: Store, path: Path, key: str | None) -> None:
    """Say when the file holds something else than a key of this server: it changes nothing any more."""
    if key is None:
        return
    record = await store.keys.find(key_digest(key))
    if record is None or record.revoked_at is not None:
        log.warning(
            "bootstrap key not used",
            file=str(path),
            reason="revoked" if record is not None else "unknown, and other keys exist: create keys with one of those",
        )


def _read(path: Path) -> str | None:
    """The key in the file; None when there is no file. Raises ConfigError, without a word of what is in it."""
    try:
        text = _content(path).decode("ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a line of ASCII"
        raise ConfigError(f"{_SETTING}: {path} cannot be read: {reason}") from None
    is_word = len(text) <= _MAX_KEY_CHARS and not any(letter.isspace() for letter in text)
    if not is_word or not text.startswith(KEY_PREFIX) or len(text) < len(KEY_PREFIX) + _MIN_SECRET_CHARS:
        raise ConfigError(
            f"{_SETTING}: {path} holds no key: one line with {KEY_PREFIX!r} and at least {_MIN_SECRET_CHARS} random "
            "letters is wanted; or remove the file, and the server makes one"
        )
    return text


def _content(path: Path) -> bytes:
    """What is in a file, as far as a key goes. Raises OSError, also for what is no file: a pipe would never end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read(2 * _MAX_KEY_CHARS)


def _write(path: Path, key: str) -> bool:
    """Whether the key is in the file now, which comes to be with all of it or not at all; False when there is one.

    Raises ConfigError when it cannot be made.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(key + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(part, path)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{_SETTING}: {path} cannot be written: {error.strerror}") from None
    return True
