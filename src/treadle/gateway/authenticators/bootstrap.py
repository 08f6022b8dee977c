"""The first admin key, through a file: for servers that nobody has a terminal on.

    no file         a key is made and written there, readable by the server's user alone
    a file          the key in it is registered: a secrets manager put it there

Either only while no key was ever created. It refuses to log a key and to overwrite a file. Invariant: a key is in the
file before it is in the store, so that a crash in between is mended by the next start.
"""

from __future__ import annotations

import asyncio
import os
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
        await asyncio.to_thread(_write, path, key)
    record = await store.keys.add_first(USER, key_digest(key), author=AUTHOR)
    if record is None:
        # Another server of this database was faster.
        if is_new:
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
        text = path.read_text(encoding="ascii").strip()
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


def _write(path: Path, key: str) -> None:
    """Raises ConfigError when the file cannot be made, or came to be meanwhile."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{_SETTING}: {path} cannot be written: {error.strerror}") from None
