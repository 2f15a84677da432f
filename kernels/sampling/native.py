"""The fused sampler of cpu.cpp."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.native.library import NativeFunction
from kernels.sampling.batch import Logprobs, Sampled, SamplingBatch

_sample = NativeFunction("baton_sample", "pn")
_log_probabilities = NativeFunction("baton_log_probabilities", "ppppppiiin")

_POINTERS_AND_SIZES = (
    *("logits", "*rows", "*vocab_size"),
    *("temperature", "top_k", "top_p", "min_p", "seeds", "positions"),
    *("mask_index", "mask_bits", "*mask_words"),
    *("bias_index", "bias_ids", "bias_values", "*bias_width"),
    *("penalty_index", "repetition", "frequency", "presence", "log", "*log_stride", "log_rows", "prompt_lens"),
    *("logprob_index", "logprob_processed", "*num_top", "logprobs", "ranks", "top_ids", "top_logprobs"),
    *("token_ids", "row_ok"),
)


class _Arguments(ctypes.Structure):
    """``SampleArguments`` of cpu.cpp; a pointer that is not set is null."""

    _fields_ = [  # ctypes reads it as it is
        (name.removeprefix("*"), ctypes.c_int64 if name.startswith("*") else ctypes.c_void_p)
        for name in _POINTERS_AND_SIZES
    ]


@dataclass
class _Call:
    """Arguments, and the tensors that their pointers point into."""

    arguments: _Arguments
    tensors: list[Tensor]

    def point(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            dense = tensor.contiguous()
            self.tensors.append(dense)
            setattr(self.arguments, name, dense.data_ptr())

    def set(self, **sizes: int) -> None:
        for name, size in sizes.items():
            setattr(self.arguments, name, size)


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """See ``kernels.sampling.sample``."""
    rows, vocab_size = logits.shape
    # of numpy, which costs a step of one row less than torch.empty
    token_ids, row_ok = torch.from_numpy(np.empty(rows, np.int64)), torch.from_numpy(np.empty(rows, np.bool_))
    call = _Call(_Arguments(), [])
    call.point(logits=logits, token_ids=token_ids, row_ok=row_ok)
    call.set(rows=rows, vocab_size=vocab_size)
    if not batch.all_greedy:
        call.point(temperature=batch.temperature, seeds=batch.seed)
        if batch.any_top_k:
            call.point(top_k=batch.top_k)
        if batch.any_top_p:
            call.point(top_p=batch.top_p)
        if batch.min_p is not None:
            call.point(min_p=batch.min_p)
    call.point(positions=batch.position)
    _point_processors(call, batch, rows)
    logprobs = None
    if batch.logprobs is not None:
        logprobs = _empty_logprobs(batch.logprobs.rows.shape[0], batch.logprobs.num_top)
        call.point(
            logprob_index=_inverse(batch.logprobs.rows, rows),
            logprob_processed=batch.logprobs.processed,
            logprobs=logprobs.logprobs,
            ranks=logprobs.ranks,
            top_ids=logprobs.top_ids,
            top_logprobs=logprobs.top_logprobs,
        )
        call.set(num_top=batch.logprobs.num_top)
    _sample(ctypes.addressof(call.arguments), torch.get_num_threads())
    return Sampled(token_ids, row_ok, logprobs)


def log_probabilities(logits: Tensor, targets: Tensor, num_top: int) -> Logprobs:
    """See ``kernels.sampling.log_probabilities``."""
    logits, targets = logits.contiguous(), targets.contiguous()
    out = _empty_logprobs(logits.shape[0], num_top)
    _log_probabilities(
        logits.data_ptr(),
        targets.data_ptr(),
        out.logprobs.data_ptr(),
        out.ranks.data_ptr(),
        out.top_ids.data_ptr(),
        out.top_logprobs.data_ptr(),
        *logits.shape,
        num_top,
        torch.get_num_threads(),
    )
    return out


def _point_processors(call: _Call, batch: SamplingBatch, rows: int) -> None:
    if batch.mask is not None:
        call.point(mask_index=_inverse(batch.mask.rows, rows), mask_bits=batch.mask.bits)
        call.set(mask_words=batch.mask.bits.shape[1])
    if batch.bias is not None:
        call.point(
            bias_index=_inverse(batch.bias.rows, rows),
            bias_ids=batch.bias.token_ids,
            bias_values=batch.bias.values,
        )
        call.set(bias_width=batch.bias.values.shape[1])
    if (penalties := batch.penalties) is not None:
        call.point(
            penalty_index=_inverse(penalties.rows, rows),
            repetition=penalties.repetition,
            frequency=penalties.frequency,
            presence=penalties.presence,
            log_rows=penalties.log_rows,
            prompt_lens=penalties.prompt_lens,
        )
        call.set(log=penalties.log.data_ptr(), log_stride=penalties.log.stride(0))  # a view: never copied


def _inverse(chosen: Tensor, rows: int) -> Tensor:
    """int32 [rows]: where each row is in ``chosen``; -1 = it is not."""
    index = torch.full((rows,), -1, dtype=torch.int32)
    index[chosen] = torch.arange(chosen.shape[0], dtype=torch.int32)
    return index


def _empty_logprobs(count: int, num_top: int) -> Logprobs:
    return Logprobs(
        logprobs=torch.empty(count, dtype=torch.float32),
        ranks=torch.empty(count, dtype=torch.int32),
        top_ids=torch.empty((count, num_top), dtype=torch.int32),
        top_logprobs=torch.empty((count, num_top), dtype=torch.float32),
    )
