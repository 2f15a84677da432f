"""The least that workloads can take: what is counted, and that it can be measured."""

import dataclasses
from pathlib import Path

import pytest

from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from benchmarks.floor import Curve, PrefixBlocks, Speeds, Step, floor, neighbours, schedule
from benchmarks.floor_meter import FloorMeter
from benchmarks.workloads import WORKLOADS, Request
from executor_service.models.config import ModelConfig, load_config


def _prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(SHAPES["qwen3-tiny"], directory, dtype="bfloat16")
    return directory


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> ModelConfig:
    return dataclasses.replace(load_config(checkpoint), num_hidden_layers=3)


def test_prompts_fill_steps_then_all_decode() -> None:
    requests = [Request(_prompt(5), 3), Request(_prompt(4, 100), 1), Request(_prompt(2, 200), 2)]
    assert schedule(requests, PrefixBlocks(), 8) == [
        Step(rows=8, sampled=1, stored=0, pairs=15 + 6, last_pairs=5),
        Step(rows=3, sampled=2, stored=3, pairs=4 + 3, last_pairs=4 + 2),
        Step(rows=2, sampled=2, stored=5 + 2, pairs=6 + 3, last_pairs=6 + 3),
        Step(rows=1, sampled=1, stored=6, pairs=7, last_pairs=7),
    ]


def test_what_prompts_share_is_computed_and_read_once() -> None:
    common = _prompt(40)
    requests = [Request(common + _prompt(3, 100 * n), 2) for n in (1, 2)]
    first, decode = schedule(requests, PrefixBlocks(), 100)
    assert first.rows == 43 + 43 - 32  # two full blocks of 16
    assert decode.stored == 32 + 2 * 11
    assert schedule(requests, PrefixBlocks(), 100)[0] == first  # nothing is kept elsewhere


def test_a_later_burst_finds_what_an_earlier_one_had() -> None:
    prefixes = PrefixBlocks()
    whole = [Request(_prompt(48), 1)]
    assert [step.rows for step in schedule(whole, prefixes, 100)] == [48]
    (again,) = schedule(whole, prefixes, 100)
    assert (again.rows, again.sampled, again.stored) == (16, 1, 32)  # the last block: one token at least is computed


def test_rows_of_the_workloads() -> None:
    expected = {"W1": (8959 + 5385 - 64, 5385), "W2": (32 + 127, 128), "W3": (1024, 1)}
    expected |= dict.fromkeys(("W4", "W4w"), (512 + 32 * 32 + 32 * 15, 512))
    for name, (rows, sampled) in expected.items():
        prefixes = PrefixBlocks()
        steps = [step for burst in WORKLOADS[name].bursts(0) for step in schedule(burst, prefixes, 2048)]
        assert (sum(step.rows for step in steps), sum(step.sampled for step in steps)) == (rows, sampled)


def test_curves_are_straight_between_what_was_measured() -> None:
    assert [neighbours(rows) for rows in (1, 5, 6, 20, 767, 2048)] == [
        (1, 1),
        (4, 6),
        (6, 6),
        (16, 24),
        (512, 768),
        (2048, 2048),
    ]
    curve = Curve({4: 1.0, 6: 2.0})
    assert [curve.at(rows) for rows in (0, 4, 5, 6)] == [0.0, 1.0, 1.5, 2.0]
    with pytest.raises(KeyError):
        curve.at(7)


def test_the_sum(config: ModelConfig) -> None:
    """Three layers: two with all rows, one with those that are sampled, and keys and values of the others."""

    def curve(seconds: float) -> Curve:
        return Curve({rows: seconds * rows for rows in (1, 2, 3, 4, 6, 8)})

    speeds = Speeds(curve(1.0), curve(0.1), curve(10.0), read_rate=1e3, flop_rate=1e3)
    found = floor([Step(rows=8, sampled=2, stored=5, pairs=20, last_pairs=7)], config, speeds)
    assert found.products == pytest.approx(2 * 8 + 2 + 6 * 0.1 + 2 * 10)
    assert found.attention_reads == pytest.approx(5 * 3 * 4 * config.num_key_value_heads * config.head_dim / 1e3)
    assert found.attention_flops == pytest.approx(47 * 4 * config.num_attention_heads * config.head_dim / 1e3)
    assert found.total == found.products + max(found.attention_reads, found.attention_flops)


def test_it_is_measured(checkpoint: Path) -> None:
    found = FloorMeter(checkpoint, 64).measure([[Request(_prompt(70), 3)], [Request(_prompt(5, 300), 1)]])
    assert found.weights_read > 0
    assert 0 < found.products < found.total
