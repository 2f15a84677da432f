"""Block tables against plain Python lists."""

import numpy as np
import pytest

from executor_service.block_tables import BlockTables
from tests.executor_process.scheduler_stub import table_hash

BLOCK_SIZE = 4
DUMMY = 50


def int32s(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture
def tables() -> BlockTables:
    return BlockTables(max_rows=5, max_blocks_per_row=8, num_blocks=DUMMY, block_size=BLOCK_SIZE)


def test_hash_of_an_empty_table_is_zero(tables: BlockTables) -> None:
    assert tables.hashes(int32s(0, 4)).tolist() == [0, 0]


def test_hash_is_the_recurrence() -> None:
    tables = BlockTables(max_rows=1, max_blocks_per_row=3, num_blocks=2**31 - 1, block_size=1)
    tables.append(int32s(0, 0), int32s(2**31 - 2, 7))
    assert tables.hashes(int32s(0)).tolist() == [((2**31 - 1) * 0x01000193 + 8) % 2**32]


def test_random_appends_equal_plain_lists(tables: BlockTables) -> None:
    rng = np.random.default_rng(0)
    every = np.arange(5, dtype=np.int32)
    expected: list[list[int]] = [[] for _ in range(5)]
    for _ in range(300):
        if rng.random() < 0.2:
            cleared = int(rng.integers(5))
            tables.clear(int32s(cleared))
            expected[cleared] = []
        rows = rng.integers(0, 5, rng.integers(0, rng.choice([6, 36]))).tolist()  # one by one, or all at once
        rows = [row for i, row in enumerate(rows) if len(expected[row]) + rows[: i + 1].count(row) <= 8]
        blocks = rng.integers(0, DUMMY, len(rows)).tolist()
        tables.append(int32s(*rows), int32s(*blocks))
        for row, block in zip(rows, blocks, strict=True):
            expected[row].append(block)
        assert tables.lengths(every).tolist() == [len(table) for table in expected]
        assert tables.hashes(every).tolist() == [table_hash(table) for table in expected]
        assert tables.gather(every, 8).tolist() == [table + [DUMMY] * (8 - len(table)) for table in expected]


def test_slots(tables: BlockTables) -> None:
    tables.append(int32s(1, 1, 3), int32s(7, 2, 9))
    slots = tables.slots(int32s(1, 1, 3), np.array([3, 4, 0]))
    assert slots.tolist() == [7 * 4 + 3, 2 * 4, 9 * 4]


@pytest.mark.parametrize("block", [-1, DUMMY])
def test_block_out_of_range(tables: BlockTables, block: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        tables.append(int32s(0), int32s(block))


def test_table_too_long(tables: BlockTables) -> None:
    with pytest.raises(ValueError, match="outgrow"):
        tables.append(np.zeros(9, np.int32), np.arange(9, dtype=np.int32))


def test_clear_all(tables: BlockTables) -> None:
    tables.append(int32s(0, 1), int32s(1, 2))
    tables.clear()
    assert tables.lengths(int32s(0, 1)).tolist() == [0, 0]
    assert tables.gather(int32s(0, 1), 1).tolist() == [[DUMMY], [DUMMY]]
