"""An executor without its link: plans from the wire, a real model, its results."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from baton_protos import execution_pb2 as pb
from executor_service.batch_builder import BatchBuilder
from executor_service.batch_dimensions import token_rounder
from executor_service.block_tables import BlockTables
from executor_service.executor import StepLauncher
from executor_service.kv_cache import KVCache
from executor_service.masks import MaskSource
from executor_service.model_runner import ModelRunner
from executor_service.plan_applier import PlanApplier, PlanLimits
from executor_service.row_state import RowState
from executor_service.step_output import HostStepOutput
from executor_service.step_report import HostOutput
from executor_service.weights import load_model
from tests.executor_process.rig import decoded
from tests.executor_process.scheduler_stub import PlanMaker, int32s

CPU = torch.device("cpu")
BLOCK_SIZE = 4
MAX_LEN = 300
ROWS = 8
_BLOCKS_PER_ROW = MAX_LEN // BLOCK_SIZE + 1


class Serving:
    """One executor and the plans of its only epoch. Row r has all its blocks from its admission on."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32, masks: MaskSource | None = None) -> None:
        model = load_model(checkpoint, CPU, dtype)
        vocab_size = model.config.vocab_size
        cache = KVCache.allocate(model.config, ROWS * _BLOCKS_PER_ROW, BLOCK_SIZE, CPU, dtype)
        self.rows = RowState(ROWS, MAX_LEN, vocab_size, CPU)
        tables = BlockTables(ROWS, _BLOCKS_PER_ROW, cache.num_blocks, BLOCK_SIZE)
        self._launcher = StepLauncher(
            self.rows,
            PlanApplier(PlanLimits(ROWS, 2 * MAX_LEN, MAX_LEN, vocab_size), self.rows, tables),
            BatchBuilder(self.rows, tables, CPU, token_rounder(CPU, dtype, torch.get_num_threads())),
            ModelRunner(model, cache),
            HostStepOutput,
            masks,
        )
        self._maker = PlanMaker(BLOCK_SIZE)

    def step(
        self,
        admit: Sequence[pb.Admission] = (),
        decode: Sequence[int] = (),
        prefill: dict[int, list[int]] | None = None,
        release: Sequence[int] = (),
        sample: bool = True,
    ) -> HostOutput:
        """Plan and run one step."""
        blocks = {
            one.row: (list(range(one.row * _BLOCKS_PER_ROW, (one.row + 1) * _BLOCKS_PER_ROW)), one.sampling)
            for one in admit
        }
        plan = self._maker.plan(
            release=list(release), admit=blocks, decode=list(decode), prefill=prefill or {}, sample=sample
        )
        for planned, wanted in zip(plan.admissions, admit, strict=True):
            planned.prompt_len, planned.audit_from = wanted.prompt_len, wanted.audit_from
            planned.token_ids = wanted.token_ids
        return self._launcher.launch(decoded(plan)).wait()

    def generate(
        self, row: int, log: Sequence[int], prompt_len: int, sampling: pb.RowSampling, count: int
    ) -> list[int]:
        """``count`` more tokens after ``log``, on ``row`` alone, which is free before and after."""
        tokens = list(log)
        output = self.step(admit=[admission(row, log, prompt_len, sampling)], prefill={row: tokens})
        tokens.append(int(output.token_ids[0]))
        while len(tokens) < len(log) + count:
            tokens.append(int(self.step(decode=[row]).token_ids[0]))
        self.step(release=[row])
        return tokens[len(log) :]


def admission(
    row: int, log: Sequence[int], prompt_len: int, sampling: pb.RowSampling, audit_from: int = 0
) -> pb.Admission:
    """A request with its whole log."""
    return pb.Admission(
        row=row, sampling=sampling, prompt_len=prompt_len, token_ids=int32s(list(log)), audit_from=audit_from
    )


def random_sampling(rng: np.random.Generator, vocab_size: int) -> pb.RowSampling:
    """Some features on, some off; always drawn by chance or greedy after processors."""

    def ids(count: int) -> bytes:
        return int32s(rng.choice(vocab_size, count, replace=False).tolist())

    def sometimes(value: float) -> float:
        return value if rng.random() < 0.6 else 0.0

    sampling = pb.RowSampling(
        temperature=sometimes(float(rng.uniform(0.3, 1.5))),
        top_k=int(sometimes(50)),
        top_p=0.9 if rng.random() < 0.6 else 1.0,
        min_p=sometimes(0.01),
        repetition_penalty=sometimes(1.3),
        frequency_penalty=sometimes(0.4),
        presence_penalty=sometimes(-0.3),
        seed=int(rng.integers(0, 1 << 62)),
        banned_token_ids=ids(int(sometimes(9))),
        allowed_token_ids=ids(int(sometimes(150))),
        min_tokens=int(sometimes(6)),
        stop_token_ids=ids(3),
    )
    if rng.random() < 0.6:
        sampling.bias_token_ids = ids(5)
        sampling.bias_values = rng.normal(0, 2, 5).astype("<f4").tobytes()
    if rng.random() < 0.6:
        sampling.num_logprobs = int(rng.integers(0, 8))
        sampling.processed_logprobs = bool(rng.random() < 0.5)
    if rng.random() < 0.3:
        sampling.num_prompt_logprobs = 2
    return sampling
