"""Defects of one line each, planted to see whether the tests would notice."""

from dataclasses import dataclass

_CORE = "scheduler_service/core"
_ENGINE = "scheduler_service/engine"
_API = "scheduler_service/api"
_TEST_CORE = "tests/core/test_scheduler.py tests/core/test_turns.py tests/core/test_survival.py"
_TEST_HANDOVER = "tests/core/test_handover.py"
_TEST_RESUME = "tests/api/test_resume.py"
_TEST_REGISTRY = "tests/engine/test_executor_registry.py"
_TEST_SESSION = "tests/executor_process/test_session.py"


@dataclass(frozen=True)
class Mutant:
    """In ``path``, ``old``, which is there exactly once, becomes ``new``.

    Attributes:
        tests: files for what the simulator cannot see; it goes first all the same, unless ``simulated`` is False.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str = ""
    simulated: bool = True


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
    # handing over what runs
    Mutant(
        "who has just come moves on",
        f"{_CORE}/handover.py",
        "(known - table.num_explicit[rows] >= STAY_TOKENS)",
        "(known >= table.num_explicit[rows])",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "so many move that they have to come back",
        f"{_CORE}/handover.py",
        "// (most_here + most_there)",
        "// most_there",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "requests move where there is no room for them",
        f"{_CORE}/handover.py",
        "if len(chosen) == count or blocks < 0 or",
        "if len(chosen) == count or",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "requests move to where they are rounded otherwise",
        f"{_CORE}/handover.py",
        "and source.capacity.arithmetic == target.capacity.arithmetic",
        "and target.capacity.arithmetic is not None",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "requests move to executors that take none",
        f"{_CORE}/cluster.py",
        "if self._states[name] is ExecutorState.SERVING and name not in arriving",
        "if name not in arriving",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "who leaves is admitted again at once",
        f"{_CORE}/cluster.py",
        "            self._moves.update((request.handle, target) for request in requests)",
        "            pass",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "who ends on the way is not forgotten",
        f"{_CORE}/cluster.py",
        "            self._moves.pop(end.handle, None)",
        "            pass",
        _TEST_HANDOVER,
        simulated=False,
    ),
    Mutant(
        "requests leave with tokens in flight",
        f"{_CORE}/scheduler.py",
        "if one.last_step <= settled and may_leave(one)]",
        "if may_leave(one)]",
        _TEST_CORE,
        simulated=False,  # streams are what they were: the tokens are sampled again
    ),
    # results
    Mutant(
        "one token too many",
        f"{_CORE}/row_table.py",
        "return stopped, count >= self.max_tokens[rows]",
        "return stopped, count > self.max_tokens[rows]",
    ),
    Mutant(
        "a stop id right behind the minimum is ignored",
        f"{_CORE}/row_table.py",
        "stopped &= count > self.min_tokens[rows]",
        "stopped &= count > self.min_tokens[rows] + 1",
    ),
    Mutant(
        "tokens in flight are given to the row's next owner",
        f"{_CORE}/settlement.py",
        "holds = self._table.admission[step.rows] == step.admissions",
        "holds = self._table.admission[step.rows] >= 0",
    ),
    Mutant(
        "prompt log probabilities are told twice",
        f"{_CORE}/settlement.py",
        "    request.next_prompt_logprob = start + len(logprobs)",
        "    request.next_prompt_logprob = start",
    ),
    # losses
    Mutant(
        "drain forgets the waiting",
        f"{_CORE}/cluster.py",
        "        if state is not ExecutorState.SERVING:\n            self._take_back(",
        "        if state is ExecutorState.PAUSED:\n            self._take_back(",
    ),
    Mutant(
        "a lost executor's requests are forgotten",
        f"{_CORE}/scheduler.py",
        "        requests += [self.rows.vacate(row)",
        "        requests += [] and [self.rows.vacate(row)",
    ),
    Mutant(
        "poison is tried again without end",
        f"{_CORE}/suspicion.py",
        "return self.streak >= _DEATHS_TO_FAIL or self.total >= _MAX_DEATHS",
        "return False",
        _TEST_CORE,
    ),
    Mutant(
        "suspicion is never cleared",
        f"{_CORE}/suspicion.py",
        "            self.streak = 0",
        "            pass",
        _TEST_CORE,
    ),
    Mutant(
        "suspects run with the others",
        f"{_CORE}/suspicion.py",
        "return self.streak >= _DEATHS_TO_QUARANTINE",
        "return self.streak > 99",
        _TEST_CORE,
    ),
    Mutant(
        "progress asks for more than was in flight",
        f"{_CORE}/suspicion.py",
        "num_tokens - self.tokens > self.in_flight:",
        "num_tokens - self.tokens > 8:",
        _TEST_CORE,
        simulated=False,
    ),
    Mutant(
        "any token is progress",
        f"{_CORE}/suspicion.py",
        "num_tokens - self.tokens > self.in_flight:",
        "num_tokens > self.tokens:",
        _TEST_CORE,
    ),
    Mutant(
        "an aborted suspect's steps in flight keep nobody waiting",
        f"{_CORE}/isolation.py",
        "            self._last_step = request.last_step",
        "            pass",
        _TEST_CORE,
        simulated=False,
    ),
    # the scheduler's side of a session
    Mutant(
        "the epoch is not checked",
        f"{_ENGINE}/executor_registry.py",
        "(session.boot_id, session.epoch) == (header.boot_id, header.epoch)",
        "session.boot_id == header.boot_id",
        _TEST_REGISTRY,
    ),
    Mutant(
        "a scheduler takes frames for another",
        f"{_ENGINE}/executor_registry.py",
        "        if header.scheduler_id != self._scheduler_id:\n            return None",
        "        if not header.epoch:\n            return None",
        _TEST_REGISTRY,
    ),
    Mutant(
        "a result after a gap is taken",
        f"{_ENGINE}/executor_registry.py",
        "if result.step_id != session.settled + 1:",
        "if result.step_id <= session.settled:",
    ),
    Mutant(
        "a result that no plan asked for is taken",
        f"{_ENGINE}/executor_registry.py",
        "if result.step_id > session.dispatched:",
        "if result.step_id < 0:",
        _TEST_REGISTRY,
    ),
    Mutant(
        "plans are never sent again",
        f"{_ENGINE}/executor_registry.py",
        "if received == before and received < sent_before:",
        "if received > sent_before:",
        _TEST_REGISTRY,
    ),
    Mutant(
        "a scheduler never checks a lease",
        f"{_ENGINE}/executor_registry.py",
        "if now - session.last_heard > self._lease:",
        "if now < session.last_heard:",
        _TEST_REGISTRY,
    ),
    Mutant(
        "what a vanished executor had waits for the next turn",
        f"{_ENGINE}/loop.py",
        "                self._plan(now)  # what",
        "                pass  # what",
    ),
    Mutant(
        "nobody is ever let go",
        f"{_ENGINE}/executor_registry.py",
        "        self._send(session, Drain(session.redirect))",
        "        pass",
    ),
    Mutant(
        "a hang is never noticed",
        f"{_ENGINE}/step_watch.py",
        "return age if age > self._costs.patience(num_tokens) else 0.0",
        "return 0.0",
        _TEST_REGISTRY,
    ),
    Mutant(
        "a plan that does not arrive is called a stuck step",
        f"{_ENGINE}/executor_registry.py",
        "if session.unreceived and session.unreceived[0][0] == session.settled + 1:",
        "if not session.unreceived and not session.settled:",
        _TEST_REGISTRY,
        simulated=False,
    ),
    # the executor's side
    Mutant(
        "an executor never checks its lease",
        "executor_service/session.py",
        "if epoch is not None and now >= self._last_heard + epoch.lease:",
        "if epoch is not None and now < self._last_heard:",
        _TEST_SESSION,
    ),
    Mutant(
        "results are never sent again",
        "executor_service/session.py",
        "if now - unsettled.sent_at > epoch.heartbeat:",
        "if now < unsettled.sent_at:",
        _TEST_SESSION,
    ),
    Mutant(
        "an acknowledgement is dropped",
        "executor_service/session.py",
        "(first := next(iter(self._unsettled))) <= settled:",
        "(first := next(iter(self._unsettled))) < 0:",
        _TEST_SESSION,
    ),
    Mutant(
        "a plan after a gap is taken",
        "executor_service/session.py",
        "elif plan.step_id > epoch.received + 1:",
        "elif plan.step_id > epoch.received + 64:",
    ),
    Mutant(
        "a repeated plan is run again",
        "executor_service/session.py",
        "if plan.step_id <= epoch.received:",
        "if plan.step_id < epoch.received:",
    ),
    Mutant(
        "results of an earlier epoch are sent",
        "executor_service/session.py",
        "return current if current is not None and current.number == number else None",
        "return current",
        _TEST_SESSION,
    ),
    Mutant(
        "results for another scheduler's epoch of the same number are sent",
        "executor_service/session.py",
        "self._epoch = _Epoch(self._num_epochs, header.scheduler_id",
        "self._epoch = _Epoch(header.epoch, header.scheduler_id",
        _TEST_SESSION,
    ),
    Mutant(
        "noise depends on the place in the batch",
        "executor_service/sampling_builder.py",
        "            position=upload(positions),",
        "            position=upload(positions * 0 + np.arange(len(positions))),",
        "tests/executor_process/test_batch_builder.py tests/executor/test_sampling_features.py",
        simulated=False,
    ),
    # api processes
    Mutant(
        "nothing is held back",
        f"{_API}/sample_text.py",
        "return self._give_out(held=self._finder.held)",
        "return self._give_out(held=0)",
    ),
    Mutant(
        "samples share a seed",
        f"{_API}/intake.py",
        "seed=sample_seed(live.seed, index),",
        "seed=live.seed,",
    ),
    Mutant(
        "output that the caller has is not passed on",
        f"{_API}/intake.py",
        "output_token_ids=next((tuple(point.token_ids) for point in request.resume if point.sample == index), ()),",
        "output_token_ids=(),",
    ),
    Mutant(
        "a stream that was held is never released",
        f"{_API}/engine_client.py",
        "            self._send(wire.encode_hold([], [stream.handle]))",
        "            pass",
    ),
    Mutant(
        "a returning reader gets all from the start",
        f"{_API}/streams.py",
        "        self._taken = num_tokens - self._first",
        "        self._taken = 0",
    ),
    Mutant(
        "an abort for an earlier call ends the later one",
        f"{_API}/live_requests.py",
        "if live is not None and live.call_arrived_at < taken_over_at:",
        "if live is not None:",
        _TEST_RESUME,
    ),
    Mutant(
        "a retry that was overtaken takes the stream back",
        f"{_API}/live_requests.py",
        "if arrived_at < live.call_arrived_at:",
        "if arrived_at < 0.0:",
        _TEST_RESUME,
        simulated=False,
    ),
    Mutant(
        "a copy that lags behind its caller is taken over",
        f"{_API}/live_requests.py",
        "return reaches and not self.is_superseded",
        "return not self.is_superseded",
        _TEST_RESUME,
    ),
    Mutant(
        "a retry gets the end of what was taken over elsewhere",
        f"{_API}/live_requests.py",
        "return reaches and not self.is_superseded",
        "return reaches",
        _TEST_RESUME,
    ),
    Mutant(
        "a whole text of a grammar goes on",
        f"{_API}/intake.py",
        "        return _Admitted(validated, grammar, frozenset(complete))",
        "        return _Admitted(validated, grammar)",
        "tests/api/test_structured.py",
        simulated=False,
    ),
    # the client
    Mutant(
        "a continuation repeats text",
        "client/baton/stream_log.py",
        "token_ids=sample.token_ids, text_offset=sample.text_length)",
        "token_ids=sample.token_ids, text_offset=0)",
    ),
    Mutant(
        "a continuation lacks a token",
        "client/baton/stream_log.py",
        "token_ids=sample.token_ids, text_offset=sample.text_length)",
        "token_ids=sample.token_ids[:-1], text_offset=sample.text_length)",
    ),
    Mutant(
        "a continuation draws another seed",
        "client/baton/stream_log.py",
        "        request.sampling.seed = start.seed",
        "        pass",
    ),
    Mutant(
        "a stream that never begins is tried without end",
        "client/baton/stream_log.py",
        "and self._attempts + 1 < attempts",
        "and attempts > 0",
        "tests/client/test_resume.py",
        simulated=False,
    ),
)
