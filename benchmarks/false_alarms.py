"""Long steps are no hangs: the largest prefills, back to back, and no executor may be taken for dead or stuck.

One executor on all cores, default settings. Prompts fill a step each (--max-batched-tokens); now and then a short one
comes between, so that steps of every size are seen. Exit code 1 when an executor was lost or a request failed.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from baton import AsyncClient, BatonError, ClusterOptions, LocalCluster
from baton.stream_log import ResumePolicy
from benchmarks.checkpoints import DTYPE, add_model_options, cached_checkpoint
from benchmarks.environment import environment
from benchmarks.figures import emit, note, run_main
from benchmarks.machine import ForeignLoad, usable_cores
from benchmarks.ports import free_port
from benchmarks.scraping import Metrics

_NO_RESUMING = ResumePolicy(attempts=1, patience=0.0)  # a failure is a finding
_CALLERS = 3  # at a time: there is always a next prompt
_MOST_OUTPUT = 4
_SHORT = 0.2  # the share of prompts of other sizes
_FIRST_ID, _LAST_ID = 3, 4095
_SAY_SECONDS = 30.0


@dataclass(slots=True)
class Prefills:
    """What was sent so far."""

    requests: int = 0
    tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)


async def prefill(address: str, size: int, seconds: float, seed: int) -> Prefills:
    """Prompts of ``size`` tokens, or as long as they may be, one after another, for so long."""
    done, rng, until = Prefills(), random.Random(seed), time.monotonic() + seconds

    async def ask(client: AsyncClient) -> None:
        while time.monotonic() < until:
            count = rng.randint(1, size) if rng.random() < _SHORT else size
            prompt = [rng.randint(_FIRST_ID, _LAST_ID) for _ in range(count)]
            try:
                await client.generate(prompt, max_tokens=rng.choice([1, _MOST_OUTPUT]), ignore_eos=True)
            except BatonError as error:
                done.failed[f"{type(error).__name__}: {error.message}"] += 1
            done.requests += 1
            done.tokens += count

    async def say() -> None:
        while True:
            await asyncio.sleep(_SAY_SECONDS)
            note(f"{done.requests} prompts, {done.tokens} tokens, {until - time.monotonic():.0f} s to go")

    async with AsyncClient(address, resume=_NO_RESUMING) as client:
        size = min(size, (await client.model_info()).max_total_tokens - _MOST_OUTPUT)
        saying = asyncio.create_task(say())
        await asyncio.gather(*(ask(client) for _ in range(_CALLERS)))
        saying.cancel()
    return done


def _longest(steps: dict[float, float]) -> float:
    """The largest bound, in seconds, of a histogram that some step exceeded; 0 if none did."""
    return max((bound for bound, count in steps.items() if count < max(steps.values())), default=0.0)


def main() -> None:
    """Print one JSON line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, ("qwen3-0.6b",))
    parser.add_argument("--minutes", type=float, default=10.0, help="of each shape")
    parser.add_argument("--max-batched-tokens", type=int, default=2048, help="tokens in a step, and in a prompt")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    emit(**environment("torch"), seed=args.seed)
    clean = True
    for shape in args.shapes:
        scheduler_port, executor_port = free_port(), free_port()
        options = ClusterOptions(
            model=cached_checkpoint(shape, args.models),
            port=0,
            threads=args.threads,
            dtype=DTYPE,
            kv_memory="2GiB",
            max_batched_tokens=args.max_batched_tokens,
            scheduler_arguments=("--metrics-port", str(scheduler_port)),
            executor_arguments=("--metrics-port", str(executor_port)),
        )
        with LocalCluster(options) as cluster:
            load = ForeignLoad()
            done = asyncio.run(prefill(cluster.address, args.max_batched_tokens, args.minutes * 60, args.seed))
            foreign = load.cores()
            scheduler, executor = Metrics(scheduler_port), Metrics(executor_port)
        losses = scheduler.by_label("baton_executor_losses", "reason")
        sessions = executor.total("baton_executor_sessions")
        emit(
            bench="false_alarms",
            shape=shape,
            minutes=args.minutes,
            prompts=done.requests,
            prompt_tokens=done.tokens,
            steps=scheduler.total("baton_steps"),
            longest_step_above_s=_longest(executor.histogram("baton_executor_step_seconds")),
            executor_losses=losses,
            sessions=sessions,
            failed=done.failed,
            foreign_cores=foreign,
        )
        clean = clean and not sum(losses.values()) and sessions == 1 and not done.failed and done.requests > 0
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    run_main(main)
