"""What checks and measurements yield, where it is written, and the table at the end."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
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


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``|output - expected| / |expected|`` in float64; infinite if anything is not finite."""
    difference = output.double() - expected.double()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.norm() / expected.double().norm().clamp_min(1e-30))


@dataclass
class Report:
    """Records as they come, one JSON object a line."""

    path: Path
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Write it down at once: a run that is cut short has what it had."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def reload(self) -> None:
        """Take in what another process has added to the file."""
        self.records = [json.loads(line) for line in self.path.read_text().splitlines()]

    def run(self, title: str, stage: Callable[[], Iterator[Record]]) -> None:
        """Take in a stage; an exception in it is a failed check, and the stages after it still run."""
        try:
            for record in stage():
                self.add(record)
        except Exception as error:  # whatever breaks, the other stages have something to say
            self.add(check(title, False, error=f"{type(error).__name__}: {error}".splitlines()[0]))
            note(traceback.format_exc())

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(record.get("passed", True) for record in self.records)

    def print_table(self) -> None:
        """What a person wants to see."""
        for record in self.records:
            if "check" in record:
                state = "ok    " if record["passed"] else "FAILED"
                print(f"{state} {record['check']:<24} {_details(record, ('check', 'passed'))}")
            elif record.get("bench") != "environment":
                print(f"       {record['bench']:<24} {_details(record, ('bench',))}")


def _details(record: Record, hidden: Sequence[str]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in record.items() if name not in hidden)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
