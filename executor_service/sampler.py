"""From a step's hidden states to its tokens, and to what rows report beside them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from executor_service.input_batch import Audit, GrammarMasks, InputBatch, PromptTargets
from kernels.sampling import Logprobs, SamplingBatch, log_probabilities, sample

# Positions whose logits exist at once beside those that are sampled: 64 x 151,936 in float32 are 37 MiB.
SLICE = 64


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What a step yielded on the model's device, in the order of ``InputBatch.sample_indices``."""

    token_ids: Tensor  # int64 [S]; 0 where row_ok is False
    row_ok: Tensor  # bool [S]; False where the row's logits were not finite, or nothing may be sampled
    logprobs: Logprobs | None = None  # of ``SamplingBatch.logprobs``
    prompt_logprobs: Logprobs | None = None  # of ``InputBatch.prompt_targets``
    audit_matches: Tensor | None = None  # bool, one per token of ``InputBatch.audits``


def sample_step(
    logits_at: Callable[[Tensor], Tensor], batch: InputBatch, logits: Tensor | None = None
) -> SampledTokens:
    """Sample the step's rows. ``logits_at`` maps token indices, int64 [N], to float32 [N, V]; ``logits`` are those of
    the rows sampled, where they exist already.

    Waits for no value of the device, but for the matchers of rows with a grammar.
    """
    if logits is None:
        logits = logits_at(batch.sample_indices)
    if batch.grammar is not None:
        _narrow(batch.sampling, batch.grammar)
    sampled = sample(logits, batch.sampling)
    del logits
    prompt_logprobs = None
    if batch.prompt_targets is not None:
        prompt_logprobs = _prompt_logprobs(logits_at, batch.prompt_targets)
    audit_matches = None
    if batch.audits:
        audit_matches = torch.cat([_matches(logits_at, audit) for audit in batch.audits])
    return SampledTokens(sampled.token_ids, sampled.row_ok, sampled.logprobs, prompt_logprobs, audit_matches)


def _matches(logits_at: Callable[[Tensor], Tensor], audit: Audit) -> Tensor:
    """Whether each audited token is sampled again, bool [A]."""
    if audit.grammar is not None:
        _narrow(audit.sampling, audit.grammar)
    again: Tensor = sample(logits_at(audit.indices), audit.sampling).token_ids == audit.expected
    return again


def _narrow(sampling: SamplingBatch, grammar: GrammarMasks) -> None:
    """Allow only what the matchers do; the bits are this step's own."""
    mask = sampling.mask
    assert mask is not None  # the batch builder made one for these rows
    host = grammar.source.fill()
    if mask.bits.is_cuda:
        host = host.pin_memory()
    bits = host.to(mask.bits.device, non_blocking=True) & mask.bits.index_select(0, grammar.at)
    mask.bits.index_copy_(0, grammar.at, bits)


def _prompt_logprobs(logits_at: Callable[[Tensor], Tensor], targets: PromptTargets) -> Logprobs:
    slices = zip(torch.split(targets.indices, SLICE), torch.split(targets.token_ids, SLICE), strict=True)
    parts = [log_probabilities(logits_at(indices), token_ids, targets.num_top) for indices, token_ids in slices]
    return Logprobs(
        logprobs=torch.cat([part.logprobs for part in parts]),
        ranks=torch.cat([part.ranks for part in parts]),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
    )
