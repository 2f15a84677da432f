"""Which graph a step runs in, how it is padded into the static buffers, and that the model does not notice.

Captured steps are repeated eagerly here: the same buffers, sizes and slices as with CUDA graphs.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.batches import greedy
from executor_service.batch_dimensions import BatchDimensions, decode_sizes, mixed_sizes, smallest_cover
from executor_service.cuda_graphs import CaptureReport, CudaCapturer, EagerCapturer, GraphUse, graph_sizes
from executor_service.input_batch import InputBatch
from executor_service.metadata.step_buffers import StepBuffers
from executor_service.metrics import ExecutorMetrics
from executor_service.wire import Capacity
from kernels.native.library import available

from .builders import CPU, Server, save_checkpoint


def test_published_lists() -> None:
    """nano-vllm's decode sizes (up to 512 rows) and Megatron-core's prefill sizes for 64 requests and 1024 tokens."""
    assert [size.tokens for size in decode_sizes(512)] == [1, 2, 4, 8, *range(16, 513, 16)]
    assert decode_sizes(64)[-4:] == [BatchDimensions(count, 0, count) for count in (16, 32, 48, 64)]
    assert mixed_sizes(1024, 64, 4) == [BatchDimensions(tokens, 64, 0) for tokens in (256, 512, 768, 1024)]


@pytest.mark.parametrize("max_rows", [1, 3, 8, 12, 100, 256])
def test_every_decode_step_has_a_graph(max_rows: int) -> None:
    """Also where the number of rows is none of the round ones (nano-vllm's StopIteration)."""
    sizes = graph_sizes(2048, max_rows)
    assert len(set(sizes)) == len(sizes)
    for rows in range(1, max_rows + 1):
        step = BatchDimensions(rows, 0, rows)
        size = smallest_cover(sizes, step)
        assert size is not None
        assert size.prefill_requests == 0
        assert rows <= size.tokens <= max(2 * rows, rows + 15)


def test_large_steps_have_no_graph() -> None:
    """As in nano-vllm: with thousands of rows, captures would take minutes for steps that gain nothing by them."""
    sizes = graph_sizes(8192, 4096)
    assert sizes[:-4] == decode_sizes(512)
    assert smallest_cover(sizes, BatchDimensions(513, 0, 513)) is None
    assert smallest_cover(sizes, BatchDimensions(513, 1, 100)) is None
    assert smallest_cover(sizes, BatchDimensions(512, 1, 511)) == BatchDimensions(512, 512, 0)


def test_published_matches() -> None:
    sizes = decode_sizes(64)[-4:] + mixed_sizes(1024, 64, 4)
    assert smallest_cover(sizes, BatchDimensions(3, 0, 3)) == BatchDimensions(16, 0, 16)
    assert smallest_cover(sizes, BatchDimensions(65, 0, 65)) is None
    assert smallest_cover(sizes, BatchDimensions(300, 20, 5)) == BatchDimensions(512, 64, 0)
    assert smallest_cover(sizes, BatchDimensions(1025, 1, 0)) is None
    assert smallest_cover(sizes, BatchDimensions(70, 1, 64)) is None  # more requests than places
    assert smallest_cover([], BatchDimensions(1, 0, 1)) is None


def test_few_tokens_make_few_sizes() -> None:
    assert mixed_sizes(20, 64, 4) == [BatchDimensions(8, 8, 0), BatchDimensions(16, 16, 0), BatchDimensions(20, 20, 0)]


def worked_example() -> InputBatch:
    """Block size 4, dummy block 9: A and B decode at positions 5 and 8, C runs a prompt of 6."""
    starts, lengths = np.array([0, 1, 2, 8], np.int32), np.array([6, 9, 6], np.int32)
    return InputBatch(
        dimensions=BatchDimensions(8, 1, 2),
        input_ids=torch.tensor([6, 19, 21, 22, 23, 24, 25, 26]),
        positions=torch.tensor([5, 8, 0, 1, 2, 3, 4, 5]),
        slot_mapping=torch.tensor([21, 12, 4, 5, 6, 7, 24, 25]),
        query_start_loc=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lengths),
        block_tables=torch.tensor([[2, 5, 9], [0, 7, 3], [1, 6, 9]], dtype=torch.int32),
        sample_indices=torch.tensor([0, 1, 7]),
        sampling=greedy(3),
        host_query_start_loc=starts,
        host_seq_lens=lengths,
    )


