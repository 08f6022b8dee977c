"""Whether an address may be listened on. Pure: the caller says whether a key exists."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from treadle.errors import ConfigError


def check_bind(host: str, *, any_key_exists: bool, methods: Collection[str]) -> None:
    """Raises ConfigError when listening on `host` would let anybody in.

    methods is `auth.methods`. Loopback is always allowed; other addresses need methods without `open`, or none named
    and a key created.
    """
    if is_loopback(host) or ("open" not in methods and (methods or any_key_exists)):
        return
    fix = "take 'open' out of auth.methods" if methods else "create a key first: treadle keys create USER"
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
