"""Sizes of steps and their padding."""

import torch

from executor_service.batch_dimensions import BatchDimensions, pad_tokens, token_rounder


def test_dimensions_are_ordered() -> None:
    """By tokens, then prefill requests, then decode requests: the smallest that covers a step is a minimum."""
    sizes = [BatchDimensions(8, 2, 1), BatchDimensions(8, 1, 2), BatchDimensions(4, 4, 0), BatchDimensions(8, 1, 1)]
    assert sorted(sizes) == [sizes[2], sizes[3], sizes[1], sizes[0]]
    assert BatchDimensions(8, 1, 2).requests == 3


def test_padding() -> None:
    assert [pad_tokens(count, 8) for count in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert token_rounder(torch.device("cpu"), torch.float32, 2) == 8
    assert token_rounder(torch.device("cpu"), torch.float16, 2) == 4
    assert token_rounder(torch.device("cuda"), torch.bfloat16, 2) == 1
