"""One request, many runs, one output: whoever shares its batches, however its prompt is cut, whatever dies meanwhile.

One seeded request (temperature 1, filters, penalties, a bias, log probabilities) runs again and again among random
others, on several clusters: one thread and two, steps of 16 to 2,048 tokens, one plan in flight and eight, so little
KV memory that requests are preempted, prefixes cached by some runs and not by others, executors killed with SIGKILL.
Ids, text, finish reason, log probabilities and usage must be the same every time. Exit code 1 when they are not.
"""

import argparse
import asyncio
import hashlib
import itertools
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from baton import AsyncClient, BatonError, Completion, GenerateOptions
from baton.checkpoints import TINY_PYTHON
from benchmarks.environment import environment
from benchmarks.figures import emit, note, run_main
from benchmarks.kill_test.cases import random_case
from benchmarks.kill_test.cluster import KillableCluster, Settings
from benchmarks.kill_test.streams import Output
from benchmarks.kill_test.view import ClusterView

_PROMPT = [3 + number * number * 7 % 4001 for number in range(300)]
_PROBE: GenerateOptions = {
    "max_tokens": 96,
    "ignore_eos": True,
    "seed": 20261121,
    "temperature": 1.0,
    "top_k": 500,
    "top_p": 0.97,
    "min_p": 0.0005,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.1,
    "logit_bias": {10: 1.5},
    "logprobs": 3,
}
_NAME = "probe"
_CLIENTS = 4
_PROBES = 6  # at a time
_MATES = 8  # at a time
_READY_SECONDS = 60.0
_POLL = 0.01
_KILL_SPREAD = 0.5  # seconds
_WATCH_SECONDS = 0.1
_ALONE = 0.3  # the share of runs that find nothing in the prefix cache


@dataclass(frozen=True, slots=True)
class Setting:
    """One cluster. ``num_blocks`` of 16 tokens."""

    executors: int
    threads: int
    max_batched_tokens: int
    run_ahead: str
    num_blocks: int

    def settings(self, model: Path, logs: Path) -> Settings:
        """What to start."""
        return Settings(
            model=model,
            executors=self.executors,
            threads=self.threads,
            num_blocks=self.num_blocks,
            max_rows=min(32, self.max_batched_tokens),
            log_level="info",
            logs=logs,
            scheduler_arguments=("--log-requests", "--run-ahead", self.run_ahead),
            executor_arguments=("--max-batched-tokens", str(self.max_batched_tokens)),
        )


SETTINGS = (
    Setting(executors=1, threads=1, max_batched_tokens=2048, run_ahead="auto", num_blocks=2000),
    Setting(executors=2, threads=1, max_batched_tokens=64, run_ahead="8", num_blocks=80),
    Setting(executors=1, threads=2, max_batched_tokens=16, run_ahead="1", num_blocks=400),
    Setting(executors=2, threads=2, max_batched_tokens=250, run_ahead="4", num_blocks=64),
)


@dataclass(slots=True)
class Tally:
    """What was seen so far.

    Attributes:
        outputs: how often each output came.
        cached: runs by how many of their prompt's tokens came from the prefix cache.
        mates: others that ran meanwhile.
        preempted: by executor and epoch.
        interrupted: runs that an executor died with.
    """

    outputs: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    cached: Counter[int] = field(default_factory=Counter)
    mates: int = 0
    kills: int = 0
    preempted: dict[tuple[str, int], int] = field(default_factory=dict)
    interrupted: int = 0

    def add(self, completion: Completion) -> None:
        """A run has ended."""
        digest = hashlib.sha256(repr(Output.of(completion)).encode()).hexdigest()
        self.outputs[digest[:16]] += 1
        self.cached[completion.usage.cached_tokens] += 1


