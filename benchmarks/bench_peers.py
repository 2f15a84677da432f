"""Baton and other systems under the same workloads, taking turns in one run: ratios, and what failed.

Each peer has a Python environment of its own, `<peers>/<name>/bin/python` or given by --python; transformers is in
ours. A peer that is absent, fails, gives other lengths than asked for or does not end in time is reported as such.
While it is not a peer's turn its processes are stopped. Baton is called through gRPC, the others in their process.
Right after Baton's turn, before the machine's speed has changed much, the floor of what it ran is measured (``floor``):
its share of what Baton took stands beside it.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.bench_serve import add_serving_options
from benchmarks.checkpoints import DTYPE, add_model_options, cached_checkpoint
from benchmarks.environment import environment
from benchmarks.figures import emit, median, note, run_main
from benchmarks.floor import Floor
from benchmarks.floor_meter import FloorMeter, NoPackedWeightsError
from benchmarks.machine import ForeignLoad
from benchmarks.sides import BATON, DRIVERS, BatonSide, PeerSide, Setting, Side, SideFailedError
from benchmarks.workloads import WARM_UP, WORKLOADS, Workload


class Contest:
    """All sides on one shape. A side that fails in a workload is started afresh for the next one."""

    def __init__(self, shape: str, sides: Mapping[str, Side], meter: FloorMeter | None) -> None:
        self._shape = shape
        self._sides = dict(sides)
        self._meter = meter
        self._names: dict[str, dict[str, object]] = {}

    def run(self, workload: Workload, runs: int) -> None:
        """Print a figure per side: medians, and how many times longer than Baton it took; and one for the floor."""
        for name in [name for name in self._sides if name not in self._names]:
            self._start(name)
        walls: dict[str, list[float]] = {name: [] for name in self._names}
        floors: list[Floor] = []
        load = ForeignLoad()
        for number in range(runs):
            for name in list(self._names) if number % 2 == 0 else list(self._names)[::-1]:
                bursts = workload.bursts(number)
                try:
                    walls[name].append(sum(self._sides[name].run(burst) for burst in bursts))
                except SideFailedError as error:
                    self._fail(name, str(error), workload=workload.name, run=number)
                    continue
                if name == BATON and self._meter is not None:
                    floors.append(self._meter.measure(bursts))
        sizes = [(len(one.prompt), one.max_tokens) for burst in workload.bursts(0) for one in burst]
        for name, times in walls.items():
            if times:
                figures = _summary(times, walls.get(BATON, []), sizes)
                if name in self._names:
                    figures["peak_rss_mb"] = self._sides[name].peak_rss_mb()
                if name == BATON and floors:
                    figures["floor_share"] = median(one.total / wall for one, wall in zip(floors, times, strict=False))
                emit(**self._heading(name), workload=workload.name, **figures, foreign_cores=load.cores())
        if floors:
            heading = {"bench": "floor", "shape": self._shape, "workload": workload.name}
            emit(**heading, **_floor_summary(floors, sizes), foreign_cores=load.cores())

    def close(self) -> None:
        """Stop all sides."""
        for side in self._sides.values():
            side.close()

    def _start(self, name: str) -> None:
        note(f"{self._shape}: starting {name}")
        try:
            self._names[name] = self._sides[name].start()
            self._sides[name].run(WARM_UP.make(0))
        except SideFailedError as error:
            self._fail(name, str(error))
            del self._sides[name]

    def _fail(self, name: str, reason: str, **where: object) -> None:
        emit(**self._heading(name), **where, failed=reason)
        self._sides[name].close()
        self._names.pop(name, None)

    def _heading(self, name: str) -> dict[str, object]:
        return {"bench": "peers", "shape": self._shape, "peer": name, "version": self._names.get(name, {}).get("name")}


def _summary(walls: Sequence[float], baton: Sequence[float], sizes: Sequence[tuple[int, int]]) -> dict[str, object]:
    wall = statistics.median(walls)
    prompt_tokens, out_tokens = sum(prompt for prompt, _ in sizes), sum(output for _, output in sizes)
    return {
        "times_baton": median(one / ours for one, ours in zip(walls, baton, strict=False)) if baton else None,
        "runs": len(walls),
        "wall_s": round(wall, 4),
        "spread": round((max(walls) - min(walls)) / wall, 3),
        "out_tok_s": round(out_tokens / wall, 1),
        "total_tok_s": round((prompt_tokens + out_tokens) / wall, 1),
        "ms_per_token": _ms_per_token(wall, sizes),
    }


def _floor_summary(floors: Sequence[Floor], sizes: Sequence[tuple[int, int]]) -> dict[str, object]:
    wall = statistics.median(one.total for one in floors)
    return {
        "wall_s": round(wall, 4),
        "products_s": median((one.products for one in floors), 4),
        "attention_read_s": median((one.attention_reads for one in floors), 4),
        "attention_flops_s": median((one.attention_flops for one in floors), 4),
        "ms_per_token": _ms_per_token(wall, sizes),
        "weights_read_ms": median(one.weights_read * 1e3 for one in floors),
    }


def _ms_per_token(wall: float, sizes: Sequence[tuple[int, int]]) -> float | None:
    """Of a single request that decodes."""
    out_tokens = sum(output for _, output in sizes)
    return round(wall * 1e3 / out_tokens, 3) if len(sizes) == 1 and out_tokens > 1 else None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_serving_options(parser)
    parser.add_argument("--peers", nargs="*", choices=DRIVERS, default=list(DRIVERS), metavar="PEER")
    default = Path("~/.cache/baton/peers").expanduser()
    parser.add_argument("--peers-dir", type=Path, default=default, help=f"peers' environments (default {default})")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PEER=PATH", help="a peer's Python, if it is not in --peers-dir"
    )
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds a run may take (default 300)")
    parser.add_argument("--start-limit", type=float, default=300.0, help="seconds a start may take (default 300)")
    return parser.parse_args()


def _meter(setting: Setting) -> FloorMeter | None:
    try:
        return FloorMeter(setting.checkpoint, setting.max_batched_tokens)
    except NoPackedWeightsError as error:
        note(f"{setting.shape}: no floor: {error}")
        return None


def main() -> None:
    """Print one JSON line per shape, workload and system."""
    args = _parse()
    pythons = {name: Path(path) for name, _, path in (pair.partition("=") for pair in args.python)}
    emit(**environment("torch", "grpcio", "numpy"), dtype=DTYPE, threads=args.threads, kv_gib=args.kv_gib)
    torch.set_num_threads(args.threads)
    for shape in args.shapes:
        setting = Setting(
            shape=shape,
            checkpoint=cached_checkpoint(shape, args.models),
            threads=args.threads,
            kv_gib=args.kv_gib,
            max_batched_tokens=args.max_batched_tokens,
            time_limit=args.time_limit,
            start_limit=args.start_limit,
            peers=args.peers_dir,
            pythons=pythons,
        )
        sides: dict[str, Side] = {BATON: BatonSide(setting), **{name: PeerSide(name, setting) for name in args.peers}}
        contest = Contest(shape, sides, _meter(setting))
        try:
            for name in args.workloads:
                contest.run(WORKLOADS[name], args.runs)
        finally:
            contest.close()


if __name__ == "__main__":
    run_main(main)
