"""``--quantization``: a cluster serves int8 weights, and its tokens are those of the same model in this process."""

from pathlib import Path

import pytest
import torch

from baton import LLM, ClusterError, SamplingParams
from kernels.native.library import available
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import DEFAULTS
from tests.executor.builders import Server

TOKENS = 12


def greedy(server: Server, tokens: tuple[int, ...]) -> tuple[int, ...]:
    run = server.admit([*tokens, *[0] * TOKENS])
    run.tokens, count = list(tokens), len(tokens)
    for _ in range(TOKENS):
        sampled = server.runner.run(server.batch([(run, count)], last_only=True))
        run.computed, count = run.computed + count, 1
        run.tokens.append(int(sampled.token_ids[0]))
    server.release(run)
    return tuple(run.tokens[len(tokens) :])


@pytest.mark.skipif(not available(), reason="no native kernels")
def test_a_cluster_serves_int8_weights(checkpoint_bf16: Path, requests: tuple[CorpusRequest, ...]) -> None:
    prompts = [one.prompt for one in requests[:12]]
    with LLM(checkpoint_bf16, quantization="int8", threads=DEFAULTS["threads"], num_blocks=2000) as llm:
        served = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    here = Server.start(checkpoint_bf16, torch.bfloat16, num_blocks=2000, quantization="int8")
    plain = Server.start(checkpoint_bf16, torch.bfloat16, num_blocks=2000)
    expected = [greedy(here, prompt) for prompt in prompts]
    assert [one.token_ids for one in served] == expected
    assert expected != [greedy(plain, prompt) for prompt in prompts], "nothing was quantised"


@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "float32"), ("int3", "")])
def test_what_cannot_be_served_says_so(checkpoint_bf16: Path, quantization: str, dtype: str) -> None:
    with pytest.raises(ClusterError, match="--quantization"):
        LLM(checkpoint_bf16, quantization=quantization, dtype=dtype, threads=1, num_blocks=100)