def test_the_worked_example_padded() -> None:
    buffers = StepBuffers(max_tokens=32, max_requests=6, max_blocks=4, dummy_block=9, block_size=4, device=CPU)
    view = buffers.view(BatchDimensions(16, 2, 2))
    buffers.load(worked_example())
    assert view.input_ids.tolist() == [6, 19, 21, 22, 23, 24, 25, 26, *[0] * 8]
    assert view.positions.tolist() == [5, 8, 0, 1, 2, 3, 4, 5, *[0] * 8]
    assert view.slot_mapping.tolist()[:8] == [21, 12, 4, 5, 6, 7, 24, 25]
    assert {slot // 4 for slot in view.slot_mapping.tolist()[8:]} == {9}
    assert view.lengths.query_start_loc.tolist() == view.host_query_start_loc.tolist() == [0, 1, 2, 8, 8]
    assert view.lengths.key_start_loc.tolist() == [0, 6, 15, 21, 21]
    assert view.lengths.seq_lens.tolist() == view.host_seq_lens.tolist() == [6, 9, 6, 0]
    assert view.block_tables.tolist() == [[2, 5, 9, 9], [0, 7, 3, 9], [1, 6, 9, 9], [9, 9, 9, 9]]
    assert (view.lengths.max_query_len, view.lengths.max_seq_len) == (16, 16)


def test_nothing_of_an_earlier_step_is_left() -> None:
    """At the same addresses, after larger and smaller steps in any order."""
    buffers = StepBuffers(max_tokens=32, max_requests=6, max_blocks=4, dummy_block=9, block_size=4, device=CPU)
    view = buffers.view(BatchDimensions(32, 6, 0))
    tensors = (view.input_ids, view.positions, view.slot_mapping, view.block_tables)
    addresses = [tensor.data_ptr() for tensor in tensors]
    small = worked_example()
    one = InputBatch(
        dimensions=BatchDimensions(1, 0, 1),
        input_ids=torch.tensor([7]),
        positions=torch.tensor([15]),
        slot_mapping=torch.tensor([3]),
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([16], dtype=torch.int32),
        block_tables=torch.tensor([[8, 8, 8, 0]], dtype=torch.int32),
        sample_indices=torch.tensor([0]),
        sampling=greedy(1),
        host_query_start_loc=np.array([0, 1], np.int32),
        host_seq_lens=np.array([16], np.int32),
    )
    for batch in (small, one, small, one):
        buffers.load(batch)
        tokens, (rows, blocks) = batch.dimensions.tokens, batch.block_tables.shape
        assert view.input_ids.tolist() == batch.input_ids.tolist() + [0] * (32 - tokens)
        assert view.positions[tokens:].tolist() == [0] * (32 - tokens)
        assert {slot // 4 for slot in view.slot_mapping[tokens:].tolist()} == {9}
        assert torch.equal(view.block_tables[:rows, :blocks], batch.block_tables)
        assert {*view.block_tables[rows:].flatten().tolist(), *view.block_tables[:, blocks:].flatten().tolist()} == {9}
        assert view.lengths.seq_lens[rows:].tolist() == [0] * (6 - rows)
        assert set(view.lengths.query_start_loc[rows:].tolist()) == {tokens}
    assert [tensor.data_ptr() for tensor in tensors] == addresses


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs")
    save_checkpoint(path, "qwen3")
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_replayed_steps_are_the_eager_ones(checkpoint: Path, dtype: torch.dtype) -> None:
    """Prefills, chunks, decodes and mixtures of all sizes, through one runner with graphs and one without."""
    eager, graphed = (Server.start(checkpoint, dtype, num_blocks=300) for _ in range(2))
    sizes = [*decode_sizes(8), *mixed_sizes(48, 8, 2)]
    report = graphed.runner.capture(sizes, max_blocks=32, capturer=EagerCapturer())
    assert report.graphs == len(sizes)
    covered = []
    run = graphed.runner._graphs.run  # type: ignore[union-attr]

    def watched(batch: InputBatch) -> torch.Tensor | None:
        hidden = run(batch)
        covered.append(hidden is not None)
        return hidden

    graphed.runner._graphs.run = watched  # type: ignore[union-attr, method-assign]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 199, size).tolist() for size in (60, 30, 3, 17, 45, 9, 1, 22, 11)]
    servers = (eager, graphed)
    runs = [[server.admit(tokens) for tokens in prompts] for server in servers]
    while any(one.computed < len(one.tokens) for one in runs[0]):
        waiting = [i for i, one in enumerate(runs[0]) if one.computed < len(one.tokens)]
        chosen = rng.permutation(waiting)[: rng.integers(1, 10)]
        only_decodes = bool(rng.integers(0, 2))
        counts = [
            1 if only_decodes else int(rng.integers(1, len(prompts[i]) - runs[0][i].computed + 1)) for i in chosen
        ]
        results = [
            server.step([(those[i], count) for i, count in zip(chosen, counts, strict=True)])
            for server, those in zip(servers, runs, strict=True)
        ]
        for expected, logits in zip(*results, strict=True):
            if dtype == torch.bfloat16 and available():
                assert torch.equal(logits, expected)
            else:  # the reference's matrix products depend on the number of rows
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert {True, False} == set(covered)
    assert (report.use.replayed, report.use.eager) == (covered.count(True), covered.count(False))


def test_how_often_graphs_are_used_is_exported() -> None:
    metrics = ExecutorMetrics()
    capacity = Capacity("e", "m", "", "", "cuda", "bfloat16", 10, 20, 4, 30, 2, 8, ())
    use = GraphUse()
    metrics.describe(capacity, 0, CaptureReport(3, 1.5, 100, use))
    use.replayed, use.eager = 5, 2
    sample = metrics.registry.get_sample_value
    assert sample("baton_executor_graph_steps_total", {"run": "replayed"}) == 5
    assert sample("baton_executor_graph_steps_total", {"run": "eager"}) == 2
    assert sample("baton_executor_graph_capture_seconds") == 1.5


def test_another_cache_has_no_graphs(checkpoint: Path) -> None:
    server = Server.start(checkpoint, torch.float32)
    server.runner.capture(decode_sizes(2), max_blocks=4, capturer=EagerCapturer())
    assert server.runner._graphs is not None
    server.runner.use_cache(server.cache)
    assert server.runner._graphs is None


def test_what_torch_keeps_for_later_is_not_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures give it back: a report of memory before and after them could be negative."""
    reserved = {"weights": 100, "cached": 30}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserved.update(cached=0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: sum(reserved.values()))
    assert CudaCapturer(torch.device("cuda")).memory() == 100
