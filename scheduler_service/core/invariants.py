"""Integrity of a Scheduler's bookkeeping, checked from scratch. For tests, the simulator, and idle moments."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from scheduler_service.core.cluster import Cluster
from scheduler_service.core.prefix_cache import hash_blocks
from scheduler_service.core.request import Request, RequestStatus
from scheduler_service.core.row_table import NO_ADMISSION, extend_table_hash
from scheduler_service.core.scheduler import Scheduler


class IntegrityError(AssertionError):
    """The bookkeeping contradicts itself; says where."""


def check_integrity(scheduler: Scheduler) -> None:
    """Recompute what must hold between any two calls.

    Raises:
        IntegrityError: naming the first contradiction found.
    """
    _check_blocks(scheduler)
    _check_cache(scheduler)
    _check_rows(scheduler)
    _check_turns(scheduler)
    _check_backlog(scheduler)
    _check_ledger(scheduler)
    _check_isolation(scheduler)


def check_cluster(cluster: Cluster) -> None:
    """``check_integrity`` of every executor's scheduler, that every live request is in exactly one place, and that who
    is on the way to another executor waits.

    Raises:
        IntegrityError: naming the first contradiction found.
    """
    places: Counter[int] = Counter(request.handle for request in cluster.queued_requests())
    for scheduler in cluster.executors.values():
        check_integrity(scheduler)
        places.update(_residents(scheduler))
    _require(places == Counter(cluster.handles()), "a live request is nowhere, or in two places")
    for request in cluster.moving():
        _require(request is not None and request.row < 0 and not request.is_held, "who is to move does not")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)


def _running_rows(scheduler: Scheduler) -> list[int]:
    return [row for row, request in enumerate(scheduler.rows.requests) if request is not None]


def _check_blocks(scheduler: Scheduler) -> None:
    pool = scheduler.kv.pool
    owners: Counter[int] = Counter()
    written: set[int] = set()
    for row in _running_rows(scheduler):
        table = scheduler.rows.blocks(row).tolist()
        _require(len(set(table)) == len(table), f"row {row} holds a block twice")
        owners.update(table)
        num_filled = int(scheduler.rows.num_dispatched[row]) // scheduler.capacity.block_size
        written.update(table[num_filled:])
    free, evictable = pool.free_blocks(), pool.evictable_blocks()
    _require(len(set(free)) == len(free), "a block is free twice")
    _require(not set(free) & set(evictable), "a block is free and cached")
    _require(all(owners[b] == 1 for b in written), "a shared block can be written")
    for block in range(pool.num_blocks):
        references = int(pool.ref_count[block])
        _require(references == owners[block], f"block {block}: {references} references, {owners[block]} owners")
    idle = set(free) | set(evictable)
    _require(idle == {b for b in range(pool.num_blocks) if owners[b] == 0}, "unowned blocks are not free xor cached")
    _require(all(pool.is_cached[b] for b in evictable), "an evictable block is not cached")
    _require(not any(pool.is_cached[b] for b in free), "a free block is cached")


def _check_cache(scheduler: Scheduler) -> None:
    kv = scheduler.kv
    mapped = dict(kv.cache.items())
    _require(len(set(mapped.values())) == len(mapped), "a block is published twice")
    cached = {b for b in range(kv.pool.num_blocks) if kv.pool.is_cached[b]}
    _require(set(mapped.values()) == cached, "published and cached blocks differ")
    position = {block: i for i, block in enumerate(kv.pool.evictable_blocks())}
    for row in _running_rows(scheduler):
        request, table = scheduler.rows.request(row), scheduler.rows.blocks(row).tolist()
        published = max(int(scheduler.rows.num_published[row]), 0)
        _require(published * scheduler.capacity.block_size <= scheduler.rows.num_dispatched[row], "published too much")
        for index in range(published):
            digest = request.block_hashes[index]
            _require(mapped.get(digest) == table[index], f"row {row}: block {index} is not published as its own")
        _check_digests(request, scheduler.rows.token_log[row, : scheduler.rows.num_tokens[row]])
    for request in scheduler.backlog.requests():
        _check_digests(request, request.token_ids)
        chain = [mapped[d] for d in request.block_hashes if d in mapped]
        ranks = [position[b] for b in chain if b in position]
        _require(ranks == sorted(ranks, reverse=True), "a cached parent would be evicted before its child")


def _check_digests(request: Request, token_ids: NDArray[np.int32]) -> None:
    """What is remembered of a request's blocks is what its log says, whatever was in flight in between."""
    digests = hash_blocks(request.salt, token_ids, request.hash_block_size) if request.hash_block_size else []
    _require(request.block_hashes == digests[: len(request.block_hashes)], f"{request.handle}: digests of another log")


