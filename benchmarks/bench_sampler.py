"""Cost of sampling on CPU: whole vocabularies, each feature alone and everything together.

``python -m benchmarks.bench_sampler``. Random logits, so a nucleus holds thousands of ids: more than a model's usually
does. Features alternate within one run, with a plain read of the logits beside them: bandwidth drifts, and others use
the cores. ``composed`` is the same in torch operations, for scale.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.contenders import alternate, reference_kernels
from benchmarks.environment import environment
from benchmarks.figures import emit, run_main
from benchmarks.machine import ForeignLoad
from kernels.native import library
from kernels.sampling import LogprobRequest, Penalties, SamplingBatch, TokenBias, TokenMask, sample

LOG_TOKENS = 1024  # that rows with penalties have behind them
_COMPOSED = ("greedy", "top-p", "everything")


def features(rows: int, vocab_size: int) -> dict[str, SamplingBatch]:
    """Batches in which every row asks for the same; "greedy" and "temperature" are what the others add to."""
    ones, every = torch.ones(rows), torch.arange(rows)
    log = torch.randint(0, vocab_size, (rows, LOG_TOKENS), dtype=torch.int32)
    prompt_lens = torch.full((rows,), LOG_TOKENS // 2, dtype=torch.int32)
    words = -(-vocab_size // 32)
    allowed = TokenMask(every, torch.randint(-(1 << 31), 1 << 31, (rows, words)).int())
    biased = torch.stack([torch.randperm(vocab_size)[:16] for _ in range(rows)]).int()
    bias = TokenBias(every, biased, torch.randn(rows, 16))
    penalties = Penalties(every, ones * 1.1, ones * 0.2, ones * 0.1, log, every, prompt_lens)
    greedy = SamplingBatch(
        temperature=ones * 0,
        top_k=(ones * 50).int(),
        top_p=ones * 0.9,
        seed=every,
        position=torch.full((rows,), LOG_TOKENS),
        all_greedy=True,
        any_top_k=False,
        any_top_p=False,
    )
    drawn = dataclasses.replace(greedy, temperature=ones, all_greedy=False)
    raw, processed = (LogprobRequest(every, torch.full((rows,), value), 20) for value in (False, True))
    return {
        "greedy": greedy,
        "greedy, mask": dataclasses.replace(greedy, mask=allowed),
        "greedy, bias": dataclasses.replace(greedy, bias=bias),
        "greedy, penalties": dataclasses.replace(greedy, penalties=penalties),
        "greedy, 20 logprobs": dataclasses.replace(greedy, logprobs=raw),
        "temperature": drawn,
        "top-k": dataclasses.replace(drawn, any_top_k=True),
        "top-p": dataclasses.replace(drawn, any_top_p=True),
        "min-p": dataclasses.replace(drawn, min_p=ones * 0.05),
        "top-p, 20 processed logprobs": dataclasses.replace(drawn, any_top_p=True, logprobs=processed),
        "everything": dataclasses.replace(
            drawn,
            any_top_k=True,
            any_top_p=True,
            top_k=(ones * 1000).int(),
            min_p=ones * 0.001,
            mask=allowed,
            bias=bias,
            penalties=penalties,
            logprobs=raw,
        ),
    }


def composed(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """The same in torch operations."""
    with reference_kernels():
        sample(logits, batch)


def main() -> None:
    """Measure every feature."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sampler", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="sampled rows of the step (default 256)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="ids (default 151936)")
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the logits (default 3)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each measurement (default 7)")
    parser.add_argument("--composed", action="store_true", help="measure torch operations too: seconds per turn")
    args = parser.parse_args()
    emit(**environment("torch"), threads=torch.get_num_threads(), kernels=library.selection(torch.zeros(1).bfloat16()))
    torch.manual_seed(0)
    logits = torch.randn(args.rows, args.vocab_size) * args.spread
    batches = features(args.rows, args.vocab_size)
    contenders: dict[str, Callable[[], object]] = {
        name: partial(sample, logits, batch) for name, batch in batches.items()
    }
    if args.composed:
        contenders |= {f"{name}, composed": partial(composed, logits, batches[name]) for name in _COMPOSED}
    contenders["read"] = logits.sum
    others = ForeignLoad()
    with torch.inference_mode():
        times = alternate(contenders, args.repeats)
    foreign_cores = others.cores()
    for name in batches:
        emit(
            bench="sampler",
            feature=name,
            rows=args.rows,
            vocab_size=args.vocab_size,
            ms_per_step=times[name],
            us_per_row=round(times[name] / args.rows * 1e3, 1),
            read_ms=times["read"],
            composed_ms=times.get(f"{name}, composed"),
            foreign_cores=foreign_cores,
        )


if __name__ == "__main__":
    run_main(main)
