"""What plans mean to a shadow executor, and what its answers mean on the wire."""

import struct
import zlib

import numpy as np

from executor_service import step_plan as wire_values
from scheduler_service.core.logprobs import LogprobColumns
from scheduler_service.core.request import SamplingParams
from scheduler_service.core.step_plan import Admission, StepPlan, StepResult
from tests.fakes.shadow_executor import POISON

POISON_TOP_K = 13  # whoever samples with it kills executors


def shadow_sampling(sampling: wire_values.RowSampling, prompt_len: int) -> SamplingParams:
    """How a shadow executor samples: every parameter that changes what a model says changes the seed.

    With penalties the place where the prompt ends is such a parameter.
    """
    essence = struct.pack(
        "<QiiIffffff",
        sampling.seed,
        sampling.top_k,
        sampling.min_tokens,
        prompt_len if sampling.has_penalties else 0,
        *(sampling.temperature, sampling.top_p, sampling.min_p),
        *(sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty),
    )
    for column in (
        sampling.bias_token_ids,
        sampling.bias_values,
        sampling.allowed_token_ids,
        sampling.banned_token_ids,
    ):
        essence += struct.pack("<I", column.size) + column.tobytes()
    return SamplingParams(
        encoded=POISON if sampling.top_k == POISON_TOP_K else b"",
        seed=zlib.crc32(essence) << 32 | zlib.adler32(essence),
        stop_token_ids=tuple(sampling.stop_token_ids.tolist()),
        min_tokens=sampling.min_tokens,
        num_logprobs=sampling.num_logprobs,
        num_prompt_logprobs=sampling.num_prompt_logprobs,
        needs_log=sampling.has_penalties or sampling.num_prompt_logprobs is not None,
    )


def shadow_plan(plan: wire_values.StepPlan) -> StepPlan:
    """A plan as a shadow executor takes it."""
    admissions = tuple(
        Admission(
            row=one.row,
            block_ids=one.block_ids,
            num_prompt_tokens=one.prompt_len,
            sampling=shadow_sampling(one.sampling, one.prompt_len),
            token_ids=one.token_ids,
            audit_from=one.audit_from,
        )
        for one in plan.admissions
    )
    return StepPlan(
        plan.step_id,
        plan.released_rows,
        admissions,
        plan.extend_rows,
        plan.extend_blocks,
        plan.rows,
        plan.num_tokens,
        plan.start_positions,
        plan.flags,
        plan.prefill_token_ids,
        plan.slot_mapping,
        plan.table_hashes,
        plan.after_idle,
    )


def wire_result(result: StepResult, timings: wire_values.StepTimings) -> wire_values.StepResult:
    """A shadow executor's answer as an executor sends it."""
    return wire_values.StepResult(
        step_id=result.step_id,
        token_ids=result.token_ids,
        timings=timings,
        logprobs=None if result.logprobs is None else _wire_logprobs(result.logprobs),
        prompt_logprobs=tuple(
            wire_values.RowPromptLogprobs(one.row, one.start_position, _wire_logprobs(one.logprobs))
            for one in result.prompt_logprobs
        ),
        audited_tokens=result.audited_tokens,
        audit_mismatch_rows=result.audit_mismatch_rows,
        grammar_ended=np.zeros(0, np.uint8),
    )


def _wire_logprobs(columns: LogprobColumns) -> wire_values.LogprobColumns:
    return wire_values.LogprobColumns(
        columns.logprobs, columns.ranks, columns.top_counts, columns.top_token_ids, columns.top_logprobs
    )
