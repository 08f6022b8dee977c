"""Members of a ModelScope organisation, by their ModelScope access tokens.

What ModelScope said about a token is a verdict: kept in the store under the token's SHA-256, believed for minutes,
asked for again in the background while the token is in use, and for longer while ModelScope does not answer. It refuses
to know how ModelScope is asked (modelscope_api.py) and how often it may be (upstream_calls.py). Invariants: a token is
held only by the request that brought it; of several requests with one token, one asks; nobody is let in by a verdict
that is over.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote

from treadle.config import ModelScopeSettings
from treadle.domain.ids import TenantId
from treadle.domain.keys import key_digest
from treadle.errors import AuthUnavailable, Forbidden, TreadleError, Unauthenticated
from treadle.gateway.authenticators.modelscope_api import ModelScopeApi, ModelScopeUnavailable
from treadle.gateway.authenticators.principal import Principal
from treadle.gateway.authenticators.upstream_calls import AddressRates, CallSlots
from treadle.gateway.caches import ConfirmedRows, RecentRows
from treadle.gateway.deps import Clock
from treadle.store import Store
from treadle.store.policy_watch import PolicyWatch
from treadle.store.token_verdicts import TokenVerdict
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

METHOD = "modelscope"
# How long a verdict is believed without asking the store whether another gateway knows a newer one.
VERDICT_CACHE_S = 1.0
# All of them are confirmed in one read, which takes some 30 ms of CPU for so many.
MAX_CACHED_VERDICTS = 4_096
# A token in use is asked about again at this share of its verdict's life. Below half of it, which is when an SDK that
# holds a JWT sends its token again (tinker 0.38, _jwt_auth.py: 0.45 to 0.55 of the JWT's life).
_REFRESH_AT = 0.4
# Between two tries to refresh one verdict.
_RETRY_S = 10.0
# So long a refused token is refused without asking again.
REFUSED_S = 30.0
_MAX_REFUSED = 16_384
_UNKNOWN = "neither this server nor ModelScope knows this token: get one at ModelScope, or a key of this server"
_OVER = "this token is to be checked again"


class ModelScopeTokens:
    """See the module."""

    def __init__(self, *, store: Store, settings: ModelScopeSettings, clock: Clock, policies: PolicyWatch) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._policies = policies
        # A verdict about another organisation, or another ModelScope, is about something else.
        self._asked_about = f"{METHOD}:{settings.endpoint}:{settings.organization}"
        self._pattern = re.compile(settings.token_pattern)
        self._api = ModelScopeApi(settings)
        self._rates = AddressRates(per_minute=settings.unknown_tokens_per_minute, clock=clock)
        self._slots = CallSlots(settings.max_calls)
        self._known: ConfirmedRows[str, TokenVerdict] = ConfirmedRows(
            capacity=MAX_CACHED_VERDICTS, lifetime_s=VERDICT_CACHE_S, clock=clock, ended=self._ended_among
        )
        # By digest: the monotonic times at which ModelScope refused it, and at which a refresh was tried.
        self._refused: RecentRows[str, float] = RecentRows(_MAX_REFUSED)
        self._tried: RecentRows[str, float] = RecentRows(MAX_CACHED_VERDICTS)
        self._asking: dict[str, asyncio.Task[TokenVerdict]] = {}
        self._is_away = False

    async def close(self) -> None:
        """End what is being asked. Idempotent."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._api.close()

    def remembers(self, digest: str) -> bool:
        """Whether a verdict about this token is at hand, without asking anybody."""
        return self._known.holds(digest)

    async def principal(self, token: str, *, address: str) -> Principal:
        """Whose token this is; address: of the client.

        Raises Unauthenticated when it is nobody's, Forbidden when its user is no member, AuthUnavailable when
        ModelScope must be asked and cannot be.
        """
        if not self._pattern.fullmatch(token):
            raise Unauthenticated(_UNKNOWN)
        digest = key_digest(token)
        verdict = await self._known_verdict(digest)
        if verdict is None or verdict.good_until <= self._clock.now():
            verdict = await asyncio.shield(self._ask(token, digest, verdict, address))
        elif self._is_due(verdict):
            self._tried.put(digest, self._clock.monotonic())
            self._ask(token, digest, verdict, address)
        return self._judged(verdict)

    async def principal_of_digest(self, digest: str) -> Principal:
        """Whose token has this digest, as far as it was said. Raises Unauthenticated when the token must be shown
        again, and Forbidden."""
        verdict = await self._known_verdict(digest)
        if verdict is None or verdict.good_until <= self._clock.now():
            raise Unauthenticated(_OVER)
        return self._judged(verdict)

    def _judged(self, verdict: TokenVerdict) -> Principal:
        if not verdict.is_member:
            organization = self._settings.organization
            join_url = self._settings.join_url.format(organization=organization, user=quote(verdict.user, safe=""))
            raise Forbidden(
                f"ModelScope user {verdict.user} is not a member of the organization {organization}, whose members may "
                f"use this server; join it at {join_url} and try again in a minute"
            )
        return Principal(
            tenant_id=verdict.tenant_id,
            key_digest=verdict.digest,
            user=verdict.user,
            organization=self._settings.organization,
            method="modelscope",
        )

    def _is_due(self, verdict: TokenVerdict) -> bool:
        """Whether to ask again in the background."""
        if not verdict.is_member or verdict.digest in self._asking:
            return False
        if self._clock.now() < verdict.checked_at + _REFRESH_AT * self._settings.verdict_age_s:
            return False
        tried_at = self._tried.get(verdict.digest)
        return tried_at is None or self._clock.monotonic() - tried_at >= _RETRY_S

    def _ask(self, token: str, digest: str, old: TokenVerdict | None, address: str) -> asyncio.Task[TokenVerdict]:
        """The task that asks about this token: one for all who want to know. Raises as its result would."""
        task = self._asking.get(digest)
        if task is not None:
            return task
        refused_at = self._refused.get(digest)
        if refused_at is not None and self._clock.monotonic() - refused_at < REFUSED_S:
            raise Unauthenticated(_UNKNOWN)
        if old is None or not old.is_member:
            self._rates.take(address)
        task = asyncio.create_task(self._new_verdict(token, digest, old, address), name="modelscope-token")
        self._asking[digest] = task
        task.add_done_callback(lambda done: self._asked(digest, done))
        return task

    def _asked(self, digest: str, task: asyncio.Task[TokenVerdict]) -> None:
        del self._asking[digest]
        # A failure is told to those who wait for it; in the background there may be nobody.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TreadleError):
            log.error("token not checked", exc=error)

    async def _new_verdict(self, token: str, digest: str, old: TokenVerdict | None, address: str) -> TokenVerdict:
        is_known = old is not None and old.is_member
        try:
            async with self._slots.one(is_known=is_known, within_s=self._settings.timeout_s):
                user = await self._api.user_of(token)
        except ModelScopeUnavailable as error:
            self._went_away(str(error))
            return await self._old_verdict(old)
        self._is_back()
        if user is None:
            await self._refuse(digest, old)
            raise Unauthenticated(_UNKNOWN)
        self._rates.give_back(address)
        now, read_at = self._clock.now(), self._clock.monotonic()
        verdict = TokenVerdict(
            digest=digest,
            method=self._asked_about,
            tenant_id=TenantId(f"ms:{user.name}"),
            user=user.name,
            is_member=user.is_member,
            checked_at=now,
            good_until=now + self._age_of(is_member=user.is_member),
        )
        await self._keep(verdict)
        self._known.put(digest, verdict, read_at=read_at)
        return verdict

    async def _keep(self, verdict: TokenVerdict) -> None:
        has_changed = await self._store.token_verdicts.put(
            verdict,
            source=METHOD,
            organization=self._settings.organization,
            forget_before=verdict.checked_at - self._settings.stale_age_s - self._settings.verdict_age_s,
        )
        if has_changed:
            # What was decided about the organisation holds for the first request already.
            await self._policies.refresh()

    async def _refuse(self, digest: str, old: TokenVerdict | None) -> None:
        self._refused.put(digest, self._clock.monotonic())
        if old is not None:
            await self._store.token_verdicts.forget(digest, self._asked_about)
            self._known.forget(digest)

    async def _old_verdict(self, old: TokenVerdict | None) -> TokenVerdict:
        """The verdict there is, for as long as it may be believed. Raises AuthUnavailable without one."""
        now = self._clock.now()
        end = 0.0 if old is None else old.checked_at + max(self._settings.stale_age_s, self._age_of(is_member=True))
        if old is None or end <= now:
            raise AuthUnavailable(
                "ModelScope, which knows this token, does not answer now; this says nothing about the token: try again "
                "in a minute"
            )
        age = self._age_of(is_member=old.is_member)
        good_until = min(end, now + age)
        if good_until <= old.good_until or old.good_until - now > age / 2:
            return old
        read_at = self._clock.monotonic()
        extended = replace(old, good_until=good_until)
        await self._store.token_verdicts.extend(old.digest, old.method, good_until)
        self._known.put(old.digest, extended, read_at=read_at)
        return extended

    async def _known_verdict(self, digest: str) -> TokenVerdict | None:
        """The newest verdict there is, however old. Of one that is over, another gateway may know a newer one already:
        a JWT that it gave out for that must not be refused here."""
        verdict = await self._known.get(digest)
        if verdict is None or verdict.good_until <= self._clock.now():
            read_at = self._clock.monotonic()
            verdict = await self._store.token_verdicts.find(digest, self._asked_about)
            if verdict is not None:
                self._known.put(digest, verdict, read_at=read_at)
        return verdict

    async def _ended_among(self, digests: Sequence[str]) -> set[str]:
        """Those about which the store knows something else."""
        newest = await self._store.token_verdicts.among(digests, self._asked_about)
        return {digest for digest, verdict in self._known.believed() if newest.get(digest) != verdict}

    def _age_of(self, *, is_member: bool) -> float:
        return self._settings.verdict_age_s if is_member else self._settings.non_member_age_s

    def _went_away(self, reason: str) -> None:
        if not self._is_away:
            log.warning("modelscope does not answer", reason=reason)
        self._is_away = True

    def _is_back(self) -> None:
        if self._is_away:
            log.info("modelscope answers again")
        self._is_away = False
