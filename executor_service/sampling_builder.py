"""From the state of rows to the sampler's input: parameters, processors, audits, prompt log probabilities."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_service.input_batch import Audit, GrammarMasks, LogAppend, PromptTargets
from executor_service.masks import Masks, MaskSource
from executor_service.sampler import SLICE
from executor_service.sampling_state import SamplingState
from executor_service.step_plan import Int32s
from executor_service.step_report import PromptPart
from executor_service.upload import Uploader
from kernels.sampling import LogprobRequest, Penalties, SamplingBatch, TokenBias, TokenMask

_Rows = NDArray[np.int64]
_NO_ROWS = np.zeros(0, np.int64)
_ALL_ALLOWED = -1  # every bit of a word


@dataclass(frozen=True, slots=True, eq=False)
class ComputedTokens:
    """The T tokens a step computes, in plan order: the row and the absolute position of each, int64 [T]."""

    rows: _Rows
    positions: _Rows


@dataclass(frozen=True, slots=True, eq=False)
class _Parameters:
    """Of some rows; see ``SamplingBatch``."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool


class SamplingBuilder:
    """Builds ``SamplingBatch``es and what goes with them. Features that no row uses cost nothing."""

    def __init__(self, state: SamplingState, upload: Uploader) -> None:
        self._state = state
        self._upload = upload
        self._key = (-1, b"")  # of which version and rows ``_last`` are the parameters
        self._last: _Parameters

    def batch(
        self, rows: _Rows, positions: _Rows, grammar_rows: _Rows = _NO_ROWS, report: bool = True
    ) -> SamplingBatch:
        """Sample ``rows`` for ``positions``, both [S]. ``grammar_rows`` are indices whose mask will be narrowed.

        ``report`` False leaves out log probabilities.
        """
        state, upload, params = self._state, self._upload, self._parameters(rows)
        plain = SamplingBatch(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            position=upload(positions),
            all_greedy=params.all_greedy,
            any_top_k=params.any_top_k,
            any_top_p=params.any_top_p,
        )
        if not state.any_special:
            return plain
        min_p = state.min_p[rows]
        return SamplingBatch(
            temperature=plain.temperature,
            top_k=plain.top_k,
            top_p=plain.top_p,
            seed=plain.seed,
            position=plain.position,
            all_greedy=plain.all_greedy,
            any_top_k=plain.any_top_k,
            any_top_p=plain.any_top_p,
            min_p=upload(min_p) if min_p.any() else None,
            mask=self._mask(rows, positions, grammar_rows),
            bias=self._bias(rows),
            penalties=self._penalties(rows, positions),
            logprobs=self._logprobs(rows) if report else None,
        )

    def _parameters(self, rows: _Rows) -> _Parameters:
        """Of ``rows``; those of the last step are kept, since most steps sample the same rows."""
        state, upload, key = self._state, self._upload, (self._state.version, rows.tobytes())
        if key != self._key:
            temperature, top_k, top_p = state.temperature[rows], state.top_k[rows], state.top_p[rows]
            self._last = _Parameters(
                temperature=upload(temperature),
                top_k=upload(top_k),
                top_p=upload(top_p),
                seed=upload(state.seed[rows]),
                all_greedy=bool((temperature == 0).all()),
                any_top_k=bool((top_k > 0).any()),
                any_top_p=bool((top_p < 1).any()),
            )
            self._key = key
        return self._last

    def grammar(self, masks: Masks, sampling: SamplingBatch) -> GrammarMasks:
        """Where ``masks`` go in the mask of ``sampling``, which was built with their rows."""
        assert sampling.mask is not None
        rows = self._upload(masks.rows)
        self._upload.send()
        return GrammarMasks(masks, torch.searchsorted(sampling.mask.rows, rows))

    def logprob_counts(self, rows: _Rows) -> Int32s:
        """How many most likely ids each of ``rows`` wants, of those that report log probabilities."""
        counts = self._state.num_logprobs[rows]
        return counts[counts >= 0]

    def log_append(self, rows: _Rows, positions: _Rows) -> LogAppend | None:
        """Where the tokens that ``rows`` sample for ``positions`` go; None when none of them keeps a log."""
        chosen = np.flatnonzero(self._state.has_penalties[rows])
        if chosen.size == 0:
            return None
        return LogAppend(self._upload(chosen), self._upload(rows[chosen]), self._upload(positions[chosen]))

    def _mask(self, rows: _Rows, positions: _Rows, grammar_rows: _Rows) -> TokenMask | None:
        state, upload = self._state, self._upload
        listed = state.has_mask[rows]
        min_tokens = state.min_tokens[rows]
        unfinished = (min_tokens > 0) & (positions - state.prompt_len[rows] < min_tokens)
        masked = listed | unfinished
        masked[grammar_rows] = True
        chosen = np.flatnonzero(masked)
        if chosen.size == 0:
            return None
        listed_at, open_at = np.flatnonzero(listed[chosen]), np.flatnonzero(unfinished[chosen])
        bits = torch.full((chosen.size, state.num_words), _ALL_ALLOWED, dtype=torch.int32, device=upload.device)
        mask = TokenMask(upload(chosen), bits)
        where, owners = upload(listed_at), upload(rows[chosen[listed_at]])
        open_where, open_owners = upload(open_at), upload(rows[chosen[open_at]])
        upload.send()
        if listed_at.size:
            bits.index_copy_(0, where, state.permitted.take(owners))
        if open_at.size:
            open_bits = bits.index_select(0, open_where) & ~state.stops.take(open_owners)
            bits.index_copy_(0, open_where, open_bits)
        return mask

    def _bias(self, rows: _Rows) -> TokenBias | None:
        state, upload = self._state, self._upload
        chosen = np.flatnonzero(state.has_bias[rows])
        if chosen.size == 0:
            return None
        width = int(state.bias_sizes[rows[chosen]].max())
        where, biased = upload(rows[chosen]), upload(chosen)
        upload.send()
        return TokenBias(biased, state.bias_ids.take(where)[:, :width], state.bias_values.take(where)[:, :width])

    def _penalties(self, rows: _Rows, positions: _Rows) -> Penalties | None:
        state, upload = self._state, self._upload
        chosen = np.flatnonzero(state.has_penalties[rows])
        if chosen.size == 0:
            return None
        penalised = rows[chosen]
        return Penalties(
            rows=upload(chosen),
            repetition=upload(state.repetition[penalised]),
            frequency=upload(state.frequency[penalised]),
            presence=upload(state.presence[penalised]),
            log=state.log.tensor[:, : int(positions[chosen].max())],
            log_rows=upload(penalised),
            prompt_lens=upload(state.prompt_len[penalised]),
        )

    def _logprobs(self, rows: _Rows) -> LogprobRequest | None:
        counts = self._state.num_logprobs[rows]
        chosen = np.flatnonzero(counts >= 0)
        if chosen.size == 0:
            return None
        processed = self._state.processed_logprobs[rows[chosen]]
        return LogprobRequest(self._upload(chosen), self._upload(processed), int(counts[chosen].max()))

    def prompt_targets(self, tokens: ComputedTokens) -> tuple[PromptTargets | None, tuple[PromptPart, ...]]:
        """Prompt tokens whose log probabilities the step yields, and whose they are."""
        state, following = self._state, tokens.positions + 1
        wanted = state.num_prompt_logprobs[tokens.rows]
        indices = np.flatnonzero((wanted >= 0) & (following < state.prompt_len[tokens.rows]))
        if indices.size == 0:
            return None, ()
        rows, positions = tokens.rows[indices], following[indices]
        expected = state.known_tokens(rows, positions).astype(np.int64)
        targets = PromptTargets(self._upload(indices), self._upload(expected), int(wanted[indices].max()))
        begins = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
        counts = np.diff(np.r_[begins, rows.size])
        parts = zip(rows[begins], positions[begins], counts, wanted[indices[begins]], strict=True)
        return targets, tuple(PromptPart(*map(int, part)) for part in parts)

    def audits(self, tokens: ComputedTokens, source: MaskSource) -> tuple[tuple[Audit, ...], Int32s]:
        """Tokens of the log to sample again, cut into slices, and the row of each. ``source`` knows their grammars."""
        state, following = self._state, tokens.positions + 1
        first = state.audit_from[tokens.rows]
        audited = (first > 0) & (following >= first) & (following < state.known_len[tokens.rows])
        indices = np.flatnonzero(audited)
        slices = tuple(self._audit(tokens, indices[i : i + SLICE], source) for i in range(0, indices.size, SLICE))
        return slices, tokens.rows[indices].astype(np.int32)

    def _audit(self, tokens: ComputedTokens, indices: _Rows, source: MaskSource) -> Audit:
        rows, positions = tokens.rows[indices], tokens.positions[indices] + 1
        expected = self._state.known_tokens(rows, positions).astype(np.int64)
        at = np.flatnonzero(self._state.has_grammar[rows])
        sampling = self.batch(rows, positions, at, report=False)
        grammar = self.grammar(source.audit(at, rows[at], positions[at]), sampling) if at.size else None
        return Audit(self._upload(indices), self._upload(expected), sampling, grammar)
