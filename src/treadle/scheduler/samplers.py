"""The samplers of one pool: which are up, what each has, and which one a sample goes to.

Samples of a tenant go to the worker where its runs live, whose caches know its weights, as long as that one is not much
fuller than another. Where workers only sample, samples go to those, by the sampling session, so that weights and
prefixes of one session stay together. It refuses to know rows and payloads.
Invariant: a sample is with one sampler at a time, and what comes back from any other is not its outcome.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.domain.ids import RequestId, TenantId
from treadle.domain.records import RequestRecord
from treadle.domain.roles import Role
from treadle.executor.base import SamplingExecutor
from treadle.scheduler.quarantine import Quarantine

# Samples one worker holds at a time; the rest wait as rows, where fairness over tenants and a restart find them.
MAX_HANDED_OVER = 256
# Of these, one tenant's at most: a newcomer's sample finds room however many another one has queued.
MAX_HANDED_OVER_PER_TENANT = 192
# A sampler is much fuller than another beyond twice its samples and this many.
SPILL_BEYOND = 16


@dataclass(slots=True, eq=False)
class Sampler:
    """One worker as a sampler. role: what it is for. is_leaving: it gets nothing more. running: whose each is."""

    slot: str
    index: int
    role: Role
    executor: SamplingExecutor
    quarantine: Quarantine
    is_leaving: bool = False
    running: dict[RequestId, TenantId] = field(default_factory=dict)

    @property
    def room(self) -> int:
        return MAX_HANDED_OVER - len(self.running)


class Samplers:
    """See the module. home: the number of the worker where a tenant's runs live, if any."""

    def __init__(self, home: Callable[[TenantId], int | None]) -> None:
        self._home = home
        self._up: dict[str, Sampler] = {}
        self._place: dict[RequestId, Sampler] = {}
        # Samples that only a built-in sampler can do.
        self._for_builtin: set[RequestId] = set()

    def attach(self, sampler: Sampler) -> None:
        """It is up and has nothing."""
        assert sampler.slot not in self._up, f"{sampler.slot} is attached twice"
        self._up[sampler.slot] = sampler

    def detach(self, sampler: Sampler) -> None:
        """It is gone: its samples are with nobody. Idempotent."""
        if self._up.get(sampler.slot) is sampler:
            del self._up[sampler.slot]
        for request_id in list(sampler.running):
            self.take_back(request_id)

    def all(self) -> list[Sampler]:
        """Those that are up."""
        return list(self._up.values())

    def sampler_of(self, request_id: RequestId) -> Sampler | None:
        """Who has it."""
        return self._place.get(request_id)

    def begin(self, sampler: Sampler, request_id: RequestId, tenant_id: TenantId) -> None:
        """It is with this one from now on."""
        assert request_id not in self._place, f"{request_id} is with another sampler"
        self._place[request_id] = sampler
        sampler.running[request_id] = tenant_id

    def take_back(self, request_id: RequestId) -> Sampler | None:
        """It is with nobody any more; who had it."""
        sampler = self._place.pop(request_id, None)
        if sampler is not None:
            del sampler.running[request_id]
        return sampler

    def ended(self, request_id: RequestId) -> None:
        """It is final."""
        self.take_back(request_id)
        self._for_builtin.discard(request_id)

    def give_to_builtin(self, request_id: RequestId) -> None:
        """Its sampler cannot do it."""
        self.take_back(request_id)
        self._for_builtin.add(request_id)

    @property
    def running(self) -> Mapping[RequestId, TenantId]:
        """All samples that are with somebody."""
        return {id_: sampler.running[id_] for id_, sampler in self._place.items()}

    @property
    def room(self) -> int:
        """How many more samples there is room for."""
        return sum(max(0, sampler.room) for sampler in self._up.values() if not sampler.is_leaving)

    def assign(self, rows: Iterable[RequestRecord]) -> dict[str, list[RequestRecord]]:
        """Where each of these rows that is with nobody should go now, in their order; those for which there is no
        room are left out."""
        load = {slot: len(sampler.running) for slot, sampler in self._up.items()}
        shares = {slot: Counter(sampler.running.values()) for slot, sampler in self._up.items()}
        assigned: dict[str, list[RequestRecord]] = {slot: [] for slot in self._up}
        for row in rows:
            if row.request_id in self._place:
                continue
            usable = [
                sampler
                for sampler in self._candidates(row.request_id)
                if load[sampler.slot] < MAX_HANDED_OVER
                and shares[sampler.slot][row.tenant_id] < MAX_HANDED_OVER_PER_TENANT
            ]
            if not usable:
                continue
            slot = self._choose(row, usable, load).slot
            load[slot] += 1
            shares[slot][row.tenant_id] += 1
            assigned[slot].append(row)
        return assigned

    def _candidates(self, request_id: RequestId) -> Sequence[Sampler]:
        up = [sampler for sampler in self._up.values() if not sampler.is_leaving]
        holder = up[0].quarantine.holder(request_id) if up else None
        if request_id in self._for_builtin:
            builtin = [sampler for sampler in up if sampler.role is not Role.SAMPLING]
            # Whatever it was suspected of elsewhere, only these can do it.
            return [sampler for sampler in builtin if sampler.quarantine is holder] or builtin
        if holder is not None:
            return [sampler for sampler in up if sampler.quarantine is holder]
        wanted = [sampler for sampler in up if sampler.role is not Role.TRAINING]
        # While suspects are being found out somewhere, nobody else gets in there.
        open_ones = [sampler for sampler in wanted if not sampler.quarantine.is_thinning]
        return open_ones or wanted

    def _choose(self, row: RequestRecord, usable: Collection[Sampler], load: Mapping[str, int]) -> Sampler:
        emptiest = min(usable, key=lambda sampler: (load[sampler.slot], sampler.index))
        home = self._home(row.tenant_id)
        own = next((one for one in usable if one.role is not Role.SAMPLING and one.index == home), None)
        if own is None:
            key = row.sampling_session_id or row.tenant_id
            own = max(usable, key=lambda sampler: _affinity(key, sampler.slot))
        return emptiest if load[own.slot] > 2 * load[emptiest.slot] + SPILL_BEYOND else own


def _affinity(key: str, slot: str) -> bytes:
    """The highest one wins: when a sampler comes or goes, only its own part of the keys moves."""
    return hashlib.blake2b(f"{key}\n{slot}".encode(), digest_size=8).digest()
