"""What a step yielded on its way from the device to the host."""

from typing import Protocol

import numpy as np
import torch

from executor_service.sampler import SampledTokens
from executor_service.step_report import NO_REPORT, HostLogprobs, HostOutput, HostTokens, StepReport, host_output
from kernels.sampling import Logprobs


class StepOutput(Protocol):
    """The output of a launched step."""

    def wait(self) -> HostOutput:
        """The output, once the step has run. Call it once, in the order of steps. Raises what the device raised."""


class HostStepOutput:
    """Output of a device that computes before it returns."""

    def __init__(self, tokens: SampledTokens, report: StepReport = NO_REPORT) -> None:
        self._tokens = tokens
        self._report = report

    def wait(self) -> HostOutput:
        """See ``StepOutput``; does not wait."""
        try:
            return host_output(_on_host(self._tokens), self._report)
        except BaseException:
            _abandon_masks(self._report)
            raise


class DeviceStepOutput:
    """Output that a side stream copies to pinned memory of this step's own; ``wait`` releases the GIL."""

    def __init__(self, tokens: SampledTokens, report: StepReport, copy_stream: torch.cuda.Stream) -> None:
        self._report = report
        copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copy_stream):
            self._tokens = SampledTokens(
                token_ids=_copy(tokens.token_ids, copy_stream),
                row_ok=_copy(tokens.row_ok, copy_stream),
                logprobs=_copy_logprobs(tokens.logprobs, copy_stream),
                prompt_logprobs=_copy_logprobs(tokens.prompt_logprobs, copy_stream),
                audit_matches=None if tokens.audit_matches is None else _copy(tokens.audit_matches, copy_stream),
            )
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(copy_stream)

    def wait(self) -> HostOutput:
        """See ``StepOutput``."""
        try:
            self._copied.synchronize()
            return host_output(_on_host(self._tokens), self._report)
        except BaseException:
            _abandon_masks(self._report)
            raise


def _abandon_masks(report: StepReport) -> None:
    """Give the step's matchers up, whose tokens cannot be had: the main thread may wait for them."""
    if report.masks is not None:
        report.masks.abandon()


def _copy(source: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    source.record_stream(stream)  # its memory must not be reused before the copy has run
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return host.copy_(source, non_blocking=True)


def _copy_logprobs(source: Logprobs | None, stream: torch.cuda.Stream) -> Logprobs | None:
    if source is None:
        return None
    return Logprobs(
        logprobs=_copy(source.logprobs, stream),
        ranks=_copy(source.ranks, stream),
        top_ids=_copy(source.top_ids, stream),
        top_logprobs=_copy(source.top_logprobs, stream),
    )


def _on_host(tokens: SampledTokens) -> HostTokens:
    return HostTokens(
        token_ids=tokens.token_ids.numpy().astype(np.int32),
        row_ok=tokens.row_ok.numpy(),
        logprobs=_logprobs_on_host(tokens.logprobs),
        prompt_logprobs=_logprobs_on_host(tokens.prompt_logprobs),
        audit_matches=None if tokens.audit_matches is None else tokens.audit_matches.numpy(),
    )


def _logprobs_on_host(values: Logprobs | None) -> HostLogprobs | None:
    if values is None:
        return None
    return HostLogprobs(
        values.logprobs.numpy(), values.ranks.numpy(), values.top_ids.numpy(), values.top_logprobs.numpy()
    )