class Crowd:
    """Runs of the one request, others around them, and kills.

    Runs are named; the scheduler's log tells which of them lost an executor.
    """

    def __init__(self, cluster: KillableCluster, clients: Sequence[AsyncClient], rng: random.Random) -> None:
        self.tally = Tally()
        self._cluster = cluster
        self._clients = itertools.cycle(clients)
        self._rng = rng
        self._live = 0
        self._ended = 0

    async def run(self, runs: int, kills: int) -> None:
        """``runs`` of the request, ``kills`` spread over them."""
        view = ClusterView(self._cluster.addresses)
        others = [asyncio.create_task(self._keep_company()) for _ in range(_MATES)]
        others += [asyncio.create_task(self._kill(view, runs, kills)), asyncio.create_task(self._watch(view))]
        turns = iter(range(runs))
        try:
            await asyncio.gather(*(self._probe(turns) for _ in range(_PROBES)))
        finally:
            for other in others:
                other.cancel()
            endings = await asyncio.gather(*others, return_exceptions=True)
            await view.close()
        for ending in endings:
            if isinstance(ending, Exception):
                raise ending

    async def _probe(self, turns: Iterator[int]) -> None:
        for turn in turns:
            options: GenerateOptions = {**_PROBE, "request_id": f"{_NAME}-{turn}"}
            if self._rng.random() < _ALONE:
                options["cache_salt"] = str(turn)
            self._live += 1
            try:
                self.tally.add(await next(self._clients).generate(_PROMPT, **options))
            except BatonError as error:
                self.tally.errors[f"{type(error).__name__}: {error.message}"] += 1
            self._live -= 1
            self._ended += 1

    async def _keep_company(self) -> None:
        """One random request after another; some begin as the one does, some are left before their end."""
        while True:
            case = random_case(self._rng)
            prompt = case.prompt if self._rng.random() < 0.5 else _PROMPT[: self._rng.randrange(1, len(_PROMPT))]
            patience = self._rng.choice([None, None, 0.2])
            try:
                async with asyncio.timeout(patience):
                    await next(self._clients).generate(prompt, **case.options)
            except TimeoutError:
                pass
            except BatonError as error:
                self.tally.errors[f"others: {type(error).__name__}: {error.message}"] += 1
            self.tally.mates += 1

    async def _kill(self, view: ClusterView, runs: int, kills: int) -> None:
        for number in range(kills):
            while self._ended < (number + 0.5) * runs / kills or not self._live:
                await asyncio.sleep(_POLL)
            await asyncio.sleep(self._rng.uniform(0.0, _KILL_SPREAD))
            name, _ = await view.busiest()
            place = next((one for one in self._cluster.executors if one.executor_id == name), None)
            if place is None:
                continue
            place.signal(signal.SIGKILL)
            self.tally.kills += 1
            while not place.is_gone():
                await asyncio.sleep(_POLL)
            self._cluster.start_executor(place)
            await view.all_back(len(self._cluster.executors))

    async def _watch(self, view: ClusterView) -> None:
        while True:
            for one in await view.statuses():
                self.tally.preempted[one.executor_id, one.epoch] = one.preemptions
            await asyncio.sleep(_WATCH_SECONDS)


async def measure(setting: Setting, model: Path, runs: int, kills: int, rng: random.Random) -> Tally:
    """Run on a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="baton-") as logs:
        with KillableCluster(setting.settings(model, Path(logs))) as cluster:
            await cluster.start()
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(AsyncClient(cluster.addresses)) for _ in range(_CLIENTS)]
                await clients[0].wait_ready(_READY_SECONDS)
                crowd = Crowd(cluster, clients, rng)
                await crowd.run(runs, kills)
            log = cluster.schedulers[0].log
        assert log is not None
        crowd.tally.interrupted = sum(
            line.fields.get("executor_losses", 0) > 0
            for line in log.read()
            if str(line.fields.get("request_id", "")).startswith(_NAME)
        )
        return crowd.tally


def _print(setting: Setting, tally: Tally) -> None:
    emit(
        bench="determinism",
        **asdict(setting),
        runs=tally.outputs.total(),
        outputs=len(tally.outputs),
        others=tally.mates,
        kills=tally.kills,
        runs_with_a_death=tally.interrupted,
        preemptions=sum(tally.preempted.values()),
        cached_tokens_of_runs=dict(sorted(tally.cached.items())),
        failed=tally.errors,
    )


def main() -> None:
    """Print a JSON line per cluster, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_PYTHON)
    parser.add_argument("--runs", type=int, default=1000, help="on all clusters together")
    parser.add_argument("--kills", type=int, default=40, help="likewise")
    all_of_them = range(1, len(SETTINGS) + 1)
    parser.add_argument("--clusters", type=int, nargs="+", choices=all_of_them, default=list(all_of_them))
    parser.add_argument("--seed", type=int, default=1, help="of the others, and of when executors are killed")
    args = parser.parse_args()
    emit(**environment(), runs=args.runs, kills=args.kills, seed=args.seed)
    everything = Tally()
    for turn, number in enumerate(args.clusters):
        note(f"cluster {number}")
        setting = SETTINGS[number - 1]
        runs, kills = (_share(whole, turn, len(args.clusters)) for whole in (args.runs, args.kills))
        tally = asyncio.run(measure(setting, args.model, runs, kills, random.Random(args.seed * 1000 + number)))
        _print(setting, tally)
        everything.outputs += tally.outputs
        everything.errors += tally.errors
        everything.kills += tally.kills
        everything.interrupted += tally.interrupted
    emit(
        bench="determinism",
        runs=everything.outputs.total(),
        outputs=len(everything.outputs),
        runs_by_output=everything.outputs,
        kills=everything.kills,
        runs_with_a_death=everything.interrupted,
        failed=everything.errors,
    )
    sys.exit(0 if everything.outputs.total() == args.runs and len(everything.outputs) == 1 else 1)


def _share(whole: int, number: int, parts: int) -> int:
    """Of ``whole`` things, as many as part ``number`` of ``parts`` gets."""
    return whole * (number + 1) // parts - whole * number // parts


if __name__ == "__main__":
    run_main(main)
