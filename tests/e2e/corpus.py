"""The 64 requests of the reference tests: prompts of mixed lengths and seeds, committed in requests.json.

``python -m tests.e2e.corpus`` wrote the file.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

REQUESTS_FILE = Path(__file__).with_name("requests.json")
MAX_TOKENS = 48
_VOCABULARY = 4096
# Around block boundaries (16), prefill chunks, and further apart; four prompts of each.
_LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 64, 65, 100, 129, 200, 257)


@dataclass(frozen=True, slots=True)
class CorpusRequest:
    prompt: tuple[int, ...]
    seed: int


def load() -> tuple[CorpusRequest, ...]:
    return tuple(CorpusRequest(tuple(one["prompt"]), one["seed"]) for one in json.loads(REQUESTS_FILE.read_text()))


def _write() -> None:
    rng = random.Random(20261121)
    lengths = list(_LENGTHS) * 4
    rng.shuffle(lengths)
    requests = [
        {"seed": rng.getrandbits(64), "prompt": [rng.randrange(_VOCABULARY) for _ in range(length)]}
        for length in lengths
    ]
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in requests)
    REQUESTS_FILE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    _write()
