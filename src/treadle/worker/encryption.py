"""Files encrypted to age recipients, before anything of them is written.

It refuses to know what is in a file, and any other cipher. Invariant: with recipients, no file leaves here readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from treadle.errors import InvalidRequest, NotSupported

# Known to `age` programs and to the SDK's download.
SUFFIX = ".age"


def encrypted(files: Mapping[str, bytes], recipients: Sequence[str]) -> dict[str, bytes]:
    """Each file encrypted to all `recipients`, ".age" behind its name; without any, the files as they are.

    Raises InvalidRequest for a recipient that is none, NotSupported without the library.
    """
    if not recipients:
        return dict(files)
    age = _age()
    keys = [_recipient(age, text) for text in recipients]
    return {f"{name}{SUFFIX}": _encrypted(age, data, keys) for name, data in files.items()}


def check_recipients(recipients: Sequence[str]) -> None:
    """Raises as `encrypted` would."""
    if recipients:
        age = _age()
        _encrypted(age, b"", [_recipient(age, text) for text in recipients])


def _encrypted(age: Any, data: bytes, keys: Sequence[Any]) -> bytes:
    with _refusing("a recipient to whom nothing can be encrypted"):
        sealed: bytes = age.encrypt(data, keys)
    return sealed


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """The library's errors as the client's; among them panics of its Rust code, which are no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InvalidRequest(f"age_encryption_recipients has {what}") from None
        raise


def _age() -> Any:
    try:
        return import_module("pyrage")
    except ModuleNotFoundError as error:
        raise NotSupported(
            "age_encryption_recipients needs a library that this server lacks; its operator can add it with "
            "pip install 'treadle[age]'"
        ) from error


def _recipient(age: Any, text: str) -> Any:
    """An age1... or an SSH public key."""
    kind = age.x25519.Recipient if text.startswith("age1") else age.ssh.Recipient
    with _refusing(f"{text[:80]!r}, which is neither an age1... nor an SSH public key"):
        return kind.from_str(text)
