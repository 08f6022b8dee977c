"""How many workers operators want of a pool."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pool_settings", sa.Column("num_workers", sa.Integer()))
    op.add_column("pool_settings", sa.Column("num_samplers", sa.Integer()))
