"""The start of every line: the same rows whichever way they are read, and nobody left out."""

from __future__ import annotations

import random

import pytest
import sqlalchemy as sa
from store_builders import POOL, creation, done, lead, op, with_run

from treadle.domain.records import FinishedCycle, ModelAdvance
from treadle.store import Store
from treadle.store.tables import requests

LINES = [f"s1:train:{n}" for n in range(9)]


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which a handful of lines counts as a crowd."""
    for name, value in (("FEW_ROWS", 4), ("MANY_ROWS", 8), ("MAX_LINES", 4), ("MAX_HOLES_PER_READ", 2)):
        monkeypatch.setattr(f"treadle.store.heads.{name}", value)


async def fill(store: Store, seq_ids: dict[str, list[int]]) -> None:
    """Runs, created and behind their creation, with these ops in line."""
    await with_run(store, *seq_ids)
    created = [done(creation(model_id)) for model_id in seq_ids]
    advances = tuple(ModelAdvance(request.model_id, 1) for request in map(creation, seq_ids) if request.model_id)
    await store.cycles.finish(await lead(store), FinishedCycle(finished=tuple(created), advances=advances))
    for model_id, numbers in seq_ids.items():
        for seq_id in numbers:
            await store.requests.enqueue(op(seq_id, model_id=model_id))


async def read(store: Store, per_model: int = 64) -> dict[str, list[int]]:
    heads = await store.requests.heads(POOL, per_model)
    read = {str(line[0].model_id): [row.seq_id for row in line] for line in heads}
    assert len(read) == len(heads), "a line comes once"
    return read


async def test_few_lines_are_read_to_their_full_depth(store: Store) -> None:
    lines = {LINES[0]: list(range(1, 8)), LINES[1]: [1]}
    await fill(store, lines)
    assert await read(store) == lines
    assert await read(store, per_model=3) == {LINES[0]: [1, 2, 3], LINES[1]: [1]}


@pytest.mark.usefixtures("crowded")
async def test_of_many_lines_the_start_of_each_is_read(store: Store) -> None:
    await fill(store, {model_id: [1, 2, 3, 4] for model_id in LINES[:4]})
    assert await read(store) == {model_id: [1, 2] for model_id in LINES[:4]}
    assert await read(store, per_model=1) == {model_id: [1] for model_id in LINES[:4]}


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("with_hole", [[2, 3, 4, 5, 6], [1, 3, 4, 5, 6]])
async def test_a_line_with_a_hole_is_read_on(store: Store, with_hole: list[int]) -> None:
    """What ends the wait for the missing one may come late in the line."""
    lines = {model_id: [1, 2, 3, 4, 5] for model_id in LINES[:4]} | {LINES[2]: with_hole}
    await fill(store, lines)
    found = await read(store)
    assert found[LINES[2]] == with_hole
    assert found[LINES[1]] == [1, 2]
    assert (await read(store, per_model=4))[LINES[2]] == with_hole[:4]


@pytest.mark.usefixtures("crowded")
async def test_with_too_many_lines_everyone_is_read_in_turn(store: Store) -> None:
    await fill(store, {model_id: [1, 2, 3] for model_id in LINES})
    readings = [await read(store) for _ in range(9)]
    assert all(len(lines) == 4 for lines in readings)
    counts = [sum(model_id in lines for lines in readings) for model_id in LINES]
    assert counts == [4] * 9


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("seed", range(3))
async def test_what_is_remembered_is_what_is_there(store: Store, seed: int) -> None:
    """Rows come and go between readings; each reading is compared with the table."""
    rng = random.Random(seed)
    await fill(store, {model_id: [1, 2, 3] for model_id in LINES[:6]})
    lease, newest = await lead(store), dict.fromkeys(LINES[:6], 3)
    for _ in range(12):
        model_id = rng.choice(LINES[:6])
        table = await in_line(store)
        if rng.random() < 0.5 and table.get(model_id):
            first = op(table[model_id][0], model_id=model_id)
            assert first.model_id is not None
            advance = ModelAdvance(first.model_id, first.seq_id + 1)
            await store.cycles.finish(lease, FinishedCycle(finished=(done(first),), advances=(advance,)))
        else:
            newest[model_id] += 1
            await store.requests.enqueue(op(newest[model_id], model_id=model_id))
        table, found = await in_line(store), await read(store)
        assert len(found) >= min(4, len(table))
        for id_, numbers in found.items():
            assert numbers == table[id_][: len(numbers)]
            assert len(numbers) >= min(2, len(table[id_]))


async def in_line(store: Store) -> dict[str, list[int]]:
    """Every line, as the table has it."""
    columns = requests.c.model_id, requests.c.seq_id
    query = sa.select(*columns).where(requests.c.in_line.is_(sa.true())).order_by(*columns)
    lines: dict[str, list[int]] = {}
    for model_id, seq_id in await store._database.read(lambda conn: conn.execute(query).all()):
        lines.setdefault(model_id, []).append(seq_id)
    return lines
