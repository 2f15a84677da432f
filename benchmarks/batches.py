"""What steps that are measured without a scheduler run on."""

import torch

from kernels.sampling import SamplingBatch


def greedy(rows: int) -> SamplingBatch:
    """Rows that take the most likely id."""
    zeros = torch.zeros(rows)
    return SamplingBatch(
        temperature=zeros,
        top_k=zeros.int(),
        top_p=torch.ones(rows),
        seed=zeros.long(),
        position=zeros.long(),
        all_greedy=True,
        any_top_k=False,
        any_top_p=False,
    )
