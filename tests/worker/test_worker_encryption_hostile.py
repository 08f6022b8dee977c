"""Recipients that are keys in form alone: refused as the client's error, whatever the library does with them."""

from __future__ import annotations

import base64
import struct

import pytest

from treadle.errors import InvalidRequest
from treadle.worker.encryption import check_recipients, encrypted

pytest.importorskip("pyrage")


def ssh(kind: bytes, *parts: bytes) -> str:
    raw = b"".join(struct.pack(">I", len(part)) + part for part in (kind, *parts))
    return f"{kind.decode()} {base64.b64encode(raw).decode()}"


HOSTILE = {
    # The library panics here (age 0.12.1), which is no Exception in Python.
    "RSA modulo nothing": ssh(b"ssh-rsa", b"\x00", b"\x00"),
    "RSA without numbers": ssh(b"ssh-rsa", b"", b""),
    "RSA without an exponent": ssh(b"ssh-rsa", b"", b"\x00" + b"\xff" * 256),
    "RSA modulo much": ssh(b"ssh-rsa", b"\x03", b"\x00" + b"\xff" * 2_900),
    "RSA modulo an even number": ssh(b"ssh-rsa", b"\x01\x00\x01", b"\x00" + b"\xfe" * 256),
    "cut off": "ssh-ed25519 AAAA",
    "no point": ssh(b"ssh-ed25519", b"\xff" * 31),
    "no text": "\ud800",
    "nothing": "",
}


@pytest.mark.parametrize("recipient", HOSTILE.values(), ids=HOSTILE.keys())
def test_keys_in_form_alone_are_refused(recipient: str) -> None:
    with pytest.raises(InvalidRequest, match="age_encryption_recipients"):
        check_recipients((recipient,))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32, b"\xed" + b"\xff" * 30 + b"\x7f"])
def test_what_is_accepted_can_be_encrypted_to(point: bytes) -> None:
    recipient = ssh(b"ssh-ed25519", point)
    try:
        check_recipients((recipient,))
    except InvalidRequest:
        return
    assert encrypted({"x": b"y"}, (recipient,))["x.age"] != b"y"
