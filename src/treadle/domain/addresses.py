"""Addresses of clients: which of them count as one, and how proxies write them.

It refuses to know connections. Invariant: the same address is written the same way, however it came.
"""

from __future__ import annotations

import ipaddress


def parsed_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address, or None when it is none. An IPv4 address that is written as IPv6 is one of IPv4."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped
    return parsed


def network_of(address: str) -> str:
    """Whose doings are counted together: an IPv4 address, or a /64 network of IPv6, which is one customer's.

    A name that is no address stands for itself.
    """
    parsed = parsed_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address if parsed is None else str(parsed)


def forwarded_address(hop: str) -> str | None:
    """The address of one entry of X-Forwarded-For, which some proxies write with a port; None when it has none."""
    hop = hop.strip()
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    parsed = parsed_address(hop)
    return None if parsed is None else str(parsed)
