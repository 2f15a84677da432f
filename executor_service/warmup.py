"""A first step through the ordinary path, so that no request pays for what kernels set up when they first run."""

import numpy as np
import numpy.typing as npt

from executor_service.executor import StepLauncher
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, RowSampling, StepPlan


def warm_up(launcher: StepLauncher, block_size: int) -> None:
    """Run a prefill and a decode in block 0, and forget them. Raises whatever the model raises."""
    prompt_len = max(1, block_size - 1)
    launcher.launch(_step(np.arange(prompt_len), EXPLICIT, (Admission(0, _int32s([0]), RowSampling()),))).wait()
    if prompt_len < block_size:
        launcher.launch(_step(np.array([prompt_len]), 0, ())).wait()
    launcher.reset()


def _step(positions: npt.NDArray[np.int_], flags: int, admissions: tuple[Admission, ...]) -> StepPlan:
    """Row 0 computes token 0 at ``positions``; block 0 makes slots equal positions, and the table's hash 1."""
    none = _int32s([])
    return StepPlan(
        step_id=0,
        released_rows=none,
        admissions=admissions,
        extend_rows=none,
        extend_blocks=none,
        rows=_int32s([0]),
        num_tokens=_int32s([positions.size]),
        start_positions=_int32s([positions[0]]),
        flags=np.array([flags | SAMPLE], np.uint8),
        prefill_token_ids=np.zeros(positions.size if flags else 0, np.int32),
        slot_mapping=positions.astype(np.int32),
        table_hashes=np.array([1], np.uint32),
    )


def _int32s(values: list[int]) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)
