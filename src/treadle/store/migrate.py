"""Schema versions: upgrade to the newest, and tell whether a database is there.

Migrations are packaged with the store and run on a connection that the caller opened, in its transaction, so that a
process that dies half-way leaves the old schema, and two that start together do the work once.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError

from treadle.errors import ConfigError
from treadle.store.dialect import Dialect

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(conn: sa.Connection, dialect: Dialect) -> None:
    """Bring the schema to the newest version. Raises ConfigError when a newer treadle wrote the database."""
    dialect.lock_migrations(conn)
    config = _config()
    config.attributes["connection"] = conn
    try:
        command.upgrade(config, "head")
    except (CommandError, ResolutionError) as error:
        raise ConfigError("the database was written by a newer treadle; upgrade treadle, or use other data") from error


def newest_version() -> str:
    """The version this treadle needs."""
    version = ScriptDirectory.from_config(_config()).get_current_head()
    assert version is not None
    return version


def version_of(conn: sa.Connection) -> str | None:
    """The version a database has; None when it is empty."""
    return MigrationContext.configure(conn).get_current_revision()


def _config() -> Config:
    config = Config()
    # A percent sign in the path would be taken for an interpolation.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
