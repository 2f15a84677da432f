"""The sampler's definition once more: one row at a time, in float64 and plain Python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.sampling import LogprobRequest, Penalties, SamplingBatch, TokenBias, TokenMask

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Row:
    """What one row asks for; ``log`` is prompt and output, of which the row sees what lies before ``position``."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = 0
    position: int = 0
    allowed: frozenset[int] | None = None
    bias: dict[int, float] = field(default_factory=dict)
    log: tuple[int, ...] = ()
    prompt_len: int = 0

    @property
    def penalised(self) -> bool:
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)


def process(logits: Sequence[float], row: Row) -> list[float]:
    """Logits after mask, bias and penalties."""
    values = [float(value) for value in logits]
    for token in range(len(values)):
        if row.allowed is not None and token not in row.allowed:
            values[token] = -math.inf
    for token, bias in row.bias.items():
        values[token] += bias
    past = row.log[: row.position]
    output = past[row.prompt_len :]
    for token in set(past):
        value = values[token]
        values[token] = value / row.repetition if value > 0 else value * row.repetition
    for token in set(output):
        values[token] -= row.frequency * output.count(token)
        values[token] -= row.presence
    return values


def distribution(logits: Sequence[float], row: Row, slack: float = 0.0) -> dict[int, float]:
    """Log probability of each id that may be sampled; for a greedy row of each that the processors left.

    ``slack`` widens (or, negative, narrows) the nucleus and min_p a little, for borders that rounding decides.
    """
    values = process(logits, row)
    peak = max(values)
    temperature = row.temperature or 1.0
    scaled = {token: (value - peak) / temperature for token, value in enumerate(values) if value > -math.inf}
    if row.temperature:
        ranked = sorted(scaled.values(), reverse=True)
        if 0 < row.top_k < len(ranked):
            scaled = {token: value for token, value in scaled.items() if value >= ranked[row.top_k - 1] - 1e-6}
        if row.top_p < 1:
            total = math.fsum(math.exp(value) for value in scaled.values())
            least = _nucleus(scaled, (row.top_p + slack) * total)
            scaled = {token: value for token, value in scaled.items() if value >= least - 1e-6}
        if row.min_p > 0:
            scaled = {token: value for token, value in scaled.items() if value >= math.log(row.min_p) - slack - 1e-7}
    log_sum = math.log(math.fsum(math.exp(value) for value in scaled.values()))
    return {token: value - log_sum for token, value in scaled.items()}


def _nucleus(scaled: dict[int, float], limit: float) -> float:
    """The least value that stays: the mass of all greater ones is below the limit."""
    mass = 0.0
    least = 0.0
    for value in sorted(scaled.values(), reverse=True):
        if mass >= limit:
            break
        least = value
        mass += math.exp(value)
    return least


def splitmix(z: int) -> int:
    """SplitMix64's finaliser in plain integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def noise(seed: int, position: int, token: int) -> float:
    """The documented Gumbel noise."""
    key = splitmix((splitmix(seed & MASK) + GOLDEN * (position + 1)) & MASK)
    uniform = ((splitmix((key + GOLDEN * (token + 1)) & MASK) >> 24) + 0.5) * 2.0**-40
    return -math.log(-math.log1p(-uniform))


def scores(logits: Sequence[float], row: Row) -> dict[int, float]:
    """What the sampled id has the greatest of."""
    possible = distribution(logits, row)
    if not row.temperature:
        return possible
    return {token: value + noise(row.seed, row.position, token) for token, value in possible.items()}


def batch_of(rows: Sequence[Row], vocab_size: int, num_top: int | None = None) -> SamplingBatch:
    """The rows as a sampler takes them; with ``num_top`` odd ones report processed log probabilities."""
    longest = max((len(row.log) for row in rows), default=0)
    log = torch.zeros(len(rows) + 1, longest + 3, dtype=torch.int32)  # one row and some columns nobody uses
    for index, row in enumerate(rows):
        log[index, : len(row.log)] = torch.tensor(row.log, dtype=torch.int32)
    return SamplingBatch(
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        top_k=torch.tensor([row.top_k for row in rows], dtype=torch.int32),
        top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float32),
        seed=torch.tensor([row.seed for row in rows], dtype=torch.int64),
        position=torch.tensor([row.position for row in rows], dtype=torch.int64),
        all_greedy=not any(row.temperature for row in rows),
        any_top_k=any(row.top_k for row in rows),
        any_top_p=any(row.top_p < 1 for row in rows),
        min_p=torch.tensor([row.min_p for row in rows]) if any(row.min_p for row in rows) else None,
        mask=_mask(rows, vocab_size),
        bias=_bias(rows),
        penalties=_penalties(rows, log[:, : longest + 1]),
        logprobs=None
        if num_top is None
        else LogprobRequest(torch.arange(len(rows)), torch.arange(len(rows)) % 2 == 1, num_top),
    )


def _mask(rows: Sequence[Row], vocab_size: int) -> TokenMask | None:
    chosen = [index for index, row in enumerate(rows) if row.allowed is not None]
    if not chosen:
        return None
    bits = np.ones((len(chosen), -(-vocab_size // 32) * 32), np.bool_)  # those past the vocabulary mean nothing
    for at, index in enumerate(chosen):
        bits[at, :vocab_size] = [token in (rows[index].allowed or ()) for token in range(vocab_size)]
    packed = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    return TokenMask(torch.tensor(chosen), torch.from_numpy(packed.copy()))


def _bias(rows: Sequence[Row]) -> TokenBias | None:
    chosen = [index for index, row in enumerate(rows) if row.bias]
    if not chosen:
        return None
    width = max(len(row.bias) for row in rows)
    ids, values = torch.zeros(len(chosen), width, dtype=torch.int32), torch.zeros(len(chosen), width)
    for at, index in enumerate(chosen):
        bias = rows[index].bias
        ids[at, : len(bias)] = torch.tensor(list(bias))
        values[at, : len(bias)] = torch.tensor(list(bias.values()))
    return TokenBias(torch.tensor(chosen), ids, values)


def _penalties(rows: Sequence[Row], log: torch.Tensor) -> Penalties | None:
    chosen = [index for index, row in enumerate(rows) if row.penalised]
    if not chosen:
        return None
    return Penalties(
        rows=torch.tensor(chosen),
        repetition=torch.tensor([rows[index].repetition for index in chosen]),
        frequency=torch.tensor([rows[index].frequency for index in chosen]),
        presence=torch.tensor([rows[index].presence for index in chosen]),
        log=log,
        log_rows=torch.tensor(chosen),
        prompt_lens=torch.tensor([rows[index].prompt_len for index in chosen], dtype=torch.int32),
    )
