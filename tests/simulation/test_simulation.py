"""The whole system under faults: fixed and fresh seeds for about SIMULATION_SECONDS; `make simulate` goes on longer."""

import os
import secrets
import subprocess
import sys
import time

import pytest

from tests.simulation.running import Report, simulate
from tests.simulation.text import expected_text

SECONDS = float(os.environ.get("SIMULATION_SECONDS", "20"))
# In 7000184 an executor still hangs when all the others have come to rest; in 3989662223 an api process is started
# again before the engine has noticed that it was gone.
FIXED = (*range(8), 7000184, 3989662223)
# Without these the runs would be worth nothing.
RARE = (
    "preemptions",
    "handovers",
    "prefix_hit_tokens",
    "stale_tokens",
    "audited_tokens",
    "interruptions",
    "dropped: foreign frame",
)


@pytest.mark.timeout(1200)
def test_fixed_seeds() -> None:
    total = Report()
    for seed in FIXED:
        total.add(simulate(seed)[0])
    assert {"finished", "left", "waited in vain"} <= total.outcomes.keys(), total.outcomes
    assert all(total.reached[name] for name in RARE), total.reached
    assert len(total.faults) >= 12, total.faults


@pytest.mark.timeout(1200)
def test_fresh_seeds() -> None:
    deadline = time.monotonic() + SECONDS / 2
    seed = secrets.randbits(32)
    print(f"first seed {seed}")
    while time.monotonic() < deadline:
        simulate(seed)
        seed += 1


def test_a_seed_replays_in_another_process() -> None:
    def story(hash_seed: str) -> bytes:
        command = [sys.executable, "-m", "tests.simulation", "--seed", "3", "--events-per-run", "1500"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=200).stdout

    first = story("1")
    assert first.count(b"\n") > 300
    assert story("2") == first


def test_the_naive_search_for_stop_strings() -> None:
    a, b = 0, 1
    assert expected_text([a, b, a, a], ["ba"], 0, include_stop=False) == (3, "a", "ba")
    assert expected_text([a, b, a, a], ["ba"], 0, include_stop=True) == (3, "aba", "ba")
    assert expected_text([a, b, a, b, a], ["ba"], 3, include_stop=False) == (5, "aba", "ba")
    assert expected_text([a, b], ["x"], 0, include_stop=False) == (2, "ab", None)
