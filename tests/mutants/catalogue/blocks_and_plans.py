"""Of blocks, prefixes and plans."""

from tests.mutants.mutant import Mutant

_CORE = "scheduler_service/core"
_TEST_CORE = (
    "tests/core/test_scheduler.py tests/core/test_turns.py tests/core/test_audits.py tests/core/test_suspicion.py "
    "tests/core/test_survival.py"
)

MUTANTS = (
    # blocks and prefixes
    Mutant(
        "a block with another owner is freed",
        f"{_CORE}/block_pool.py",
        "orphans = blocks[remaining == 0][::-1]",
        "orphans = blocks[remaining <= 1][::-1]",
    ),
    Mutant(
        "a prefix is evicted from its root",
        f"{_CORE}/block_pool.py",
        "orphans = blocks[remaining == 0][::-1]",
        "orphans = blocks[remaining == 0]",
    ),
    Mutant(
        "a shared block is not counted",
        f"{_CORE}/block_pool.py",
        "            self.ref_count[block] += 1",
        "            self.ref_count[block] = 1",
    ),
    Mutant(
        "an evicted block can still be hit",
        f"{_CORE}/block_pool.py",
        "            self._on_evict(block)\n            self._free",
        "            self._free",
    ),
    Mutant(
        "what a failed row has published can still be hit",
        f"{_CORE}/running.py",
        "            self._kv.unpublish(row)",
        "            pass",
        _TEST_CORE,
    ),
    Mutant(
        "blocks are published before they are settled",
        f"{_CORE}/kv_cache_manager.py",
        "num_settled = int(rows.num_settled[row])",
        "num_settled = int(rows.num_dispatched[row])",
    ),
    Mutant(
        "a hit leaves nothing to compute",
        f"{_CORE}/kv_cache_manager.py",
        "self.cache.match(request.block_hashes, (len(request.token_ids) - 1) // self._block_size)",
        "self.cache.match(request.block_hashes, len(request.token_ids) // self._block_size)",
    ),
    Mutant(
        "the salt is ignored",
        f"{_CORE}/kv_cache_manager.py",
        "            parent = hashes[-1] if hashes else request.salt\n            hashes.extend(",
        "            parent = hashes[-1] if hashes else bytes(32)\n            hashes.extend(",
    ),
    Mutant(
        "a matched block is evicted for the request that matched it",
        f"{_CORE}/kv_cache_manager.py",
        "fresh + self.pool.num_unowned(matched) + reserve <= self.pool.num_allocatable",
        "fresh + reserve <= self.pool.num_allocatable",
    ),
    # planning
    Mutant(
        "more plans in flight than credits",
        f"{_CORE}/scheduler.py",
        "if in_flight >= self.run_ahead.depth:",
        "if in_flight > self.run_ahead.depth:",
    ),
    Mutant(
        "the token budget is not spent",
        f"{_CORE}/step_builder.py",
        "        self.tokens -= count",
        "        pass",
    ),
    Mutant(
        "slots are planned off by one",
        f"{_CORE}/step_builder.py",
        "table.block_size + start % table.block_size)",
        "table.block_size + (start + 1) % table.block_size)",
    ),
    Mutant(
        "the last chunk does not sample",
        f"{_CORE}/step_builder.py",
        "EXPLICIT | SAMPLE if end == known else EXPLICIT",
        "EXPLICIT | SAMPLE if end == known - 1 else EXPLICIT",
    ),
    Mutant(
        "rows are released twice",
        f"{_CORE}/running.py",
        "released, self._released = self._released, []",
        "released = self._released",
    ),
    Mutant(
        "re-admitted with tokens still in flight",
        f"{_CORE}/admission.py",
        "return request.last_step > self._ledger.settled_step",
        "return False",
    ),
    Mutant(
        "the prompt ends where the known output does",
        f"{_CORE}/admission.py",
        "num_prompt_tokens=request.num_prompt_tokens,",
        "num_prompt_tokens=len(request.token_ids),",
    ),
    Mutant(
        "penalties come without their log",
        f"{_CORE}/admission.py",
        "needs_log = request.sampling.needs_log or audit_from > 0",
        "needs_log = audit_from > 0",
    ),
    Mutant(
        "priority is inverted",
        f"{_CORE}/waiting_queue.py",
        "heapq.heappush(self._heap, (request.priority, request.arrival))",
        "heapq.heappush(self._heap, (-request.priority, request.arrival))",
        _TEST_CORE,
    ),
    Mutant(
        "the queue timeout is ignored",
        f"{_CORE}/queue_timeouts.py",
        "self._heap[0][0] <= now",
        "self._heap[0][0] <= 0.0",
        _TEST_CORE,
    ),
    Mutant(
        "held requests run on",
        f"{_CORE}/cluster.py",
        "if request is None or request.is_held == held:",
        "if request is None or request.is_held == held or held:",
        _TEST_CORE,
    ),
)
