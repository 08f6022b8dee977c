"""The HTTP side of treadle: it authenticates, checks, inserts rows and hands out finished bytes.

A gateway knows the store, the blob store and the wire format. It refuses to know how anything is
computed: no torch, no SQL, no scheduler. Its invariant: an answered submission is a committed row.
"""

from treadle.gateway.app import create_app
from treadle.gateway.deps import GatewayDeps, GatewaySettings, PoolDirectory, PoolView, Readiness

__all__ = ["GatewayDeps", "GatewaySettings", "PoolDirectory", "PoolView", "Readiness", "create_app"]
