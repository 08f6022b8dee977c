"""Files encrypted to age recipients, before anything of them is written.

It refuses to know what is in a file, and any other cipher. Invariant: with recipients, no file leaves here readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    return {f"{name}{SUFFIX}": age.encrypt(data, keys) for name, data in files.items()}


def check_recipients(recipients: Sequence[str]) -> None:
    """Raises as `encrypted` would."""
    if recipients:
        age = _age()
        for text in recipients:
            _recipient(age, text)


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
    try:
        return kind.from_str(text)
    except (age.RecipientError, ValueError) as error:
        raise InvalidRequest(
            f"age_encryption_recipients has {text[:80]!r}, which is neither an age1... nor an SSH public key"
        ) from error
