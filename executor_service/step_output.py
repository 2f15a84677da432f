"""Sampled tokens on their way from the device to the host."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from executor_service.model_runner import SampledTokens

HostTokens = tuple[NDArray[np.int32], NDArray[np.bool_]]


class StepOutput(Protocol):
    """The tokens of a launched step."""

    def wait(self) -> HostTokens:
        """Token ids int32 [S] and row_ok bool [S], once the step has run. Raises what the device raised."""


class HostStepOutput:
    """Tokens of a device that computes before it returns."""

    def __init__(self, tokens: SampledTokens) -> None:
        self._tokens = tokens

    def wait(self) -> HostTokens:
        """See ``StepOutput``; does not wait."""
        return self._tokens.token_ids.numpy().astype(np.int32), self._tokens.row_ok.numpy()


class DeviceStepOutput:
    """Tokens that a side stream copies to pinned memory of this step's own; ``wait`` releases the GIL."""

    def __init__(self, tokens: SampledTokens, copy_stream: torch.cuda.Stream) -> None:
        copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copy_stream):
            self._token_ids = _copy_to_host(tokens.token_ids, copy_stream)
            self._row_ok = _copy_to_host(tokens.row_ok, copy_stream)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(copy_stream)

    def wait(self) -> HostTokens:
        """See ``StepOutput``."""
        self._copied.synchronize()
        return self._token_ids.numpy().astype(np.int32), self._row_ok.numpy()


def _copy_to_host(source: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    source.record_stream(stream)  # its memory must not be reused before the copy has run
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return host.copy_(source, non_blocking=True)
