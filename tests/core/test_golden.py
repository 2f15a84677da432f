"""Golden vectors taken from Megatron-core: block hashes, and a plan worked out by hand."""

import numpy as np

from scheduler_service.core.prefix_cache import hash_blocks
from scheduler_service.core.request import DEFAULT_SALT
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import EXPLICIT, SAMPLE
from tests.core.builders import capacity, request, schedule, settle


def test_block_hashes_are_megatron_cores() -> None:
    digests = hash_blocks(DEFAULT_SALT, np.arange(8, dtype=np.int32), block_size=4)
    ids = [int.from_bytes(digest[:8], "little") % (2**63 - 1) + 1 for digest in digests]
    assert ids == [4832768347186360981, 8533535913844734714]


def test_chaining_continues_a_prefix() -> None:
    tokens = np.arange(16, dtype=np.int32)
    whole = hash_blocks(DEFAULT_SALT, tokens, 4)
    assert whole == hash_blocks(DEFAULT_SALT, tokens[:8], 4) + hash_blocks(whole[1], tokens[8:], 4)
    assert whole != hash_blocks(b"\1" * 32, tokens, 4)


def test_worked_plan() -> None:
    """A decodes its 6th token, B its 9th (and needs a block), C prefills 6."""
    scheduler = Scheduler(capacity(block_size=4, num_blocks=9), run_ahead=1)
    scheduler.kv.pool._free = [8, 4, 6, 1, 3, 7, 0, 5, 2]  # handed out from the end
    scheduler.add_request(request(0, [10, 11, 12, 13, 14]))
    scheduler.add_request(request(1, [20, 21, 22, 23, 24, 25, 26, 27]))
    settle(scheduler, schedule(scheduler), [15, 28])
    scheduler.add_request(request(2, [30, 31, 32, 33, 34, 35]))
    scheduler._admissions.reserve = lambda num_leaving=0: 0  # type: ignore[method-assign]
    plan = schedule(scheduler)
    assert plan.num_tokens.tolist() == [1, 1, 6]
    assert plan.start_positions.tolist() == [5, 8, 0]
    assert plan.flags.tolist() == [SAMPLE, SAMPLE, SAMPLE | EXPLICIT]
    assert plan.slot_mapping.tolist() == [21, 12, 4, 5, 6, 7, 24, 25]
    assert plan.prefill_token_ids.tolist() == [30, 31, 32, 33, 34, 35]
    assert plan.extend_blocks.tolist() == [3]
    tables = [scheduler.rows.blocks(row).tolist() for row in plan.rows]
    assert tables == [[2, 5], [0, 7, 3], [1, 6]]
    settle(scheduler, plan, [16, 29, 36])
    following = schedule(scheduler)
    assert following.start_positions.tolist() == [6, 9, 6]
    assert following.num_tokens.tolist() == [1, 1, 1]
    assert following.extend_blocks.tolist() == []


def test_a_full_last_block_is_extended_before_the_next_decode() -> None:
    scheduler = Scheduler(capacity(block_size=4), run_ahead=1)
    scheduler.add_request(request(0, list(range(8))))
    settle(scheduler, schedule(scheduler), [9])
    assert len(schedule(scheduler).extend_blocks) == 1
