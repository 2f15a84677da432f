"""The main loop: takes plans strictly by step id, applies them, runs them."""

import gc
import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch

from executor_service.batch_builder import BatchBuilder
from executor_service.completion import Completer, LaunchedStep, ResultSink, fault_of
from executor_service.inbox import Inbox, NewEpoch, PlanArrival, Stop
from executor_service.inference_mode import in_inference_mode
from executor_service.input_batch import InputBatch
from executor_service.masks import MaskSource, NoMasks
from executor_service.plan_applier import PlanApplier
from executor_service.row_state import RowState
from executor_service.sampler import SampledTokens
from executor_service.step_output import StepOutput
from executor_service.step_plan import Fault, FaultCode, MalformedPlan, PlanError, StepPlan
from executor_service.step_report import NO_REPORT, StepReport

logger = logging.getLogger(__name__)

EXIT_DEVICE_LOST = 1

_NO_EPOCH = 0


class Runner(Protocol):
    """Runs a batch on the device."""

    def run(self, batch: InputBatch) -> SampledTokens:
        """The sampled tokens, on the device."""


class EpochLink(ResultSink, Protocol):
    """The link as the main loop sees it."""

    def ready(self, epoch: int) -> None:
        """Say that ``epoch`` may begin."""


class PlanLauncher(Protocol):
    """Puts plans on the device, as the main loop sees it."""

    def reset(self) -> None:
        """Forget all rows."""

    def launch(self, plan: StepPlan) -> StepOutput:
        """Apply ``plan`` and launch its step."""


class StepLauncher:
    """From a plan to a step on the device. Never waits for a value of the step it has launched."""

    def __init__(
        self,
        rows: RowState,
        applier: PlanApplier,
        builder: BatchBuilder,
        runner: Runner,
        start_copy: Callable[[SampledTokens, StepReport], StepOutput],
        masks: MaskSource | None = None,
    ) -> None:
        """``masks`` are the matchers of rows with a grammar; without them no such row is taken."""
        self._rows = rows
        self._applier = applier
        self._builder = builder
        self._runner = runner
        self._start_copy = start_copy
        self._masks: MaskSource = masks or NoMasks()
        nothing = rows.last_token[:0]
        self._no_tokens = SampledTokens(nothing, nothing.bool())

    def reset(self) -> None:
        """Forget all rows, once every launched step has run. Raises what a lost device raises."""
        self._applier.reset()
        device = self._rows.last_token.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._masks.reset()

    @in_inference_mode
    def launch(self, plan: StepPlan) -> StepOutput:
        """Apply ``plan`` and put its step on the device.

        Raises:
            PlanError: the plan contradicts the rows or tables.
            Exception: the model's, when the step cannot run.
        """
        layout = self._applier.apply(plan)
        self._masks.apply(plan)
        if plan.rows.size == 0:  # a plan that only releases rows
            return self._start_copy(self._no_tokens, NO_REPORT)
        masks = self._masks.begin(plan.rows[layout.sampling])
        step = self._builder.build(plan, layout, masks, self._masks)
        tokens = self._runner.run(step.batch)
        self._rows.record(step.sampled_rows, tokens.token_ids, step.log_append)
        return self._start_copy(tokens, step.report)


class Executor:
    """Follows one scheduler's plans, epoch after epoch, until told to stop."""

    def __init__(self, inbox: Inbox, link: EpochLink, launcher: PlanLauncher, completer: Completer) -> None:
        self._inbox = inbox
        self._link = link
        self._launcher = launcher
        self._completer = completer
        self._epoch = _NO_EPOCH
        self._is_first_step = True

    @torch.inference_mode()  # once for all steps
    def run(self) -> Stop:
        """Serve until the link says stop; why it did."""
        gc.collect()
        gc.freeze()  # what torch and the model are made of needs no second look, which takes a tenth of a second
        while True:
            match self._inbox.take():
                case NewEpoch() as new:
                    try:
                        self._launcher.reset()
                    except Exception as error:  # every further step would fail: a new process may do better
                        return Stop(EXIT_DEVICE_LOST, f"the device is lost: {error}")
                    self._epoch = new.epoch
                    self._is_first_step = True
                    self._link.ready(new.epoch)
                case PlanArrival() as arrival:
                    if arrival.epoch == self._epoch:  # not after a fault
                        self._step(arrival)
                case Stop() as stop:
                    return stop

    def _step(self, arrival: PlanArrival) -> None:
        plan = arrival.plan
        if isinstance(plan, MalformedPlan):
            self._fault(Fault(plan.step_id, FaultCode.BAD_PLAN, plan.message))
            return
        launched_at = time.monotonic()
        plans_queued = len(self._inbox)
        try:
            output = self._launcher.launch(plan)
        except PlanError as error:
            self._fault(Fault(plan.step_id, error.code, str(error)))
            return
        except Exception as error:  # whatever a kernel raises, the scheduler must learn of it
            logger.exception("step %d failed", plan.step_id)
            self._fault(fault_of(plan.step_id, error))
            return
        after_idle = plan.after_idle or self._is_first_step
        self._is_first_step = False
        self._completer.submit(
            LaunchedStep(self._epoch, plan.step_id, output, arrival.arrived_at, launched_at, plans_queued, after_idle)
        )

    def _fault(self, fault: Fault) -> None:
        """Apply nothing more until the next epoch."""
        self._link.fault(self._epoch, fault)
        self._epoch = _NO_EPOCH
