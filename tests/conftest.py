"""What tests of several packages share: one throw-away PostgreSQL for the whole run, and databases in it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator

import pytest

from treadle.store import Store
from treadle.testing.postgres import ThrowAwayPostgres, why_not

_TEMPLATE = "treadle_template"


@pytest.fixture(scope="session")
def postgres() -> Iterator[ThrowAwayPostgres]:
    """A cluster; skips the test where none can be started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with ThrowAwayPostgres() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _postgres_template(postgres: ThrowAwayPostgres) -> str:
    """A database with today's schema, to copy."""

    async def migrate(url: str) -> None:
        await (await Store.open(url)).close()

    asyncio.run(migrate(postgres.create(_TEMPLATE)))
    return _TEMPLATE


@pytest.fixture(scope="session")
def _database_names() -> Iterator[str]:
    return (f"test_{number}" for number in itertools.count())


@pytest.fixture
def new_postgres_url(
    postgres: ThrowAwayPostgres, _database_names: Iterator[str], request: pytest.FixtureRequest
) -> Iterator[Callable[..., str]]:
    """Makes databases of this test alone: empty, or (is_migrated) with today's schema."""
    made: list[str] = []

    def make(*, is_migrated: bool = True) -> str:
        template = request.getfixturevalue("_postgres_template") if is_migrated else "template1"
        made.append(next(_database_names))
        return postgres.create(made[-1], template=template)

    yield make
    for name in made:
        postgres.drop(name)


@pytest.fixture
def postgres_url(new_postgres_url: Callable[..., str]) -> str:
    """A database with today's schema, for this test alone."""
    return new_postgres_url()
