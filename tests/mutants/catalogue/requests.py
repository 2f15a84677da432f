"""Of what becomes of requests: results, handovers, losses of executors."""

from tests.mutants.mutant import Mutant

_CORE = "scheduler_service/core"
_TEST_HANDOVER = "tests/core/test_handover.py"
_TEST_CORE = (
    "tests/core/test_scheduler.py tests/core/test_turns.py tests/core/test_audits.py tests/core/test_suspicion.py "
    "tests/core/test_survival.py"
)

MUTANTS = (
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
)
