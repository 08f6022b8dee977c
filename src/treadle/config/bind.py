"""Whether an address may be listened on. Pure: the caller says whether a key exists."""

from __future__ import annotations

import ipaddress

from treadle.errors import ConfigError


def check_bind(host: str, *, any_key_exists: bool, mode: str) -> None:
    """Raises ConfigError when listening on `host` would let anybody in.

    mode is `auth.mode`. Loopback is always allowed; other addresses need `keys`, or `auto` with a key created.
    """
    if is_loopback(host) or mode == "keys" or (mode == "auto" and any_key_exists):
        return
    fix = "set auth.mode to 'auto' or 'keys'" if mode == "open" else "create a key first: treadle keys create USER"
    raise ConfigError(
        f"refusing to listen on {host}: it can be reached from other machines and every key would be accepted. "
        f"Either {fix}, or listen on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
