"""What a row's sampling needs between steps: parameters, and tables that on a CPU take memory once a row uses them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.masks import first_audited
from executor_service.step_plan import Admission, Int32s, RowSampling

MAX_BIASES = 1024

_INT32_MAX = 2**31 - 1
_OFF = -1
_WORD_BITS = 32


class DeviceTable:
    """A [rows, width] tensor on the device.

    On a CPU it is allocated when its first row is written. Elsewhere it is at once: what the KV cache has taken cannot
    be had later.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (rows, width)
        self._dtype = dtype
        self._device = device
        self._tensor: Tensor | None = None if device.type == "cpu" else self._zeros()

    @property
    def is_allocated(self) -> bool:
        """Whether it takes memory."""
        return self._tensor is not None

    @property
    def tensor(self) -> Tensor:
        """The whole table; only rows that were written mean anything."""
        if self._tensor is None:
            self._tensor = self._zeros()
        return self._tensor

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)

    def write(self, row: int, values: NDArray[Any]) -> None:
        """Put ``values`` at the row's beginning, zeros after them; ordered with the steps that are launched."""
        padded = np.zeros(self._shape[1], values.dtype)
        padded[: values.size] = values
        host = torch.from_numpy(padded)
        if self._device.type == "cuda":
            host = host.pin_memory()
        self.tensor[row].copy_(host, non_blocking=True)

    def take(self, rows: Tensor) -> Tensor:
        """A copy of ``rows`` (int64 on the device)."""
        return self.tensor.index_select(0, rows)


