"""Whether an admission makes sense: everything that a step would otherwise stumble over."""

import math

import numpy as np

from executor_service.sampling_state import MAX_BIASES
from executor_service.step_plan import Admission, Int32s, RowSampling

MAX_TOP_LOGPROBS = 20
MAX_GRAMMAR_CHARS = 1 << 20

_MAX_BIAS = 100.0
_MAX_PENALTY = 2.0
_MAX_REPETITION_PENALTY = 10.0


def check_admission(admission: Admission, vocab_size: int, max_model_len: int) -> None:
    """Check sampling parameters and token log.

    Raises:
        ValueError: which of them is nonsense.
    """
    _check_scalars(admission.sampling)
    _check_ids(admission.sampling, vocab_size)
    _check_log(admission, vocab_size, max_model_len)


def _check_scalars(sampling: RowSampling) -> None:
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature {sampling.temperature}")
    if sampling.temperature > 0 and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p {sampling.top_p}")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(f"min_p {sampling.min_p}")
    if not 0 < sampling.repetition_penalty <= _MAX_REPETITION_PENALTY:
        raise ValueError(f"repetition penalty {sampling.repetition_penalty}")
    for name, penalty in (("frequency", sampling.frequency_penalty), ("presence", sampling.presence_penalty)):
        if not -_MAX_PENALTY <= penalty <= _MAX_PENALTY:
            raise ValueError(f"{name} penalty {penalty}")
    for count in (sampling.num_logprobs, sampling.num_prompt_logprobs):
        if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
            raise ValueError(f"{count} log probabilities per token")
    if len(sampling.grammar) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"a grammar of {len(sampling.grammar)} characters")


def _check_ids(sampling: RowSampling, vocab_size: int) -> None:
    for name, ids in (
        ("biased", sampling.bias_token_ids),
        ("allowed", sampling.allowed_token_ids),
        ("banned", sampling.banned_token_ids),
        ("stop", sampling.stop_token_ids),
    ):
        if ids.size > vocab_size:
            raise ValueError(f"{ids.size} {name} ids")
        if not _are_tokens(ids, vocab_size):
            raise ValueError(f"a {name} id outside the vocabulary")
    biased, values = sampling.bias_token_ids, sampling.bias_values
    if biased.size != values.size or biased.size > MAX_BIASES:
        raise ValueError(f"{values.size} biases for {biased.size} ids")
    if np.unique(biased).size != biased.size:
        raise ValueError("two biases for one id")
    if not (np.abs(values) <= _MAX_BIAS).all():  # false for NaN
        raise ValueError("a bias out of bounds")


def _check_log(admission: Admission, vocab_size: int, max_model_len: int) -> None:
    sampling, size = admission.sampling, admission.token_ids.size
    if max(size, admission.prompt_len) > max_model_len:
        raise ValueError(f"a log of {size} tokens and a prompt of {admission.prompt_len}")
    if not _are_tokens(admission.token_ids, vocab_size):
        raise ValueError("a token of its log outside the vocabulary")
    if size:
        if not 1 <= admission.prompt_len <= size:
            raise ValueError(f"a prompt of {admission.prompt_len} tokens in a log of {size}")
    elif sampling.has_penalties or sampling.num_prompt_logprobs is not None or admission.audit_from:
        raise ValueError("no token log, which its parameters need")
    if admission.audit_from and not admission.prompt_len <= admission.audit_from <= size:
        raise ValueError(f"an audit from {admission.audit_from} in a log of {size} tokens")


def _are_tokens(ids: Int32s, vocab_size: int) -> bool:
    return ids.size == 0 or bool(ids.min() >= 0 and ids.max() < vocab_size)
