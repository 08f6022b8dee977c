"""Operators' rules about losses: one row per scope and loss, and the operations of traced losses that are switched off.

It refuses to know which losses and operations there are. Read they are as part of the picture (policies.py).
Invariant: every change is audited and bumps the picture's version in the transaction that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy as sa

from treadle.domain.policy import LossRule, Scope
from treadle.store import policies
from treadle.store.audit import Author, add_change
from treadle.store.engine import Database
from treadle.store.policies import LOSS_OPERATIONS
from treadle.store.tables import control, loss_rules
from treadle.store.writer import Writer

_PLACE = (loss_rules.c.scope == sa.bindparam("of_scope")) & (loss_rules.c.loss == sa.bindparam("of_loss"))
# Locked, so that what the audit log calls "before" is what was there.
_GET = sa.select(loss_rules.c.is_enabled, loss_rules.c.bounds).where(_PLACE).with_for_update()
_DELETE = loss_rules.delete().where(_PLACE)
_OPERATIONS = sa.select(control.c.value).where(control.c.name == LOSS_OPERATIONS).with_for_update()


class LossRules:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._writer = writer
        self._clock = clock
        insert = database.dialect.insert(loss_rules)
        self._set = insert.on_conflict_do_update(
            index_elements=[loss_rules.c.scope, loss_rules.c.loss],
            set_={name: insert.excluded[name] for name in ("is_enabled", "bounds", "updated_at")},
        )
        named = database.dialect.insert(control)
        self._set_operations = named.on_conflict_do_update(
            index_elements=[control.c.name],
            set_={name: named.excluded[name] for name in ("value", "updated_at")},
        )

    async def put(self, scope: Scope, loss: str, rule: LossRule, author: Author) -> None:
        """Have this rule for a loss in a scope, instead of any other. Idempotent."""

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            before = _shown(conn, scope, loss)
            bounds = {key: list(pair) for key, pair in rule.bounds.items()}
            conn.execute(
                self._set,
                {
                    "scope": str(scope),
                    "loss": loss,
                    "is_enabled": rule.is_enabled,
                    "bounds": bounds,
                    "updated_at": now,
                },
            )
            after = {"is_enabled": rule.is_enabled, "bounds": bounds}
            add_change(conn, author, "loss_rule.set", _subject(scope, loss), before=before, after=after, now=now)
            policies.changed(conn, now)

        await self._writer.run(write)

    async def remove(self, scope: Scope, loss: str, author: Author) -> bool:
        """Have no rule for a loss in a scope; whether there was one."""

        def write(conn: sa.Connection) -> bool:
            now = self._clock()
            before = _shown(conn, scope, loss)
            if before is None:
                return False
            conn.execute(_DELETE, _place(scope, loss))
            add_change(conn, author, "loss_rule.removed", _subject(scope, loss), before=before, after=None, now=now)
            policies.changed(conn, now)
            return True

        return await self._writer.run(write)

    async def disable_operations(self, names: Collection[str], author: Author) -> None:
        """Have exactly these operations switched off. Idempotent."""

        def write(conn: sa.Connection) -> None:
            now = self._clock()
            before = conn.execute(_OPERATIONS).scalar_one_or_none() or []
            after = sorted(set(names))
            conn.execute(
                self._set_operations, {"name": LOSS_OPERATIONS, "version": 1, "value": after, "updated_at": now}
            )
            add_change(conn, author, "loss_operations.set", "losses", before=before, after=after, now=now)
            policies.changed(conn, now)

        await self._writer.run(write)


def _shown(conn: sa.Connection, scope: Scope, loss: str) -> dict[str, Any] | None:
    row = conn.execute(_GET, _place(scope, loss)).one_or_none()
    return None if row is None else {"is_enabled": row.is_enabled, "bounds": row.bounds}


def _place(scope: Scope, loss: str) -> dict[str, str]:
    return {"of_scope": str(scope), "of_loss": loss}


def _subject(scope: Scope, loss: str) -> str:
    return f"loss:{loss} {scope}"
