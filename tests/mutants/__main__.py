"""``python -m tests.mutants``: plants one defect after the other in a copy of the tree; tests have to notice each.

One line per mutant goes to stdout. Exit code 1: one was not caught, or the text that it changes has changed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("client", "executor_service", "kernels", "protos", "pyproject.toml", "scheduler_service", "tests")
_SIMULATION_SECONDS = 180.0  # for all seeds; whoever takes longer goes in circles
_TEST_SECONDS = 120.0
_FIRST_SEED = 0
_EVENTS = 2500


def main() -> int:
    """Run what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose names contain this")
    parser.add_argument("--seeds", type=int, default=40, help="of the simulator, for each mutant")
    parser.add_argument("--check", action="store_true", help="only look whether every mutant still finds its text")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    drifted = [mutant for mutant in chosen if mutated(mutant, ROOT) is None]
    for mutant in drifted:
        print(f"DRIFTED   {mutant.name}: its text is not in {mutant.path} exactly once")
    if drifted or arguments.check:
        return bool(drifted)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        _copy(tree)
        if problem := _simulate(tree, arguments.seeds):
            print(f"without any defect: {problem}")
            return 1
        escaped = [mutant for mutant in chosen if not _try(mutant, tree, arguments.seeds)]
    print(f"{len(chosen) - len(escaped)} of {len(chosen)} caught")
    return bool(escaped)


def mutated(mutant: Mutant, tree: Path) -> str | None:
    """The mutant's file with its defect; None if the text to change is not there exactly once."""
    source = (tree / mutant.path).read_text(encoding="utf-8")
    return source.replace(mutant.old, mutant.new) if source.count(mutant.old) == 1 else None


def _copy(tree: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors", "e2e")
    for part in _PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=ignore)
        else:
            shutil.copy(source, tree / part)


def _try(mutant: Mutant, tree: Path, num_seeds: int) -> bool:
    """Whether the tests notice it."""
    path = tree / mutant.path
    source = path.read_text(encoding="utf-8")
    defect = mutated(mutant, tree)
    assert defect is not None
    path.write_text(defect, encoding="utf-8")
    began = time.monotonic()
    try:
        caught = _simulate(tree, num_seeds) if mutant.simulated else ""
        caught = caught or _test(tree, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    verdict = f"caught    {mutant.name}: {caught}" if caught else f"ESCAPED   {mutant.name}"
    print(f"{verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return bool(caught)


def _simulate(tree: Path, num_seeds: int) -> str:
    """What the simulator found, and with how many seeds."""
    command = [
        "-m",
        "tests.simulation",
        "--first",
        str(_FIRST_SEED),
        "--seeds",
        str(num_seeds),
        "--events-per-run",
        str(_EVENTS),
    ]
    try:
        run = _run(tree, command, _SIMULATION_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the simulator goes in circles for {_SIMULATION_SECONDS:.0f} s"
    if run.returncode == 0:
        return ""
    last = run.stderr.strip().rpartition("\n")[2]
    seed = re.search(r"--seed (\d+)", last)
    if seed is None:
        return f"the simulator does not even start: {last[:120]}"
    problem = last.partition(": ")[2].partition("; again")[0]
    return f"seed {int(seed[1]) - _FIRST_SEED + 1} of the simulator: {problem[:120]}"


def _test(tree: Path, tests: str) -> str:
    """Which test failed."""
    if not tests:
        return ""
    try:
        run = _run(tree, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()], _TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{tests} take longer than {_TEST_SECONDS:.0f} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return failed[1] if run.returncode == 1 and failed is not None else ""


def _run(tree: Path, command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(tree / part) for part in ("", "client", "protos"))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
