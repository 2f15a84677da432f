"""Which running requests a busy executor hands over to an idler one: when that pays, and to whom they are no burden.

A handover is what a drain does: the row is released in the next plan, the log stays, and once nothing of the request is
in flight it is admitted elsewhere, where its tokens are computed anew. Nobody goes to and fro: those who move have been
where they are for a while, and moving leaves the executor that they come from no idler than the one that they go to.
"""

from collections.abc import Iterable

import numpy as np

from scheduler_service.core.inflight import MAX_RUN_AHEAD
from scheduler_service.core.request import Request
from scheduler_service.core.scheduler import Scheduler

# Tokens that a request must have got where it is before it moves, and that it must still be allowed afterwards. More
# than an executor can have in flight: nobody moves who is under suspicion of having killed the last one.
STAY_TOKENS = 2 * MAX_RUN_AHEAD
# In which an executor looks once whether it should hand something over.
_STEPS_PER_LOOK = 8
# Handed over together, at most. Fewer than _LEAST_SURPLUS too many are not worth it: a row or two cost a step nothing.
_MOST_MOVES = 4
_LEAST_SURPLUS = 2
# A difference of this share of the busier executor's rows is none.
_TOLERANCE = 0.25
# Known tokens are computed in chunks: so many of them take less time than one decode step.
_KNOWN_TOKENS_PER_STEP = 8
_MAX_CANDIDATES = 64


def looks_now(source: Scheduler) -> bool:
    """Whether it is time for an executor to look for a target."""
    return source.ledger.num_dispatched_steps % _STEPS_PER_LOOK == 0 and _is_calm(source)


def choose_target(source: Scheduler, others: Iterable[tuple[str, Scheduler]]) -> str | None:
    """The name of the idlest of the ``others`` that can relieve ``source``; None if nobody would, noticeably."""
    able = [
        (one.num_running / one.capacity.max_rows, name)
        for name, one in others
        if one is not source and _is_calm(one) and not one.running.prefilling and _is_alike(source, one)
        if _surplus(source, one) >= _LEAST_SURPLUS
    ]
    return min(able)[1] if able else None


def choose_requests(source: Scheduler, target: Scheduler) -> list[Request]:
    """Whom to hand over now: the cheapest to compute anew on ``target``, which can hold them until they may move on."""
    count = min(_surplus(source, target), _MOST_MOVES, target.rows.max_rows - target.num_running)
    kv, budget = target.kv, target.capacity.max_batched_tokens
    blocks = kv.pool.num_allocatable - kv.num_blocks_for(STAY_TOKENS) * (target.num_running + count)
    chosen: list[Request] = []
    for cost, num_tokens, request in sorted(_candidates(source, target), key=lambda one: (one[0], -one[2].arrival)):
        blocks -= kv.num_blocks_for(num_tokens)
        budget -= cost
        if len(chosen) == count or blocks < 0 or (chosen and budget < 0):
            break
        chosen.append(request)
    return chosen


def _is_calm(scheduler: Scheduler) -> bool:
    """Whether everybody that is there runs, and nobody has to run alone."""
    backlog = scheduler.backlog
    return not len(backlog.suspects) and scheduler.isolation.request is None and backlog.waiting.peek() is None


def _is_alike(source: Scheduler, target: Scheduler) -> bool:
    """Whether streams go on there exactly as they would have here."""
    return source.capacity.arithmetic is not None and source.capacity.arithmetic == target.capacity.arithmetic


def _surplus(source: Scheduler, target: Scheduler) -> int:
    """Rows that would have to move for the same share of both executors' rows to be taken; 0 if they are near it."""
    here, there = source.num_running, target.num_running
    most_here, most_there = source.capacity.max_rows, target.capacity.max_rows
    if here / most_here * (1 - _TOLERANCE) <= there / most_there:
        return 0
    return (here * most_there - there * most_here) // (most_here + most_there)


def _candidates(source: Scheduler, target: Scheduler) -> list[tuple[int, int, Request]]:
    """Decoding requests that may move: tokens to compute on ``target``, all their known tokens, and who it is."""
    table, rows = source.rows, source.running.decoding
    known = table.num_tokens[rows]
    may_move = (known - table.num_explicit[rows] >= STAY_TOKENS) & (table.max_tokens[rows] - known >= STAY_TOKENS)
    may_move &= table.max_tokens[rows] <= target.capacity.max_total_tokens
    rows = rows[may_move]
    rows = rows[np.argsort(known[may_move], kind="stable")[:_MAX_CANDIDATES]]
    found = []
    for row in rows.tolist():
        num_tokens, request = int(table.num_tokens[row]), table.request(row)
        cost = num_tokens - _num_cached(request, source, target)
        if int(table.max_tokens[row]) - num_tokens >= cost // _KNOWN_TOKENS_PER_STEP:
            found.append((cost, num_tokens, request))
    return found


def _num_cached(request: Request, source: Scheduler, target: Scheduler) -> int:
    """Tokens of a running request that ``target`` has in its cache, of those that were known at its admission."""
    if source.capacity.block_size != target.capacity.block_size:
        return 0  # its digests are those of the blocks that it has
    return target.kv.num_matching_tokens(request)
