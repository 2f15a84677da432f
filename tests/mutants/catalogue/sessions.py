"""Of sessions, on both sides."""

from tests.mutants.mutant import Mutant

_ENGINE = "scheduler_service/engine"
_TEST_REGISTRY = "tests/engine/test_executor_registry.py"
_TEST_SESSION = "tests/executor_process/test_session.py"

MUTANTS = (
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
)
