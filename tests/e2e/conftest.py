"""Checkpoints, the reference, and one cluster that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import Client, LocalCluster
from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from tests.e2e import corpus
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import options
from tests.e2e.reference import Reference

_WEIGHTS_SEED = 1


@pytest.fixture(scope="session")
def checkpoint_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "random-f32"
    write_random_checkpoint(SHAPES["qwen3-tiny"], path, dtype="float32", seed=_WEIGHTS_SEED)
    return path


@pytest.fixture(scope="session")
def checkpoint_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "random-bf16"
    write_random_checkpoint(SHAPES["qwen3-tiny"], path, dtype="bfloat16", seed=_WEIGHTS_SEED)
    return path


@pytest.fixture(scope="session")
def requests() -> tuple[CorpusRequest, ...]:
    return corpus.load()


@pytest.fixture(scope="session")
def reference(checkpoint_f32: Path) -> Reference:
    return Reference(checkpoint_f32)


@pytest.fixture(scope="session")
def greedy_tokens(reference: Reference, requests: tuple[CorpusRequest, ...]) -> list[tuple[int, ...]]:
    """transformers' greedy continuation of every request."""
    return reference.greedy(requests, corpus.MAX_TOKENS)


@pytest.fixture(scope="session")
def cluster(checkpoint_f32: Path) -> Iterator[LocalCluster]:
    """One executor on the float32 checkpoint; leave it as idle as it was."""
    with LocalCluster(options(checkpoint_f32)) as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.address) as connected:
        yield connected
