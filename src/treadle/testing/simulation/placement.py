"""On which worker a tenant's runs live: the rule of the scheduler itself, with every tenant counting one. Pure."""

from __future__ import annotations

from treadle.scheduler.placement import least_loaded as choose_worker

__all__ = ["choose_worker"]
