"""Random rows for a sampler, each feature alone and all together."""

import numpy as np

from tests.kernels.sampling_oracle import Row

FEATURES = (
    *("temperature", "top_k", "top_p", "min_p", "repetition", "frequency", "presence", "allowed", "bias"),
    *("greedy", "all"),
)


def random_row(rng: np.random.Generator, vocab_size: int, feature: str) -> Row:
    """A row that uses ``feature``; "greedy" is all processors at temperature 0, "all" is everything."""

    def uses(name: str) -> bool:
        return feature in {name, "all"} or (
            feature == "greedy" and name not in {"temperature", "top_k", "top_p", "min_p"}
        )

    log = tuple(rng.integers(0, vocab_size, int(rng.integers(1, 40))).tolist())
    allowed = None
    if uses("allowed"):
        allowed = frozenset(rng.choice(vocab_size, int(rng.integers(1, vocab_size + 1)), replace=False).tolist())
    bias = {}
    if uses("bias"):
        biased = rng.choice(vocab_size, int(rng.integers(1, min(vocab_size, 6) + 1)), replace=False)
        bias = {int(token): round(float(rng.normal(0, 3)), 2) for token in biased}
    drawn = (
        uses("temperature") or feature in {"top_k", "top_p", "min_p"} or (feature != "greedy" and rng.random() < 0.5)
    )
    return Row(
        temperature=round(float(rng.uniform(0.1, 2.0)), 2) if drawn else 0.0,
        top_k=int(rng.integers(1, vocab_size + 3)) if uses("top_k") else 0,
        top_p=float(np.float32(rng.uniform(0.05, 0.99))) if uses("top_p") else 1.0,
        min_p=float(np.float32(rng.uniform(0.001, 0.5))) if uses("min_p") else 0.0,
        repetition=round(float(rng.uniform(0.5, 2.0)), 2) if uses("repetition") else 1.0,
        frequency=round(float(rng.uniform(-2, 2)), 2) if uses("frequency") else 0.0,
        presence=round(float(rng.uniform(-2, 2)), 2) if uses("presence") else 0.0,
        seed=int(rng.integers(-(2**63), 2**63)),
        position=int(rng.integers(1, len(log) + 1)),
        allowed=allowed,
        bias=bias,
        log=log,
        prompt_len=int(rng.integers(1, len(log) + 1)),
    )