def _check_rows(scheduler: Scheduler) -> None:
    rows, block_size = scheduler.rows, scheduler.capacity.block_size
    running = _running_rows(scheduler)
    _require(sorted(running + rows.free_rows()) == list(range(rows.max_rows)), "rows are not free xor taken")
    for row in range(rows.max_rows):
        _require((rows.admission[row] != NO_ADMISSION) == (row in set(running)), f"row {row}: admission is stale")
    for row in running:
        request = rows.request(row)
        known, dispatched, settled = rows.num_tokens[row], rows.num_dispatched[row], rows.num_settled[row]
        _require(request.row == row and request.status is RequestStatus.RUNNING, f"row {row}: request disagrees")
        _require(settled <= dispatched < rows.max_tokens[row], f"row {row}: cursors {settled} {dispatched}")
        _require(known <= rows.max_tokens[row], f"row {row}: log too long")
        _require(rows.num_explicit[row] <= known, f"row {row}: lost known tokens")
        _require(dispatched <= rows.num_blocks[row] * block_size, f"row {row}: KV beyond its table")
        digest = extend_table_hash(0, rows.blocks(row))
        _require(int(rows.table_hash[row]) == digest, f"row {row}: table hash is stale")


def _check_turns(scheduler: Scheduler) -> None:
    """Every row is where its next step is planned from, or held, or has all its steps in flight."""
    running, rows = scheduler.running, scheduler.rows
    decoding, prefilling = running.decoding.tolist(), list(running.prefilling)
    turns = Counter([*decoding, *prefilling, *running.held])
    _require(not turns or max(turns.values()) == 1, "a row is planned from two places")
    for row in _running_rows(scheduler):
        dispatched, is_held = rows.num_dispatched[row], rows.request(row).is_held
        _require(is_held == (row in running.held), f"row {row}: held or not")
        _require((row in prefilling) == (not is_held and dispatched < rows.num_explicit[row]), f"row {row}: prefill")
        is_due = rows.num_explicit[row] <= dispatched < rows.max_tokens[row] - 1
        _require((row in decoding) == (not is_held and is_due), f"row {row}: decode")
        _require(rows.priority[row] == rows.request(row).priority, f"row {row}: priority")
    _require(set(turns) <= set(_running_rows(scheduler)), "a free row is planned")
    wanting = [r for r in _running_rows(scheduler) if rows.wants_logprobs[r]]
    _require(rows.num_logprob_rows == len(wanting), "rows that want log probabilities miscounted")


def _residents(scheduler: Scheduler) -> list[int]:
    """Handles of the requests on an executor."""
    running = [scheduler.rows.request(row).handle for row in _running_rows(scheduler)]
    return running + [request.handle for request in scheduler.backlog.requests()]


def _check_backlog(scheduler: Scheduler) -> None:
    backlog, running = scheduler.backlog, scheduler.running
    _require(all(one.is_quarantined for one in backlog.suspects.requests()), "somebody else is among the suspects")
    _require(not any(one.is_quarantined for one in backlog.waiting.requests()), "a suspect waits among the others")
    _require(all(one.row < 0 for one in backlog.requests()), "a waiting request has a row")
    _require(len(set(_residents(scheduler))) == len(_residents(scheduler)), "a request is in two places")
    waiting = {one.handle for one in backlog.requests()}
    for admission, request in running.departed.items():
        _require(request.handle in waiting, f"{request.handle} has departed but does not wait")
        in_flight = any((step.admissions == admission).any() for step in scheduler.ledger.steps())
        _require(in_flight or request.last_step <= scheduler.ledger.settled_step, "departed without a trace")


def _check_isolation(scheduler: Scheduler) -> None:
    """A quarantined request never runs with others."""
    in_flight = scheduler.requests_in_flight()
    suspects: list[Request] = [request for request in in_flight if request.is_quarantined]
    _require(not suspects or len(in_flight) == 1, "a suspect runs with others")


def _check_ledger(scheduler: Scheduler) -> None:
    ledger, rows = scheduler.ledger, scheduler.rows
    steps = ledger.steps()
    expected = list(range(ledger.settled_step + 1, ledger.next_step_id))
    _require([s.step_id for s in steps] == expected, "steps in flight are not consecutive")
    _require(ledger.num_tokens == sum(s.num_tokens for s in steps), "tokens in flight miscounted")
    last_end: dict[int, int] = {}
    for step in steps:
        for row, admission, end in zip(
            step.rows.tolist(), step.admissions.tolist(), step.end_positions.tolist(), strict=True
        ):
            if rows.admission[row] == admission:
                _require(end > last_end.get(row, int(rows.num_settled[row])), f"row {row}: steps out of order")
                last_end[row] = end
    for row in _running_rows(scheduler):
        in_flight_end = last_end.get(row, int(rows.num_settled[row]))
        _require(in_flight_end == rows.num_dispatched[row], f"row {row}: ledger ends at {in_flight_end}")
