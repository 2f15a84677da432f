"""Greedy tokens through the cluster are transformers' tokens, however the work is cut up and spread."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from baton import Client, ClusterStatus, Completion, FinishReason, LocalCluster
from tests.e2e.corpus import MAX_TOKENS, CorpusRequest
from tests.e2e.harness import first_difference, is_idle, options, run_together
from tests.e2e.reference import Reference

# Two tokens whose logits are closer than this are a tie: float32 sums in another order may tell them apart differently.
TIE = 1e-4
MAX_TIES = 1


def run_all(
    checkpoint: Path, requests: Sequence[CorpusRequest], clients: int = 1, **changes: Any
) -> tuple[list[Completion], ClusterStatus]:
    with LocalCluster(options(checkpoint, **changes)) as cluster:
        completions = run_together(cluster.address, requests, clients, temperature=0.0)
        with Client(cluster.address) as client:
            return completions, client.cluster_status()


def assert_reference(
    completions: Sequence[Completion],
    requests: Sequence[CorpusRequest],
    expected: Sequence[tuple[int, ...]],
    reference: Reference,
) -> None:
    ties = []
    for index, (completion, request, tokens) in enumerate(zip(completions, requests, expected, strict=True)):
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.prompt_token_ids == request.prompt
        assert completion.usage.completion_tokens == len(completion.token_ids) == MAX_TOKENS
        if completion.token_ids != tokens:
            position = first_difference(completion.token_ids, tokens)
            gap = reference.gap((*request.prompt, *tokens[:position]))
            ties.append((index, position, gap))
            assert gap < TIE, f"request {index} differs at token {position}, where the best token leads by {gap:g}"
    print(f"near-ties: {ties}")
    assert len(ties) <= MAX_TIES, ties


def test_the_reference_is_worth_comparing_with(greedy_tokens: list[tuple[int, ...]]) -> None:
    assert len(greedy_tokens) == 64
    assert all(len(tokens) == MAX_TOKENS for tokens in greedy_tokens)
    assert len(set(greedy_tokens)) >= 48


@pytest.mark.parametrize("executors", [1, 2])
@pytest.mark.parametrize("run_ahead", ["1", "2", "8"])
def test_any_run_ahead_and_number_of_executors(
    run_ahead: str,
    executors: int,
    checkpoint_f32: Path,
    requests: tuple[CorpusRequest, ...],
    greedy_tokens: list[tuple[int, ...]],
    reference: Reference,
) -> None:
    completions, status = run_all(checkpoint_f32, requests, run_ahead=run_ahead, executors=executors)
    assert_reference(completions, requests, greedy_tokens, reference)
    assert len(status.executors) == executors
    assert all(one.steps > MAX_TOKENS for one in status.executors), "an executor had nothing to do"
    assert is_idle(status)


@pytest.mark.parametrize("run_ahead", ["1", "8"])
def test_preemption(
    run_ahead: str,
    checkpoint_f32: Path,
    requests: tuple[CorpusRequest, ...],
    greedy_tokens: list[tuple[int, ...]],
    reference: Reference,
) -> None:
    completions, status = run_all(checkpoint_f32, requests, run_ahead=run_ahead, num_blocks=60)
    assert_reference(completions, requests, greedy_tokens, reference)
    assert status.executors[0].preemptions > 0
    assert is_idle(status)


def test_chunked_prefill(
    checkpoint_f32: Path,
    requests: tuple[CorpusRequest, ...],
    greedy_tokens: list[tuple[int, ...]],
    reference: Reference,
) -> None:
    completions, status = run_all(checkpoint_f32, requests, max_batched_tokens=48)
    assert_reference(completions, requests, greedy_tokens, reference)
    # The prompts alone need that many steps.
    assert status.executors[0].steps >= sum(len(one.prompt) for one in requests) / 48


def test_api_processes_share_the_port(
    checkpoint_f32: Path,
    requests: tuple[CorpusRequest, ...],
    greedy_tokens: list[tuple[int, ...]],
    reference: Reference,
) -> None:
    completions, _ = run_all(checkpoint_f32, requests, clients=8, api_processes=2)
    assert_reference(completions, requests, greedy_tokens, reference)
