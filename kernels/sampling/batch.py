"""What a sampler is asked to do, and what it answers; tensors lie on the device of the logits."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenMask:
    """M of the rows may sample only ids whose bit is set: bit b of word w is id 32 * w + b."""

    rows: Tensor  # int64 [M], ascending
    bits: Tensor  # int32 [M, ceil(V / 32)]


@dataclass(frozen=True, slots=True)
class TokenBias:
    """What is added to the logits of B of the rows. Shorter rows are filled up with id 0, value 0."""

    rows: Tensor  # int64 [B], ascending
    token_ids: Tensor  # int32 [B, W]; but for filling, no id twice in a row
    values: Tensor  # float32 [B, W]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of P of the rows, for tokens before the position being sampled: ``log[log_rows[i], :position]``."""

    rows: Tensor  # int64 [P], ascending
    repetition: Tensor  # float32 [P]; 1 = none
    frequency: Tensor  # float32 [P]; 0 = none
    presence: Tensor  # float32 [P]; 0 = none
    log: Tensor  # int32 [R, L], inner stride 1
    log_rows: Tensor  # int64 [P]
    prompt_lens: Tensor  # int32 [P]: tokens before it are prompt, which frequency and presence do not see


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """Log probabilities that N of the rows ask for."""

    rows: Tensor  # int64 [N], ascending
    processed: Tensor  # bool [N]: of the distribution sampled from, not of softmax(logits)
    num_top: int  # how many of the most likely ids


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters, one entry per sampled row (S rows, unpadded). None: no row uses it."""

    temperature: Tensor  # float32 [S]; 0 = greedy
    top_k: Tensor  # int32 [S]; 0 = all
    top_p: Tensor  # float32 [S]; 1 = all
    seed: Tensor  # int64 [S]: bit pattern of the uint64 seed
    position: Tensor  # int64 [S]: absolute position (prompt and output) of the token being sampled
    # Host flags, so that nothing is computed that no row uses.
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    min_p: Tensor | None = None  # float32 [S]; 0 = all
    mask: TokenMask | None = None
    bias: TokenBias | None = None
    penalties: Penalties | None = None
    logprobs: LogprobRequest | None = None

    @property
    def has_processors(self) -> bool:
        """Whether any row's logits change before it samples."""
        return self.mask is not None or self.bias is not None or self.penalties is not None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log probabilities of N tokens. Rank 1 is the most likely; 0 where the logits were not finite."""

    logprobs: Tensor  # float32 [N]; NaN where rank is 0
    ranks: Tensor  # int32 [N]: 1 + ids that are more likely
    top_ids: Tensor  # int32 [N, num_top], best first, the lowest of equals first
    top_logprobs: Tensor  # float32 [N, num_top]; -inf where there is no such id


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row."""

    token_ids: Tensor  # int64 [S]; 0 where row_ok is False
    row_ok: Tensor  # bool [S]
    logprobs: Logprobs | None
