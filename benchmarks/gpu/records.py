"""What checks and measurements yield, and where it is written."""

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Record = dict[str, object]


def note(text: str) -> None:
    """Say on stderr what is going on. Nothing of the services' clients is needed here."""
    print(text, file=sys.stderr, flush=True)


def check(name: str, passed: bool, **details: object) -> Record:
    """The outcome of one check."""
    return {"check": name, "passed": passed, **details}


def guarded(name: str, records: Iterable[Record], **details: object) -> Iterator[Record]:
    """``records``, as they come; an exception among them is a failed check, and what comes after them has its say."""
    try:
        yield from records
    except Exception as error:  # whatever breaks
        note(traceback.format_exc())
        yield check(name, False, **details, error=f"{type(error).__name__}: {error}".splitlines()[0])


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``|output - expected| / |expected|`` in float64; infinite if anything is not finite."""
    difference = output.double() - expected.double()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.norm() / expected.double().norm().clamp_min(1e-30))


@dataclass
class Report:
    """Records as they come, one JSON object a line, in a file that several processes append to."""

    path: Path
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record, stage: str = "") -> None:
        """Write it down at once, by one write: a run that is cut short has what it had."""
        whole = {"stage": stage, **record} if stage else record
        plain = {name: str(value) if _is_no_json(value) else value for name, value in whole.items()}
        self.records.append(plain)
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")
        if not record.get("passed", True):
            note(f"FAILED {plain}")

    def run(self, stage: str, work: Callable[[], Iterable[Record]]) -> None:
        """Take in what a stage yields."""

        def begun() -> Iterator[Record]:
            yield from work()

        for record in guarded(stage, begun()):
            self.add(record, stage)

    def reload(self) -> None:
        """Take in what other processes have added to the file. A line that one of them could not finish, which may have
        swallowed the next one, is a failed check.
        """
        self.records = []
        for line in self.path.read_text().splitlines():
            try:
                self.records.append(json.loads(line))
            except json.JSONDecodeError:
                self.records.append(check("results file", False, error=f"cut short: {line}"))

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(record.get("passed", True) for record in self.records)


def _is_no_json(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