class SamplingState:
    """Struct of arrays over rows: host numpy [max_rows] unless said otherwise.

    Attributes:
        temperature, top_p, min_p, repetition, frequency, presence: float32. top_k: int32. seed: int64.
        prompt_len, min_tokens: int32.
        num_logprobs, num_prompt_logprobs: int32, -1 = none are wanted. processed_logprobs: bool.
        audit_from: int32, 0 = no audit.
        known_len: int32, length of the log that came with the admission.
        log_len: int32, tokens of the log once every launched step has run; kept for rows with penalties only.
        has_penalties, has_bias, has_mask, has_grammar: bool.
        version: changes whenever a row gets other parameters.
        any_special: whether any admitted row uses more than temperature, top-k and top-p, or is being audited.
        log: int32 [max_rows, max_model_len + 1], for rows with penalties; sampled tokens are appended on the device.
        permitted, stops: int32 [max_rows, ceil(vocabulary / 32)], bits of the ids a row may sample, and of those it may
            not before ``min_tokens``.
        bias_ids, bias_values: int32 and float32 [max_rows, MAX_BIASES], filled up with id 0, value 0.
        bias_sizes: int32.
    """

    def __init__(self, max_rows: int, max_model_len: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._log_shape = (max_rows, max_model_len + 1)
        self.num_words = -(-vocab_size // _WORD_BITS)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.repetition = np.ones(max_rows, np.float32)
        self.frequency = np.zeros(max_rows, np.float32)
        self.presence = np.zeros(max_rows, np.float32)
        self.seed = np.zeros(max_rows, np.int64)
        self.prompt_len = np.zeros(max_rows, np.int32)
        self.min_tokens = np.zeros(max_rows, np.int32)
        self.num_logprobs = np.full(max_rows, _OFF, np.int32)
        self.num_prompt_logprobs = np.full(max_rows, _OFF, np.int32)
        self.processed_logprobs = np.zeros(max_rows, np.bool_)
        self.audit_from = np.zeros(max_rows, np.int32)
        self.known_len = np.zeros(max_rows, np.int32)
        self.log_len = np.zeros(max_rows, np.int32)
        self.has_penalties = np.zeros(max_rows, np.bool_)
        self.has_bias = np.zeros(max_rows, np.bool_)
        self.has_mask = np.zeros(max_rows, np.bool_)
        self.has_grammar = np.zeros(max_rows, np.bool_)
        self.bias_sizes = np.zeros(max_rows, np.int32)
        self.version = 0
        self.any_special = False
        self.log = DeviceTable(max_rows, max_model_len + 1, torch.int32, device)
        self.permitted = DeviceTable(max_rows, self.num_words, torch.int32, device)
        self.stops = DeviceTable(max_rows, self.num_words, torch.int32, device)
        self.bias_ids = DeviceTable(max_rows, MAX_BIASES, torch.int32, device)
        self.bias_values = DeviceTable(max_rows, MAX_BIASES, torch.float32, device)
        self._is_special = np.zeros(max_rows, np.bool_)  # but for an audit
        self._known: Int32s | None = None

    def clear(self, rows: Int32s | slice) -> None:
        """The requests in ``rows`` are gone."""
        if not self.any_special:
            return
        self._is_special[rows] = False
        for flags in (self.has_penalties, self.has_bias, self.has_mask, self.has_grammar):
            flags[rows] = False
        for values in (self.min_p, self.min_tokens, self.audit_from):
            values[rows] = 0
        for counts in (self.num_logprobs, self.num_prompt_logprobs):
            counts[rows] = _OFF
        self._note_special()

    def end_audits(self, rows: Int32s, ends: Int32s) -> None:
        """Launched steps compute ``rows`` up to ``ends``: no token of a known log is left to be audited below it."""
        if not self.audit_from.any():
            return
        self.audit_from[rows[ends >= self.known_len[rows]]] = 0
        self._note_special()

    def _note_special(self) -> None:
        self.any_special = bool((self._is_special | (self.audit_from > 0)).any())

    def admit(self, admission: Admission) -> None:
        """``admission.row`` has these parameters, which have been checked."""
        row, sampling = admission.row, admission.sampling
        self.version += 1
        greedy = sampling.temperature == 0
        self.temperature[row] = sampling.temperature
        # a greedy row must not make a whole batch pay for filters that cannot change its token
        self.top_k[row] = 0 if greedy else min(sampling.top_k, _INT32_MAX)
        self.top_p[row] = 1.0 if greedy else sampling.top_p
        self.seed[row] = np.uint64(sampling.seed).astype(np.int64)
        self._is_special[row] = _is_special(admission.sampling)
        if self._is_special[row] or admission.audit_from:
            self.any_special = True
            self._admit_special(admission)

    def _admit_special(self, admission: Admission) -> None:
        row, sampling = admission.row, admission.sampling
        self.min_p[row] = 0.0 if sampling.temperature == 0 else sampling.min_p
        self.prompt_len[row] = admission.prompt_len
        self.min_tokens[row] = min(sampling.min_tokens, _INT32_MAX) if sampling.stop_token_ids.size else 0
        self.num_logprobs[row] = _OFF if sampling.num_logprobs is None else sampling.num_logprobs
        self.num_prompt_logprobs[row] = _OFF if sampling.num_prompt_logprobs is None else sampling.num_prompt_logprobs
        self.processed_logprobs[row] = sampling.processed_logprobs
        self.audit_from[row] = first_audited(admission)
        self.known_len[row] = self.log_len[row] = admission.token_ids.size
        self.has_grammar[row] = bool(sampling.grammar)
        self.has_penalties[row] = sampling.has_penalties
        if sampling.has_penalties:
            self.repetition[row] = sampling.repetition_penalty
            self.frequency[row] = sampling.frequency_penalty
            self.presence[row] = sampling.presence_penalty
            self.log.write(row, admission.token_ids)
        self.has_bias[row] = sampling.bias_token_ids.size > 0
        self.bias_sizes[row] = sampling.bias_token_ids.size
        if self.has_bias[row]:
            self.bias_ids.write(row, sampling.bias_token_ids)
            self.bias_values.write(row, sampling.bias_values)
        self.has_mask[row] = sampling.allowed_token_ids.size + sampling.banned_token_ids.size > 0
        if self.has_mask[row]:
            self.permitted.write(row, self._permitted_bits(sampling))
        if self.min_tokens[row] > 0:
            self.stops.write(row, self._bits(sampling.stop_token_ids))
        if self.num_prompt_logprobs[row] != _OFF or admission.audit_from:
            self._known_log()[row, : admission.token_ids.size] = admission.token_ids

    def known_tokens(self, rows: NDArray[np.intp] | Int32s, positions: NDArray[np.int64]) -> Int32s:
        """The log's tokens, as they came with the admission, of rows that report on their prompt or are audited."""
        return self._known_log()[rows, positions]

    def _known_log(self) -> Int32s:
        if self._known is None:
            self._known = np.zeros(self._log_shape, np.int32)
        return self._known

    def _permitted_bits(self, sampling: RowSampling) -> Int32s:
        bits = self._bits(sampling.allowed_token_ids)
        if sampling.allowed_token_ids.size == 0:
            bits = ~bits
        return bits & ~self._bits(sampling.banned_token_ids)

    def _bits(self, token_ids: Int32s) -> Int32s:
        """Packed like ``TokenMask.bits``: int32 [num_words]."""
        chosen = np.zeros(self.num_words * _WORD_BITS, np.bool_)
        chosen[token_ids] = True
        return np.packbits(chosen, bitorder="little").view("<i4").astype(np.int32, copy=False)


def _is_special(sampling: RowSampling) -> bool:
    return bool(
        sampling.min_p
        or sampling.has_penalties
        or sampling.bias_token_ids.size
        or sampling.allowed_token_ids.size
        or sampling.banned_token_ids.size
        or (sampling.min_tokens and sampling.stop_token_ids.size)
        or sampling.grammar
        or sampling.num_logprobs is not None
        or sampling.num_prompt_logprobs is not None
    )
